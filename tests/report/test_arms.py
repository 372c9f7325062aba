"""The page of a comparison: arms in sentences, plots and tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.config import Config, load_config
from montessori_ray.report.arms import arms, section
from montessori_ray.report.source import Source
from montessori_ray.report.write import write_report

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
ARMS = {"self_instruct": {"tune_teacher.tunes": "nothing"}, "montessori": {}, "shuffled_labels": {}}
DATA = {
    "fresh": {
        "parse_rate": 0.99, "duplicate_rate": 0.02, "responses": {"tokens": 40.2},
        "instructions": {
            "self_rouge_l": 0.41, "distinct_2": 0.83, "sampled": 131, "words": 9.4, "effective_first_words": 31.6,
            "first_words": {"write": 0.25, "name": 0.1},
        },
        "kept": 256,
        "overlap": {"reference": {"exact": 1, "near": 3}, "held_out": {"exact": 0, "near": 0}},
    },
    "training_rows": [96, 94], "training_tokens": [4000, 4000],
}  # fmt: skip


def row(
    arm: str, measure: str, value: float, difference: float | None, half: float = 0.01, category: str | None = None
) -> dict[str, Any]:
    low, high = (None, None) if difference is None else (difference - half, difference + half)
    return {
        "arm": arm, "measure": measure, "category": category, "models": 6, "value": value, "value_se": 0.1,
        "count": 1234, "value_by_model": [value - 0.25, value + 0.5],
        "difference": difference, "low": low, "high": high, "share_helpful": 0.6,
        "difference_se": None if difference is None else half / 2,
        "sentence": None if difference is None else f"said of {arm}",
    }  # fmt: skip


def source(folder: Path) -> Source:
    run = Run(str(folder / "evidence"))
    tree = load_config(QUICKSTART).model_dump() | {
        "compare": {"against": "self_instruct", "arms": ARMS, "tuning_seeds": (0, 1), "student_seeds": (0, 1)}
    }
    run.storage.write("config.yaml", yaml.safe_dump(Config.model_validate(tree).model_dump(mode="json")).encode())
    measures = [
        row("self_instruct", "held_out_loss", 2.7, None),
        row("montessori", "held_out_loss", 2.65, -0.05),
        row("shuffled_labels", "held_out_loss", 2.71, 0.004),
        row("self_instruct", "held_out_loss", 2.2, None, category="facts"),
        row("montessori", "held_out_loss", 2.1, -0.1234, category="facts"),
        row("shuffled_labels", "held_out_loss", 2.3, 0.1, category="facts"),
        row("self_instruct", "fresh_influence", -7e-4, None),
        row("montessori", "fresh_influence", -3e-3, -2.3e-3, 1e-3),
        row("shuffled_labels", "fresh_influence", 0.0, 7e-4),
    ]  # fmt: skip
    result = run.artifact("compare/result")
    result.begin(Identity(stage="compare/result", settings={}, inputs={}))
    details = {
        "against": "self_instruct",
        "independent": False,
        "measures": measures,
        "data": dict.fromkeys(ARMS, DATA),
    }
    result.commit(details=details, seconds=1.0, columns=None)
    return Source(run, Config.model_validate(tree), ())


def test_every_difference_is_drawn_and_told(tmp_path: Path) -> None:
    given = source(tmp_path)
    body = str(section(arms(given)))
    plots = re.findall(r"<svg.*?</svg>", body, flags=re.S)
    assert len(plots) == 2
    assert [len(re.findall(r'id="[^"]*dot-\d+"', plot)) for plot in plots] == [2, 2]
    text = re.sub(r"<[^>]+>", " ", body)
    for said in (
        "montessori",
        "shuffled labels",
        "1,234",
        "99.0%",
        "2.0%",
        "94 to 96",
        "3 / 0 of 256",
        "4,000",
        "2.40 to 3.15",
        "facts",
        "0.1234",
    ):
        assert said in text, said


def test_intervals_are_said_to_hold_for_what_was_repeated(tmp_path: Path) -> None:
    found = arms(source(tmp_path))
    assert found is not None
    assert "hold for other rows and seeds; teachers write different texts" in str(section(found))
    for tuning, student, said in (
        (1, 1, "other rows, not for other seeds"),
        (1, 3, "other rows and students, not for other teachers"),
        (3, 1, "other rows and teachers, not for other seeds of their students"),
    ):
        few = replace(found, tuning_seeds=tuning, student_seeds=student)
        assert f"hold for {said}; teachers write different texts" in str(section(few))
    assert "every seed has a loop of its own" in str(section(replace(found, independent=True)))


def test_what_teachers_ask_for_is_told(tmp_path: Path) -> None:
    body = str(section(arms(source(tmp_path))))
    assert "both are of 131 instructions of each teacher" in body
    for cell in ("0.41", "0.83", "write 25 %, name 10 %"):
        assert cell in body


def test_a_page_of_a_comparison_begins_with_its_sentences(tmp_path: Path) -> None:
    given = source(tmp_path)
    page = Path(write_report(given.run, given.config, given.stages)).read_text()
    assert page.index("said of montessori") < page.index("said of shuffled_labels") < page.index("<section")
    assert "against self instruct" in page


def test_a_run_without_arms_has_no_such_section(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "plain"))
    given = Source(run, load_config(QUICKSTART), ())
    assert arms(given) is None
    assert section(None) is None
