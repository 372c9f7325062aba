"""A student shared by several ranks gives the scores of one that is whole, at every ZeRO stage, in every estimator.

Real engines in real processes, over gloo; no Ray, which `tests/cluster/test_scoring.py` adds.
"""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from montessori_ray.influence.estimators import Corrected, Estimator, Exact, FirstOrder, Student
from montessori_ray.influence.reference import ReferenceSet
from montessori_ray.influence.zero_student import ZeroStudent
from tests.influence.conftest import EXAMPLES, REFERENCE, RULE, student

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]

STAGES = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]
"""ZeRO stage, and whether masters and moments are offloaded to host memory."""


def estimators(warmed: Student, rank: int = 0, world: int = 1) -> list[Estimator]:
    def part(rows: list[Any]) -> ReferenceSet:
        return ReferenceSet(rows, 40, rank=rank, world=world)

    kwargs: dict[str, Any] = {"baseline": "null_step", "verify_every": 1, "worker": "here"}
    whole, sample = part(REFERENCE), part(REFERENCE[1:3])
    return [
        Exact(warmed, whole, **kwargs), FirstOrder(warmed, whole, **kwargs), Corrected(warmed, whole, sample, **kwargs),
    ]  # fmt: skip


def influences(warmed: Student, rank: int = 0, world: int = 1) -> dict[str, list[Any]]:
    return {
        estimator.name: [estimator.score(example).influence for example in EXAMPLES[:3]]
        for estimator in estimators(warmed, rank, world)
    }


def score_on_rank(rank: int, world: int, warmed: Path, results: Path) -> None:
    """One rank: all stages one after the other; rank 0 writes what came out."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/meet", rank=rank, world_size=world)
    found = []
    for stage, offload in STAGES:
        shared = ZeroStudent(warmed, zero_stage=stage, rule=RULE, offload=offload)
        found.append(influences(shared, rank, world))
    if rank == 0:
        (results / "influences.json").write_text(json.dumps(found))
    dist.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_scores_of_one_process(warmed: Path, tmp_path: Path, world: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # one process imports torch and DeepSpeed, the ranks are copies of it
    ranks = [context.Process(target=score_on_rank, args=(rank, world, warmed, tmp_path)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world
    expected = influences(student(warmed))
    for (stage, offload), found in zip(STAGES, json.loads((tmp_path / "influences.json").read_text()), strict=True):
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, abs=1e-5), (name, stage, offload)
