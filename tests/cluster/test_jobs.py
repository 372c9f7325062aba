"""Stages as jobs on a real two-node cluster with its dashboard: `ray job submit` and metrics."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.network import inside
from tests.cluster.test_kill_and_resume import influences
from tests.conftest import ROOT, SMALL, Driver, processes_of, wait_for_end

pytestmark = pytest.mark.slow
HEAD, DASHBOARD, METRICS = 7379, 7265, (7080, 7081)
RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


@dataclass
class Node:
    """A `ray start --block` process and all it started."""

    process: subprocess.Popen[bytes]
    namespace: str | None = None
    """Network namespace it is in; None: this machine's."""

    def kill(self) -> None:
        for process in processes_of(self.process.pid):
            with suppress(psutil.NoSuchProcess):  # a node's processes end one another
                process.kill()
        self.process.wait()
        wait_for_end(self.process.pid)


def start_node(*arguments: str, namespace: str | None = None) -> Node:
    line = [*(inside(namespace) if namespace else []), RAY, "start", "--block", "--num-cpus=1", *arguments]
    line += ["--object-store-memory=200000000"]
    line += ["--min-worker-port=0", "--max-worker-port=0"]  # any: two nodes of one machine would share the default ones
    process = subprocess.Popen(line, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
    return Node(process, namespace)


def answers(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bytes(reply.read())
    except OSError:
        return None


def until(happened: Callable[[], object], timeout: float = 120, alive: Sequence[Node] = ()) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert all(node.process.poll() is None for node in alive), "a node did not start"
        assert time.monotonic() < deadline
        time.sleep(0.2)


def living_nodes() -> int:
    reply = answers(f"http://127.0.0.1:{DASHBOARD}/api/v0/nodes?limit=10")
    listed = json.loads(reply)["data"]["result"]["result"] if reply else []
    return sum(node["state"] == "ALIVE" for node in listed)


@pytest.fixture
def folder() -> Iterator[str]:
    """For the second node: two nodes that share one would take a job's working directory from under each other."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:  # sockets need short paths
        yield name


@pytest.fixture
def cluster(folder: str) -> Iterator[list[Node]]:
    """A head with the dashboard and a second node, one CPU each."""
    nodes: list[Node] = []
    try:
        head = start_node(
            "--head", f"--port={HEAD}", "--include-dashboard=true", f"--dashboard-port={DASHBOARD}",
            f"--metrics-export-port={METRICS[0]}",
        )  # fmt: skip
        nodes.append(head)
        until(lambda: answers(f"http://127.0.0.1:{DASHBOARD}/api/version"), alive=nodes)
        second = [f"--address=127.0.0.1:{HEAD}", f"--metrics-export-port={METRICS[1]}"]
        nodes.append(start_node(*second, "--dashboard-agent-listen-port=0", f"--temp-dir={folder}"))
        until(lambda: living_nodes() == 2, alive=nodes)
        yield nodes
    finally:
        for node in reversed(nodes):
            if node.process.poll() is None:
                node.kill()


def submit(job: str, driver: Driver, *, wait: bool = True) -> subprocess.CompletedProcess[str]:
    line = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}", *([] if wait else ["--no-wait"])]
    line += ["--working-dir", ".", "--runtime-env-json", '{"excludes": [".venv", ".git", "runs", "tests"]}', "--"]
    line += [sys.executable, f"jobs/{job}.py", "--config", "configs/quickstart.yaml", f"run={driver.run}", *SMALL]
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


def test_jobs_on_two_nodes(small_run: Driver, copy_until: Callable[[str], Driver], cluster: list[Node]) -> None:
    driver = copy_until("iteration_00/influence")
    missing = submit("pair", driver)
    assert missing.returncode != 0
    assert "run the stage iteration_00/score first" in missing.stdout + missing.stderr

    submitted = submit("score", driver, wait=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    until(lambda: driver.parts("iteration_00/influence"), timeout=200)
    exported = [answers(f"http://127.0.0.1:{port}/metrics") or b"" for port in METRICS]
    assert re.search(
        rb'montessori_stage_total\{[^}]*Stage="iteration_00/score"|montessori_stage_total', b"".join(exported)
    )
    until(lambda: (driver.run / "iteration_00/influence/manifest.json").exists(), timeout=300)
    assert influences(driver) == influences(small_run)
    assert len({row["worker"].split("@")[0] for row in driver.rows("iteration_00/influence")}) == 2
