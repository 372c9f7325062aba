"""Kill real processes in the middle of every kind of stage; the same command must finish as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.conftest import Driver, processes_of, wait_for_end, wait_until

pytestmark = pytest.mark.slow
CopyUntil = Callable[[str], Driver]


def influences(driver: Driver) -> dict[str, tuple[float, float]]:
    """What must be equal, bit for bit, in two scorings; every example once."""
    rows = driver.rows("iteration_00/influence")
    scores = {row["example_id"]: (row["loss_after"], row["influence"]) for row in rows}
    assert len(scores) == len(rows)
    return scores


def test_driver_then_replica_killed_while_instructions_are_written(copy_until: CopyUntil) -> None:
    driver = copy_until("iteration_00/instructions")
    process = driver.start("--iteration", "0", job="synthesize")
    driver.kill_when(process, lambda: len(driver.parts("iteration_00/instructions")) >= 2)
    committed = driver.parts("iteration_00/instructions")
    assert not (driver.run / "iteration_00/instructions/manifest.json").exists()
    process = driver.start("--iteration", "0", job="synthesize")
    wait_until(lambda: len(driver.parts("iteration_00/instructions")) > len(committed), process, driver.log)
    replicas = processes_of(process.pid, "ray::ServeReplica")
    assert replicas
    replicas[0].kill()
    assert process.wait(timeout=400) == 0, driver.log.read_text()[-4000:]
    wait_for_end(process.pid)
    after = driver.parts("iteration_00/instructions")
    assert {name: after[name] for name in committed} == committed
    ids = [row["example_id"] for row in driver.rows("iteration_00/instructions")]
    assert len(set(ids)) == len(ids)
    kept = [row["example_id"] for row in driver.rows("iteration_00/instructions") if row["status"] == "kept"]
    assert [row["example_id"] for row in driver.rows("iteration_00/responses")] == kept


def test_driver_then_worker_killed_while_scoring(small_run: Driver, copy_until: CopyUntil) -> None:
    driver = copy_until("iteration_00/influence")
    process = driver.start(job="score")
    driver.kill_when(process, lambda: len(driver.parts("iteration_00/influence")) >= 1)
    committed = driver.parts("iteration_00/influence")
    assert 0 < len(driver.rows("iteration_00/influence")) < len(small_run.rows("iteration_00/influence"))
    process = driver.start(job="score")
    wait_until(lambda: len(driver.parts("iteration_00/influence")) > len(committed), process, driver.log)
    workers = processes_of(process.pid, "RayTrainWorker")
    assert workers
    workers[0].kill()
    assert process.wait(timeout=300) == 0, driver.log.read_text()[-4000:]
    wait_for_end(process.pid)
    after = driver.parts("iteration_00/influence")
    assert {name: after[name] for name in committed} == committed
    assert influences(driver) == influences(small_run)


def test_driver_killed_while_the_teacher_is_tuned(small_run: Driver, copy_until: CopyUntil) -> None:
    driver = copy_until("iteration_00/teacher")
    process = driver.start(job="tune_teacher")
    driver.kill_when(process, lambda: bool(list((driver.run / "train").rglob("checkpoint_*"))))
    driver.finish(job="tune_teacher")
    undisturbed = (small_run.run / "iteration_00/teacher/model.safetensors").read_bytes()
    assert (driver.run / "iteration_00/teacher/model.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_cleanly_and_says_how_to_go_on(copy_until: CopyUntil, signum: signal.Signals) -> None:
    driver = copy_until("iteration_00/influence")
    process = driver.start(job="score")
    wait_until(lambda: len(driver.parts("iteration_00/influence")) >= 1, process, driver.log)
    began = time.monotonic()
    os.kill(process.pid, signum)
    try:
        assert process.wait(timeout=15) == 130
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "same command again" in driver.log.read_text()
    wait_for_end(process.pid, timeout=15 - (time.monotonic() - began))
