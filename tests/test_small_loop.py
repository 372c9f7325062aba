"""The whole loop on the real model and the real engines, small: what it makes, and that it is not made twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from montessori_ray.artifacts.run import Run
from tests.conftest import Driver

pytestmark = [pytest.mark.slow, pytest.mark.loop]


def test_every_stage_leaves_its_artifact(small_run: Driver) -> None:
    from montessori_ray.config import load_config
    from montessori_ray.loop import stages_of

    run = Run(str(small_run.run))
    stages = stages_of(load_config(small_run.run / "config.yaml"))
    for stage in stages:
        manifest = run.artifact(stage.output).require()
        assert manifest.seconds >= 0
        assert manifest.versions["ray"]
        if stage.schema is not None:
            assert manifest.rows == len(small_run.rows(stage.output)) > 0
            assert list(manifest.columns) == stage.schema.names


def test_rows_join_on_their_ids(small_run: Driver) -> None:
    instructions = {row["example_id"]: row for row in small_run.rows("iteration_00/instructions")}
    kept = [id for id, row in instructions.items() if row["status"] == "kept"]
    assert [row["example_id"] for row in small_run.rows("iteration_00/responses")] == kept
    warmup = {row["prompt_id"] for row in small_run.rows("iteration_00/warmup_set")}
    probing = {row["prompt_id"] for row in small_run.rows("iteration_00/probing_set")}
    assert not warmup & probing
    scores = {row["example_id"]: row for row in small_run.rows("iteration_00/influence")}
    assert scores.keys() == {row["example_id"] for row in small_run.rows("iteration_00/probing_set")}
    for pair in small_run.rows("iteration_00/pairs"):
        for side in ("chosen", "rejected"):
            example = instructions[pair[f"{side}_id"]]
            assert (example["prompt"], example["raw_output"]) == (pair["prompt"], pair[side])
            assert scores[pair[f"{side}_id"]]["influence"] == pair[f"{side}_influence"]
        assert pair["chosen_influence"] < 0 < pair["rejected_influence"]


def test_the_summary_says_what_scores_are_worth(small_run: Driver) -> None:
    rows = small_run.rows("iteration_00/influence")
    details = Run(str(small_run.run)).artifact("iteration_00/influence").require().details
    assert details["recheck"]["points"] == sum(row["recheck_influence"] is not None for row in rows) > 0
    assert {"noise", "pearson", "spearman", "same_sign", "pairs", "pairs_changed"} <= details["recheck"].keys()
    assert details["snapshot"] == "not needed"


def test_teacher_is_tuned_and_evaluated(small_run: Driver) -> None:
    run = Run(str(small_run.run))
    tuned = run.artifact("iteration_00/teacher").require()
    assert {"eval_before", "eval_after"} <= tuned.details.keys()
    assert tuned.digest != run.artifact("inputs/teacher").require().digest
    result = run.artifact("final/evaluation").require().details
    assert set(result["losses"]) == {"original", "warmed", "trained"}
    assert result["losses"]["trained"]["held_out"]["mean"] < result["losses"]["original"]["held_out"]["mean"]
    assert set(result["fresh"]) == {"original", "tuned 1x"}
    printed = small_run.log.read_text()
    assert "held-out change" in printed
    assert str(small_run.run) in printed


def test_same_command_again_makes_nothing_twice(small_run: Driver) -> None:
    before = {path: path.stat().st_mtime_ns for path in _files(small_run.run)}
    printed = small_run.finish()
    assert "kept" in printed
    assert "✓" not in printed
    assert {path: path.stat().st_mtime_ns for path in _files(small_run.run)} == before


def test_other_settings_are_refused_before_anything_starts(small_run: Driver) -> None:
    process = small_run.start("score.baseline=warmed")
    assert process.wait(timeout=60) == 2
    assert "score.baseline: null_step -> warmed" in small_run.log.read_text()


def _files(run: Path) -> list[Path]:
    return sorted(path for folder in ("inputs", "iteration_00", "final") for path in (run / folder).rglob("*.*"))
