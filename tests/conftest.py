"""Shared by all tests: a complete small run on the real model, made once, and ways to run the driver as a user does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    "training_set=16",
    "data.reference.rows=8",
    "data.held_out.rows=8",
    "student.drop_layers=[12,13,14,15,16,17]",
    "warm_up.batch_size=8",
    "pool.kv_cache_gb=0.5",
    "pool.max_num_seqs=32",
    "synthesize.responses.max_tokens=24",
    "synthesize.prompts_per_round=4",
    "synthesize.commit_prompts=2",
    "split.warmup=32",
    "split.probing=24",
    "score.lease_size=2",
    "pair.max_pairs=6",
    "tune_teacher.checkpoint_steps=1",
    "tune_teacher.batch_size=2",
    "tune_teacher.micro_batch_size=2",
    "evaluate.fresh=6",
]
"""Overrides that make the quickstart small: a few dozen examples, a few minutes.

The student is damaged less, so that examples help and harm about as often; one with little left is helped by any.
"""


def _listen_to_ctrl_c() -> None:
    """Programs that a shell started in the background ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Driver:
    """`jobs/full_loop.py` in a process of its own, on a run directory."""

    run: Path

    def start(self, *overrides: str, job: str = "full_loop") -> subprocess.Popen[str]:
        """Start the job on the small quickstart; output goes to `run`.log."""
        command = [sys.executable, f"jobs/{job}.py", "--config", "configs/quickstart.yaml", f"run={self.run}"]
        log = self.log.open("a")
        return subprocess.Popen(
            [*command, *SMALL, *overrides], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "2"}, preexec_fn=_listen_to_ctrl_c,
        )  # fmt: skip

    def finish(self, *overrides: str, job: str = "full_loop", timeout: float = 850) -> str:
        """Run the job to its end; returns what it printed."""
        before = self.log.stat().st_size if self.log.exists() else 0
        process = self.start(*overrides, job=job)
        status = process.wait(timeout=timeout)
        wait_for_end(process.pid)
        printed = self.log.read_text()[before:]
        assert status == 0, printed[-4000:]
        return printed

    @property
    def log(self) -> Path:
        """Everything printed by drivers of this run."""
        return self.run.with_suffix(".log")

    def kill_when(self, process: subprocess.Popen[str], happened: Callable[[], bool], timeout: float = 300) -> None:
        """SIGKILL the driver as soon as `happened()`."""
        wait_until(happened, process, self.log, timeout)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for agent in processes_of(process.pid, "Agent"):
            with suppress(psutil.NoSuchProcess):
                agent.kill()  # Ray's agents notice the death of their node late; they hold nothing a run needs
        wait_for_end(process.pid)

    def rows(self, artifact: str) -> list[dict[str, Any]]:
        """All rows of a dataset of the run."""
        from montessori_ray.artifacts.run import Run

        return list(Run(str(self.run)).artifact(artifact).rows())

    def parts(self, artifact: str) -> dict[str, bytes]:
        """Content of the committed parts of a dataset."""
        return {path.name: path.read_bytes() for path in sorted((self.run / artifact).glob("part-*.parquet"))}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind so far."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], log: Path, timeout: float = 300) -> None:
    """Wait for something a running driver does; fails with its log when it ends or takes too long."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert process.poll() is None, f"driver ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"did not happen in {timeout} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.05)


def processes_of(session: int, part: str = "") -> list[psutil.Process]:
    """Living processes of a Unix session whose command line holds `part`; a driver and all it started share one."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            ours = os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE
        except ProcessLookupError:
            continue
        if ours and part in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def wait_for_end(session: int, timeout: float = 60) -> None:
    """Wait until nothing that a driver started is left."""
    deadline = time.monotonic() + timeout
    while left := processes_of(session):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A complete, undisturbed small loop on the real model; treat it as read-only.

    `SMALL_RUN=DIR` makes it there, or takes the one that an earlier test session made there.
    """
    kept = os.environ.get("SMALL_RUN")
    driver = Driver(Path(kept) if kept else tmp_path_factory.mktemp("small") / "run")
    driver.run.parent.mkdir(parents=True, exist_ok=True)
    driver.finish()  # of a complete run: looks, and starts nothing
    return driver


@pytest.fixture
def copy_until(small_run: Driver, tmp_path: Path) -> Callable[[str], Driver]:
    """`copy_until(artifact)`: a copy of the small run as if it had been stopped just before making the artifact."""

    def copy(artifact: str) -> Driver:
        driver = Driver(tmp_path / "run")
        shutil.copytree(small_run.run, driver.run)
        shutil.rmtree(driver.run / "train", ignore_errors=True)
        (driver.run / "events.jsonl").unlink()
        command = [sys.executable, "-m", "montessori_ray", "stages", "--config", "configs/quickstart.yaml"]
        subprocess.run(
            [*command, f"run={driver.run}", *SMALL, "--remove", artifact], cwd=ROOT, check=True, capture_output=True
        )
        return driver

    return copy
