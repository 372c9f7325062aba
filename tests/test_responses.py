"""Answering instructions part by part: what a stopped session left is neither answered again nor left out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.cluster import connected
from montessori_ray.config import Cluster, load_config
from montessori_ray.errors import ModelError
from montessori_ray.loop import stages_of
from montessori_ray.stages import synthesize
from montessori_ray.stages.base import StageContext
from montessori_ray.stages.schemas import EXAMPLES, INSTRUCTIONS, RESPONSES
from montessori_ray.synthesis.client import GenerationRequest, Sample
from montessori_ray.telemetry.progress import ProgressChannel
from tests.tiny import write_student

CONFIG = load_config(Path(__file__).parents[1] / "configs/quickstart.yaml")
STAGE = {stage.name: stage for stage in stages_of(CONFIG)}["iteration_00/responses"]
STATUSES = [["kept", "kept"], ["kept", "duplicate"], ["unparsed", "duplicate"], ["kept"], ["unparsed"], ["kept"]]
"""Of the samples of each part: nothing was kept of the third and the fifth."""


def answered(parts: list[str], stop_after: int | None) -> Iterator[pa.Table]:
    """Ray Data as it is in this: parts in order, none without rows; a kill after some of them."""
    for number, part in enumerate(parts):
        if number == stop_after:
            raise KeyboardInterrupt
        rows = [row for row in pq.read_table(part).to_pylist() if row["status"] == "kept"]
        answers = {"response": "Yes.", "finish_reason": "stop", "num_tokens": 2}
        if rows:
            yield pa.Table.from_pylist([row | answers for row in rows], schema=RESPONSES)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    run = Run(str(tmp_path / "run"))
    instructions = run.artifact(STAGE.inputs[0])
    instructions.begin(Identity(stage="instructions", settings={}, inputs={}))
    for part, statuses in enumerate(STATUSES):
        rows = [
            {"example_id": f"{part}-{number}", "instruction": str(part), "status": status}
            for number, status in enumerate(statuses)
        ]
        instructions.append(pa.Table.from_pylist(rows, schema=INSTRUCTIONS))
    kept = sum(status == "kept" for statuses in STATUSES for status in statuses)
    columns = {field.name: str(field.type) for field in INSTRUCTIONS}
    instructions.commit(details={"kept": kept}, seconds=0.0, columns=columns)
    progress = ProgressChannel(STAGE.name, None)
    return StageContext(stage=STAGE, config=CONFIG, run=run, progress=progress, note=lambda *_, **__: None)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, None])
def test_every_kept_instruction_is_answered_once_wherever_a_session_stopped(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, stop_after: int | None
) -> None:
    def until(stop: int | None) -> Callable[[Any, list[str]], Iterator[pa.Table]]:
        return lambda _, parts: answered(parts, stop)

    monkeypatch.setattr(synthesize, "_answered_parts", until(stop_after))
    if stop_after is not None:
        with pytest.raises(KeyboardInterrupt):
            synthesize.synthesize_responses(context)
        monkeypatch.setattr(synthesize, "_answered_parts", until(None))
    assert synthesize.synthesize_responses(context)["responses"] == 5
    assert context.output.column("example_id") == ["0-0", "0-1", "1-0", "3-0", "5-0"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with connected(Cluster(num_cpus=1, dashboard=False, object_store_memory=100_000_000)):
        yield


class Refusing:
    """A client of the pool whose requests are all refused."""

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        raise ModelError("a prompt of 90 tokens does not fit: raise pool.max_model_len")


@pytest.mark.usefixtures("cluster")
def test_what_a_user_did_wrong_is_said_in_its_own_words(context: StageContext) -> None:
    """And not as a failed block of Ray Data's."""
    refused = replace(context, client=cast("Any", Refusing()))
    with pytest.raises(ModelError, match=r"^a prompt of 90 tokens does not fit: raise"):
        synthesize.synthesize_responses(refused)


class Slow:
    """A client of the pool that answers with the number of the requests under way, later parts sooner."""

    def __init__(self) -> None:
        self.under_way = 0

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        self.under_way += 1
        await asyncio.sleep(2.0 - 0.2 * int(request.prompt))
        self.under_way -= 1
        return [Sample(text=f"{request.prompt} {self.under_way}", finish_reason="stop", num_tokens=2)]


@pytest.mark.usefixtures("cluster")
def test_parts_are_answered_side_by_side_and_come_in_order(context: StageContext) -> None:
    synthesize.synthesize_responses(replace(context, client=cast("Any", Slow())))
    rows = list(context.output.rows())
    assert [row["example_id"] for row in rows] == ["0-0", "0-1", "1-0", "3-0", "5-0"]
    assert len(context.output.parts()) == 4
    said = [row["response"].split() for row in rows]
    assert [instruction for instruction, _ in said] == ["0", "0", "1", "3", "5"]
    assert max(int(others) for _, others in said) >= 3, "those of later parts while the first ones wait"


class Answering:
    """A client of the pool whose answers are cut where they are odd; it is killed after so many requests."""

    def __init__(self, killed_after: int | None = None) -> None:
        self.killed_after = killed_after

    def generate_all(self, requests: Iterable[GenerationRequest], *, concurrency: int) -> Iterator[Any]:
        for number, request in enumerate(requests):
            if number == self.killed_after:
                raise KeyboardInterrupt
            cut = ["length" if "odd" in request.prompt or position == 1 else "stop" for position in range(request.n)]
            yield number, [Sample(text="Yes.", finish_reason=reason, num_tokens=2) for reason in cut]


@pytest.mark.parametrize("killed_after", [None, 1, 2, 3])
@pytest.mark.parametrize("drop_truncated", [True, False])
def test_cut_candidates_are_left_out_where_cut_responses_are(
    tmp_path: Path, killed_after: int | None, drop_truncated: bool
) -> None:
    settings = [
        "tune_teacher.tunes=response",
        "tune_teacher.candidates=3",
        "split.probing=12",
        "pair.threshold=siblings",
    ]
    settings += [f"synthesize.drop_truncated={drop_truncated}", "synthesize.commit_prompts=1"]
    config = load_config(Path(__file__).parents[1] / "configs/quickstart.yaml", settings)
    stage = {stage.name: stage for stage in stages_of(config)}["iteration_00/candidates"]
    run = Run(str(tmp_path / "run"))
    probing, teacher = (run.artifact(name) for name in stage.inputs)
    for artifact in (probing, teacher):
        artifact.begin(Identity(stage=artifact.name, settings={}, inputs={}))
    asked = [{"example_id": text, "instruction": text} for text in ("a", "odd b", "c", "odd d")]
    probing.append(pa.Table.from_pylist(asked, schema=EXAMPLES))
    probing.commit(details={}, seconds=0.0, columns={"example_id": "string"})
    with teacher.model_writer() as folder:
        write_student(folder)
    teacher.commit(details={}, seconds=0.0)
    context = StageContext(
        stage=stage, config=config, run=run, progress=ProgressChannel(stage.name, None), note=lambda *_, **__: None,
        client=cast("Any", Answering(killed_after)),
    )  # fmt: skip
    if killed_after is not None:
        with pytest.raises(KeyboardInterrupt):
            synthesize.synthesize_candidates(context)
    synthesize.synthesize_candidates(replace(context, client=cast("Any", Answering())))
    kept = [f"{text}-r{position}" for text in ("a", "c") for position in (0, 2)]
    everything = [f"{row['example_id']}-r{position}" for row in asked for position in range(3)]
    assert context.output.column("example_id") == (kept if drop_truncated else everything)
