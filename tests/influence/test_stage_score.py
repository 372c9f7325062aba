"""Which examples a continued scoring still has to score, found without holding the ids of all that are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.config import load_config
from montessori_ray.errors import RunError
from montessori_ray.influence.driver import SpoiltRowsError
from montessori_ray.loop import stages_of
from montessori_ray.stages.base import StageContext
from montessori_ray.stages.schemas import EXAMPLES, INPUT_ROWS
from montessori_ray.stages.score import mark_rechecks, score, without
from montessori_ray.telemetry.progress import ProgressChannel


@given(st.lists(st.integers(0, 40), unique=True), st.data())
def test_without_leaves_out_what_is_scored_whatever_the_order(numbers: list[int], data: st.DataObject) -> None:
    scored = data.draw(st.lists(st.sampled_from(numbers), unique=True)) if numbers else []
    rows = [{"example_id": f"e{number}"} for number in numbers]
    left = without(rows, iter([f"e{number}" for number in scored]))
    assert [row["example_id"] for row in left] == [f"e{number}" for number in numbers if number not in set(scored)]


def test_without_reads_no_further_than_it_must() -> None:
    read: list[str] = []

    def scored() -> Iterator[str]:
        for number in (1, 0, 3, 2, 5, 4):
            read.append(f"e{number}")
            yield read[-1]

    assert list(without([{"example_id": "e0"}, {"example_id": "e1"}, {"example_id": "e2"}], scored())) == []
    assert read == ["e1", "e0", "e3", "e2"]


def marked(prompts: Sequence[str], recheck: int) -> list[int]:
    given = ({"example_id": str(number), "prompt_id": prompt} for number, prompt in enumerate(prompts))
    rows = list(mark_rechecks(given, recheck, len(prompts)))
    return [number for number, row in enumerate(rows) if row["recheck"]]


def test_whole_prompts_are_scored_twice() -> None:
    assert marked([f"p{number // 4}" for number in range(64)], 8) == [*range(4), *range(32, 36)]
    assert marked(list("aabb"), 0) == []


def test_rows_that_are_all_of_one_prompt_are_not_all_scored_twice() -> None:
    assert marked(["mine"] * 300, 16) == list(range(16))


Score = Callable[..., dict[str, Any]]


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], StageContext[Any]]:
    """A run that is about to score three examples, by what it is given instead of scoring groups."""
    config = load_config(Path(__file__).parents[2] / "configs/quickstart.yaml")
    stage = {stage.name: stage for stage in stages_of(config)}["iteration_00/score"]
    run = Run(str(tmp_path))
    nothing = Identity(stage="before", settings={}, inputs={})
    for name, schema, ids in (("inputs/reference", INPUT_ROWS, ["r"]), ("iteration_00/probing_set", EXAMPLES, "abc")):
        artifact = run.artifact(name)
        artifact.begin(nothing)
        artifact.append(pa.Table.from_pylist([{"example_id": id_, "prompt_id": "p"} for id_ in ids], schema=schema))
        artifact.commit(details={}, seconds=0.0, columns={field.name: str(field.type) for field in schema})
    student = run.artifact("iteration_00/warmed_student")
    student.begin(nothing)
    with student.model_writer() as folder:
        (folder / "model").touch()
    student.commit(details={}, seconds=0.0)

    def begin(score_examples: Score) -> StageContext[Any]:
        monkeypatch.setattr("montessori_ray.influence.driver.score_examples", score_examples)
        return StageContext(
            stage=stage, config=config, run=run, progress=ProgressChannel("score", None), note=lambda *_, **__: None
        )

    return begin


def scores_of(examples: Iterable[list[dict[str, Any]]], influence: float = -0.1) -> list[dict[str, Any]]:
    return [{"example_id": row["example_id"], "influence": influence} for chunk in examples for row in chunk]


@pytest.mark.parametrize("lost", [0, 1])
def test_scores_that_another_session_overwrote_are_missed(
    begun: Callable[[Score], StageContext[Any]], lost: int
) -> None:
    """Two sessions on one run in a bucket, which has no lock, write the same parts."""

    def score_examples(*, examples: Iterable[list[dict[str, Any]]], on_rows: Any, **_: Any) -> dict[str, Any]:
        on_rows(scores_of(examples)[lost:])
        return {"warmed_loss": 1.0}

    context = begun(score_examples)
    if lost:
        with pytest.raises(RunError, match="holds 2 scores of 3 examples: another session worked on this run"):
            score(context)
    else:
        assert score(context)["scored"] == 3


def test_wrong_scores_are_not_there_for_the_next_session(begun: Callable[[Score], StageContext[Any]]) -> None:
    def spoilt(*, examples: Iterable[list[dict[str, Any]]], on_rows: Any, **_: Any) -> dict[str, Any]:
        on_rows(scores_of(examples, influence=999.0)[:2])
        raise SpoiltRowsError("rows of group-0@bad: not restored")

    def right(*, examples: Iterable[list[dict[str, Any]]], on_rows: Any, **_: Any) -> dict[str, Any]:
        on_rows(scores_of(examples))
        return {}

    with pytest.raises(SpoiltRowsError):
        score(begun(spoilt))
    assert score(begun(right))["influence"]["mean"] == pytest.approx(-0.1)
