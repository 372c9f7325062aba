"""Scoring on a real Ray cluster: same rows whatever the groups, their size, or who is killed."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from montessori_ray.config import Score
from montessori_ray.errors import ResourceError
from montessori_ray.influence.driver import score_examples
from montessori_ray.influence.scorer import Scorer, join_alone, leave
from montessori_ray.telemetry.progress import ProgressChannel
from tests.tiny import rows, write_student

pytestmark = pytest.mark.slow

FORMAT: dict[str, Any] = {"chat_template": None, "max_length": 64}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()


REFERENCE = rows(41, 10_000)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("student")
    write_student(directory)
    return directory


def score(
    student: Path,
    examples: list[dict[str, Any]],
    storage: Path,
    kill_when: Callable[[list[dict[str, Any]]], bool] | None = None,
    note: Callable[[str], None] | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows in the order they came in, and the summary; SIGKILLs a worker once, when the rows so far say so."""
    result: list[dict[str, Any]] = []
    killed: list[int] = []

    def on_rows(new: list[dict[str, Any]]) -> None:
        result.extend(new)
        if kill_when is not None and not killed and kill_when(result):
            killed.append(scoring_worker())
            os.kill(killed[0], signal.SIGKILL)

    summary = score_examples(
        student=student,
        examples=(examples[start : start + 10] for start in range(0, len(examples), 10)),
        reference=REFERENCE,
        on_rows=on_rows,
        settings=Score(reference_tokens=64, **settings),
        **FORMAT,
        name="scoring",
        storage=str(storage),
        progress=ProgressChannel(),
        total=len(examples),
        done=0,
        note=note,
    )
    assert bool(killed) == (kill_when is not None)
    return result, summary


def scoring_worker() -> int:
    """Process id of a worker of this process's cluster that runs a scoring loop."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    processes = [line.split(maxsplit=2) for line in listed.splitlines()]
    mine = {pid for pid, parent, *_ in processes if parent == str(os.getpid())}  # the raylet is among them
    return next(
        int(pid)
        for pid, parent, *command in processes
        if parent in mine and command and command[0].startswith("ray::RayTrainWorker")
    )


def alone(student: Path, examples: list[dict[str, Any]], **settings: Any) -> dict[str, tuple[Any, ...]]:
    """Scores computed in this process, last example first."""
    torch.set_num_threads(1)
    join_alone()
    try:
        scorer = Scorer(student, REFERENCE, Score(reference_tokens=64, **settings), **FORMAT, worker="here")  # type: ignore[arg-type]
        return values([scorer.score(example).row() for example in reversed(examples)])
    finally:
        leave()


def values(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """What a row says, without who computed it and how long that took."""
    told = ("loss_before", "loss_after", "influence", "influence_se", "quarantine")
    return {row["example_id"]: tuple(row[name] for name in told) for row in rows}


def test_groups_and_leases_change_no_bit(student: Path, tmp_path: Path) -> None:
    examples = rows(600, 0)  # enough for both groups to be up before the first one is done
    examples[7]["response"] = " "
    expected = alone(student, examples)
    assert expected["e007"][-1] == "empty response"
    two, summary = score(student, examples, tmp_path, groups=2, lease_size=3)
    assert len(two) == 600
    assert values(two) == expected
    assert {row["worker"].partition("@")[0] for row in two} == {"group-0", "group-1"}
    assert (summary["points"], summary["quarantined"], summary["groups"]) == (600, 1, 2)
    assert summary["null_step_loss"] == two[0]["loss_before"]
    one, _ = score(student, examples[:50], tmp_path, groups=1, lease_size=7)
    assert values(one) == {row["example_id"]: expected[row["example_id"]] for row in examples[:50]}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_share_one_student(student: Path, tmp_path: Path, stage: int) -> None:
    examples = rows(8, 0)
    expected = alone(student, examples)
    got, _ = score(student, examples, tmp_path, group_size=2, zero_stage=stage)
    assert len(got) == 8
    for example_id, (*numbers, _) in values(got).items():
        assert numbers == pytest.approx(expected[example_id][:-1], abs=1e-5)


def test_a_group_joins_where_there_is_room_and_is_retired_when_it_dies(student: Path, tmp_path: Path) -> None:
    texts = rows(300, 0)
    examples = [{**texts[number % 300], "example_id": f"e{number}"} for number in range(3000)]
    notes: list[str] = []

    def both_score(so_far: list[dict[str, Any]]) -> bool:
        return {row["worker"].partition("@")[0] for row in so_far} == {"group-0", "group-1"}

    got, summary = score(
        student, examples, tmp_path, both_score, notes.append, groups=1, max_groups=2, max_group_failures=0
    )
    joined, retired = notes
    assert joined == "group-1 joins: the cluster has room for it"
    assert re.fullmatch(
        r"group-(\d) is retired, 1 go on: training scoring-group-\1 failed: worker 0 of 1 died \(.*", retired
    )
    assert sorted(row["example_id"] for row in got) == sorted(row["example_id"] for row in examples)
    expected = alone(student, texts)
    for row in got:
        assert values([row])[row["example_id"]] == expected[f"e{int(row['example_id'][1:]) % 300:03d}"]
    assert (summary["points"], summary["groups"]) == (3000, 2)


def test_groups_that_cannot_load_the_student_end_the_stage(student: Path, tmp_path: Path) -> None:
    unwarmed = tmp_path / "unwarmed"
    unwarmed.mkdir()
    for file in student.iterdir():
        if not file.name.startswith("optimizer"):
            (unwarmed / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ResourceError, match=r"all 2 scoring groups failed; the first: .* was not warmed up"):
        score(unwarmed, rows(4, 0), tmp_path, groups=2, max_group_failures=0)
