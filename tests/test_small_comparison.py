"""Arms of a comparison on the real model and the real engines, small: those that no other test runs.

The judge is a scripted endpoint, since the embedded model says few grades that can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from montessori_ray.artifacts.run import Run
from tests.conftest import Driver
from tests.evaluation.serving import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SIZES = ["training_set=8", "split.warmup=16", "split.probing=16", "pair.max_pairs=4", "pair.threshold=siblings"]
FIRST, SECOND = "A plain request.\nRating: 9", "Hard to follow.\nRating: 2"


def grade(messages: list[dict[str, str]]) -> str:
    """As good as the number of characters is even."""
    return FIRST if len(messages[-1]["content"]) % 2 == 0 else SECOND


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    driver = Driver(tmp_path_factory.mktemp("compared") / "run")
    with serving(grade) as (address, requests):
        judge = {"model": "judge", "base_url": address}
        arms: dict[str, Any] = {
            "self_instruct": {"tune_teacher.tunes": "nothing"},
            "judged": {"pair.signal": "llm_judge", "pair.judge": judge},
            "responses": {"tune_teacher.tunes": "response"},
            "best": {"tune_teacher.tunes": "nothing", "training_select": "most_helpful"},
        }
        section = yaml.safe_dump(
            {"against": "self_instruct", "arms": arms}, default_flow_style=True, width=10_000, sort_keys=False
        )
        driver.finish(*SIZES, f"compare={section.strip()}", job="compare", timeout=2300)
    assert len(requests) == len(driver.rows("iteration_00/grades"))
    return driver


def test_every_arm_is_measured_against_the_first(compared: Driver) -> None:
    rows = [row for row in compared.rows("compare/result") if row["category"] is None]
    measured = {(row["arm"], row["measure"]) for row in rows}
    arms, measures = {arm for arm, _ in measured}, {measure for _, measure in measured}
    assert arms == {"self_instruct", "judged", "responses", "best"}
    assert len(measured) == len(rows) == len(arms) * len(measures)
    assert {row["arm"] for row in rows if row["difference"] is None} == {"self_instruct"}
    assert "Held-out loss against self_instruct" in compared.log.read_text()


def test_the_judge_s_grades_decide_what_is_chosen(compared: Driver) -> None:
    grades = {row["example_id"]: row["grade"] for row in compared.rows("iteration_00/grades")}
    assert set(grades.values()) == {9.0, 2.0}
    pairs = compared.rows("iteration_00/pairs")
    assert pairs
    assert all((grades[pair["chosen_id"]], grades[pair["rejected_id"]]) == (9.0, 2.0) for pair in pairs)


def test_responses_are_tuned_on_answers_to_one_instruction(compared: Driver) -> None:
    candidates = {row["example_id"]: row for row in compared.rows("iteration_00/candidates")}
    pairs = compared.rows("arms/responses/iteration_00/pairs")
    assert pairs
    for pair in pairs:
        chosen, rejected = candidates[pair["chosen_id"]], candidates[pair["rejected_id"]]
        assert (pair["chosen"], pair["rejected"]) == (chosen["raw_output"], rejected["raw_output"])
        assert chosen["instruction"] == rejected["instruction"]
        assert pair["chosen_influence"] < pair["rejected_influence"]
    tuned = compared.run / "arms/responses/tuning_0"
    assert not (tuned / "final/instructions").exists()  # the original teacher writes them, and once for all
    assert (tuned / "final/responses/manifest.json").exists()


def test_best_of_n_trains_on_the_most_helpful_of_each_prompt(compared: Driver) -> None:
    run = Run(str(compared.run))
    (scored,) = (name for name in _artifacts(compared.run) if name.endswith("final/influence"))
    influence = {row["example_id"]: row["influence"] for row in run.artifact(scored).rows()}
    prompts = {row["example_id"]: row["prompt_id"] for row in run.artifact("arms/best/final/responses").rows()}
    chosen = [row["example_id"] for row in compared.rows("arms/best/final/training_set")]
    assert len(chosen) == 8
    for example_id in chosen:
        better = [
            other for other, prompt in prompts.items()
            if prompt == prompts[example_id] and other not in chosen and influence[other] < influence[example_id]
        ]  # fmt: skip
        assert not better


def _artifacts(run: Path) -> list[str]:
    return [str(path.parent.relative_to(run)) for path in run.rglob("manifest.json")]
