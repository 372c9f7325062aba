"""What a comparison says, from tables made by hand: means, differences by row, and who wrote what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.config import load_config
from montessori_ray.stages import schemas as columns
from montessori_ray.stages.base import Stage, StageContext
from montessori_ray.stages.compare import CellOutputs, Probed, _by_seeds, collect_fresh, compare
from montessori_ray.telemetry.progress import ProgressChannel

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"
CELLS = [
    CellOutputs(
        arm=arm, tuning_seed=0, loop="", fresh_instructions=f"{arm}/instructions", fresh_responses=f"{arm}/responses",
        fresh_set=f"{arm}/fresh_set", training_set=f"{arm}/training_set", student=f"{arm}/{seed}/student",
    )
    for arm in ("before", "after")
    for seed in (0, 1)
]  # fmt: skip
INPUTS = ("losses", "reference", "held_out", "compare/fresh_influence")
LOSSES = {"before/0/student": [2.0, 4.0, 3.0], "before/1/student": [2.2, 4.2, 3.2]}
LOSSES |= {"after/0/student": [1.0, 3.5, 2.9], "after/1/student": [1.4, 3.3, 2.7]}
INFLUENCE = {"before": [0.1, -0.1, 0.3, None], "after": [-0.5, -0.3, -0.4, 0.1]}


def put(run: Run, name: str, rows: list[dict[str, Any]], schema: pa.Schema, **details: Any) -> None:
    artifact = run.artifact(name)
    artifact.begin(Identity(stage=name, settings={}, inputs={}))
    artifact.append(pa.Table.from_pylist(rows, schema=schema))
    artifact.commit(details=details, seconds=0.0, columns={schema.names[0]: "string"})


def context(run: Run, output: str, schema: pa.Schema, inputs: tuple[str, ...]) -> StageContext:
    stage = Stage(name=output, output=output, body=lambda _: {}, schema=schema, inputs=inputs)
    run.artifact(output).begin(Identity(stage=output, settings={}, inputs={}))
    return StageContext(
        stage=stage, config=load_config(QUICKSTART), run=run, progress=ProgressChannel(), note=lambda *_, **__: None
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    losses = [
        {"student": student, "set": name, "example_id": str(row), "loss": loss}
        for student, values in LOSSES.items()
        for name in ("reference", "held_out")
        for row, loss in enumerate(values)
    ]
    put(run, "losses", losses, columns.LOSSES)
    influence = [
        {"example_id": f"{arm}/fresh_set|{number}", "prompt_id": f"{arm}|{number}", "influence": value}
        for arm, values in INFLUENCE.items()
        for number, value in enumerate(values)
    ]
    put(run, "compare/fresh_influence", influence, columns.INFLUENCE)
    for name in ("reference", "held_out"):
        rows = [{"instruction": "Name a river.", "category": category} for category in ("facts", "facts", "lists")]
        put(run, name, rows, columns.INPUT_ROWS)
    for arm in ("before", "after"):
        texts = [f"Say {arm} number {number}." for number in range(3)]
        put(run, f"{arm}/instructions", [{"instruction": text, "status": "kept"} for text in texts]
            + [{"instruction": texts[0], "status": "duplicate"}], columns.INSTRUCTIONS, kept=3)  # fmt: skip
        put(run, f"{arm}/responses", [{"response": "ok", "num_tokens": 7, "finish_reason": "stop"}], columns.RESPONSES)
        put(run, f"{arm}/training_set", [{"example_id": "a"}], columns.EXAMPLES, tokens=11)
    return run


def test_differences_are_paired_by_seed_and_row(run: Run) -> None:
    told = context(run, "result", columns.COMPARISON, INPUTS)
    details = compare(told, cells=CELLS, against="before")
    rows = {(row["arm"], row["measure"]): row for row in details["measures"] if row["category"] is None}
    expected = fmean(
        after - before
        for seed in (0, 1)
        for after, before in zip(LOSSES[f"after/{seed}/student"], LOSSES[f"before/{seed}/student"], strict=True)
    )
    found = rows["after", "held_out_loss"]
    assert found["difference"] == pytest.approx(expected)
    assert found["low"] < expected < found["high"]
    assert found["value_by_model"] == [pytest.approx(fmean(LOSSES[f"after/{seed}/student"])) for seed in (0, 1)]
    assert (found["models"], found["value"]) == (2, pytest.approx(fmean([1.0, 3.5, 2.9, 1.4, 3.3, 2.7])))
    assert rows["before", "held_out_loss"]["difference"] is None
    (of_category,) = (row for row in details["measures"] if row["category"] and row["arm"] == "after")
    assert (of_category["category"], of_category["measure"]) == ("facts", "held_out_loss")
    assert of_category["difference"] == pytest.approx(fmean([-1.0, -0.5, -0.8, -0.9]))
    fresh = rows["after", "fresh_influence"]
    assert fresh["difference"] == pytest.approx(fmean([-0.5, -0.3, -0.4, 0.1]) - fmean([0.1, -0.1, 0.3]))
    assert (fresh["share_helpful"], fresh["models"]) == (0.75, 1)
    assert "0" in fresh["sentence"]
    assert next(iter(run.artifact("result").rows()))["arm"] == "before"


def test_probing_examples_of_the_original_teacher_count_as_fresh(run: Run) -> None:
    probing = [{"example_id": f"p-{number}", "prompt_id": "p", "influence": value} for number, value in enumerate(
        [0.5, 0.7, None])]  # fmt: skip
    put(run, "probed", probing, columns.INFLUENCE)
    told = context(run, "result", columns.COMPARISON, INPUTS)
    details = compare(told, cells=CELLS, against="before", probed=[Probed("probed", "before/fresh_set")])
    before, after = (row for row in details["measures"] if row["measure"] == "fresh_influence")
    assert (before["count"], after["count"]) == (3 + 2, 4)
    assert before["value"] == pytest.approx(fmean([0.1, -0.1, 0.3, 0.5, 0.7]))
    assert after["difference"] == pytest.approx(fmean([-0.5, -0.3, -0.4, 0.1]) - before["value"])
    before, after = (row for row in details["measures"] if row["measure"] == "fresh_influence_alone")
    assert (before["count"], after["count"]) == (3, 4)
    assert after["difference"] == pytest.approx(fmean([-0.5, -0.3, -0.4, 0.1]) - fmean([0.1, -0.1, 0.3]))


def test_influences_of_independent_loops_are_compared_loop_by_loop(run: Run) -> None:
    """Two loops whose original teachers differ by far: the change in each is what other loops would show, too."""
    values = {"before/0": [1.0, 1.2], "before/1": [5.0, 5.2], "after/0": [0.5, 0.5], "after/1": [4.4, 4.6, 4.8]}
    for seed, loop in ((0, "x/"), (1, "loop_1/")):
        rows = [
            {"example_id": f"{place}|{number}", "prompt_id": f"{place}|{number}", "influence": value}
            for place, of_place in values.items()
            if place.endswith(str(seed))
            for number, value in enumerate(of_place)
        ]
        put(run, f"{loop}compare/fresh_influence", rows, columns.INFLUENCE)
    cells = [
        replace(cell, tuning_seed=seed, fresh_set=f"{cell.arm}/{seed}", loop=("x/", "loop_1/")[seed])
        for cell, seed in zip(CELLS, (0, 1, 0, 1), strict=True)
    ]
    told = context(run, "result", columns.COMPARISON, INPUTS)
    details = compare(told, cells=cells, against="before", independent=True)
    before, after = (row for row in details["measures"] if row["measure"] == "fresh_influence")
    assert after["difference"] == pytest.approx(fmean([0.5 - 1.1, 4.6 - 5.1]))
    assert after["difference_se"] == pytest.approx(0.05)
    assert after["high"] - after["difference"] == pytest.approx(12.706 * 0.05, rel=1e-3), "Student's t on 1 degree"
    assert (before["models"], after["models"], after["count"]) == (2, 2, 5)
    assert details["independent"]


def test_students_of_one_teacher_stand_together() -> None:
    """An interval must see which students share a teacher; see `paired_difference`."""
    cells = [replace(CELLS[0], tuning_seed=seed) for seed in (3, 5, 3, 5)]
    losses = [np.array(values) for values in ([1.0, 2.0], [5.0, 6.0], [3.0, 4.0], [7.0, 8.0])]
    assert _by_seeds(cells, losses).tolist() == [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]


def test_data_of_each_arm(run: Run) -> None:
    told = context(run, "result", columns.COMPARISON, INPUTS)
    data = compare(told, cells=CELLS, against="before")["data"]["after"]
    assert (data["training_rows"], data["training_tokens"]) == ([1], [11])
    assert data["fresh"]["duplicate_rate"] == 0.25
    assert data["fresh"]["overlap"]["held_out"] == {"exact": 0, "near": 0}


def test_variety_is_of_each_teacher_on_as_many_texts_as_every_one_has(run: Run) -> None:
    """Both teachers write the same: pooled, every text of theirs would be there twice."""
    texts = ["Name a bird.", "Why is it?", "Who was she?", "List two seas."]
    for number in (0, 1):
        rows = [{"instruction": text, "status": "kept"} for text in texts]
        put(run, f"teacher_{number}", rows, columns.INSTRUCTIONS, kept=4)
    tuned = [
        replace(CELLS[2 + number], tuning_seed=number, fresh_instructions=f"teacher_{number}") for number in (0, 1)
    ]
    cells = [*(replace(cell, tuning_seed=number) for number, cell in enumerate(CELLS[:2])), *tuned]
    told = context(run, "result", columns.COMPARISON, INPUTS)
    data = compare(told, cells=cells, against="before")["data"]
    assert [data[arm]["fresh"]["instructions"]["sampled"] for arm in ("before", "after")] == [3, 3]
    assert data["after"]["fresh"]["instructions"]["self_rouge_l"] == 0
    assert data["after"]["fresh"]["kept"] == 8, "all but variety is of all teachers together"


def test_fresh_examples_of_several_teachers_keep_apart(run: Run) -> None:
    for teacher in ("one", "two"):
        put(run, teacher, [{"example_id": "final-fresh-p0-0", "prompt_id": "p0"}], columns.EXAMPLES)
    assert collect_fresh(context(run, "all", columns.EXAMPLES, ("one", "two"))) == {"sets": 2}
    rows = list(run.artifact("all").rows())
    assert [(row["example_id"], row["prompt_id"]) for row in rows] == [
        ("one|final-fresh-p0-0", "one|p0"), ("two|final-fresh-p0-0", "two|p0"),
    ]  # fmt: skip
