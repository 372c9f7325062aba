"""Scoring while ranks, nodes, the ledger and the driver are killed, hang or are cut off, by a seeded schedule.

On several raylets, each in a network namespace of its own where this user may make some; else none is cut off.

The result must be what an undisturbed scoring gives, bit for bit, no row twice, and the stage must end by itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from ray._raylet import GcsClient
from ray.util import get_node_ip_address

from montessori_ray.config import Score
from montessori_ray.influence.scorer import Scorer, join_alone, leave
from tests.cluster.network import Network, can_make_namespaces
from tests.cluster.test_jobs import ENVIRONMENT, Node, start_node, until
from tests.conftest import ROOT, processes_of, wait_for_end
from tests.tiny import rows, write_student

pytestmark = pytest.mark.slow
HEAD = 7479
SEED = 1
SCHEDULE = {"rank": 7, "all_groups": 2, "ledger": 5, "node": 3, "hang": 4, "driver": 3}
"""Disturbances of each kind; their order is drawn."""
OF_NETWORK = {"cut": 3, "partition": 1}
"""Further ones where nodes have namespaces: a cable that is pulled for a while, and one for good."""
TEXTS, POINTS = 400, 6000
"""Different examples, and how many times over they make up the probing set: equal texts must have equal scores."""
LEASE_TIMEOUT_S = 6.0
FORMAT: dict[str, Any] = {"chat_template": None, "max_length": 64}


class Disturbed:
    """A cluster of a head and two nodes, a driver on it, and ways to hurt them."""

    def __init__(self, folder: Path, temp: Path, network: Network | None) -> None:
        self.schedule = SCHEDULE | (OF_NETWORK if network else {})
        self._network = network
        self.driver: Any = None
        self.run = folder / "scores"
        self.log = folder / "driver.log"
        self._folder = folder
        self._temp = temp
        self._nodes: list[Node] = []
        self._lost: list[Node] = []
        self._started = 0
        self._random = random.Random(SEED)
        self._rows_of: dict[str, int] = {}
        self._hung: list[tuple[float, psutil.Process]] = []
        self.done: Counter[str] = Counter()
        """Disturbances so far."""

    # -- the cluster and the driver -----------------------------------------------------------------------------

    def start_cluster(self) -> None:
        self._nodes = [start_node("--head", f"--port={HEAD}", "--include-dashboard=false", *self._own_temp())]
        until(lambda: self.living_nodes() == 1, alive=self._nodes)
        self._nodes += [self._new_node(), self._new_node()]
        until(lambda: self.living_nodes() == 3, alive=self._nodes)

    def _new_node(self) -> Node:
        return start_node(
            f"--address={get_node_ip_address()}:{HEAD}", "--dashboard-agent-listen-port=0", *self._own_temp(),
            namespace=self._network.add_node() if self._network else None,
        )  # fmt: skip

    def _own_temp(self) -> list[str]:
        """Nodes that share one would be taken for each other."""
        self._started += 1
        return [f"--temp-dir={self._temp}/{self._started}"]

    def living_nodes(self) -> int:
        try:
            return sum(node.state == 0 for node in GcsClient(address=f"127.0.0.1:{HEAD}").get_all_node_info().values())
        except Exception:  # not up yet: whatever the client raises then
            return 0

    def start_driver(self) -> None:
        files = {name: str(self._folder / f"{name}.jsonl") for name in ("examples", "reference")}
        options = {"student": str(self._folder / "student"), **files, "output": str(self.run)}
        settings = [
            f"cluster.address=127.0.0.1:{HEAD}", "telemetry.tracker=none", "student.max_length=64", "groups=3",
            "lease_size=4", f"lease_timeout_s={LEASE_TIMEOUT_S}", "max_group_failures=50", "reference_tokens=64",
            "recheck=0",
        ]  # fmt: skip
        command = [sys.executable, "-m", "montessori_ray", "score"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        self.driver = subprocess.Popen(
            [*command, *settings], cwd=ROOT, env=ENVIRONMENT, stdout=self.log.open("a"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def committed(self) -> int:
        """Rows in the run."""
        for part in (self.run / "influence").glob("part-*.parquet"):
            if part.name not in self._rows_of:
                self._rows_of[part.name] = pq.read_metadata(part).num_rows
        return sum(self._rows_of.values())

    def look(self) -> int:
        """Rows in the run; lets hung workers go on whose time has come, and fails when the driver has failed."""
        for wake, process in [hung for hung in self._hung if hung[0] < time.monotonic()]:
            self._hung.remove((wake, process))
            if process.is_running():
                process.resume()
        self._heal()
        assert self.driver.poll() in (None, 0), self.log.read_text()[-4000:]
        return self.committed()

    def stop(self) -> None:
        """End everything this test started."""
        for _, process in self._hung:
            if process.is_running():
                process.kill()
        for node in reversed(self._nodes):
            node.kill()
        drivers = [self.driver.pid] if self.driver else []
        for session in [*drivers, *(node.process.pid for node in self._lost)]:
            for process in processes_of(session):
                process.kill()
            wait_for_end(session)

    # -- disturbances -------------------------------------------------------------------------------------------

    def disturb(self, kind: str) -> None:
        """Do it as soon as there is something to do it to."""
        hurt: dict[str, Callable[[], bool]] = {
            "rank": self._kill_rank, "all_groups": self._kill_all_groups, "ledger": self._kill_ledger,
            "node": self._lose_node, "hang": self._hang_rank, "driver": self._kill_driver, "cut": self._cut_cable,
            "partition": self._part_for_good,
        }  # fmt: skip
        until(lambda: self._heal() or hurt[kind](), timeout=60)
        self.done[kind] += 1

    def _heal(self) -> None:
        if self._network is not None:
            self._network.heal()

    def _ranks(self) -> list[psutil.Process]:
        ranks = [process for node in self._nodes for process in processes_of(node.process.pid, "ray::RayTrainWorker")]
        hung = {process.pid for _, process in self._hung}
        return [process for process in ranks if process.pid not in hung]

    def _kill_rank(self) -> bool:
        ranks = self._ranks()
        if ranks:
            self._random.choice(ranks).kill()
        return bool(ranks)

    def _kill_all_groups(self) -> bool:
        ranks = self._ranks()
        for rank in ranks:
            rank.kill()
        return bool(ranks)

    def _kill_ledger(self) -> bool:
        ledgers = processes_of(self._nodes[0].process.pid, "ray::LedgerActor")
        for ledger in ledgers:
            ledger.kill()
        return bool(ledgers)

    def _lose_node(self) -> bool:
        """The raylet alone: what ran on it has to notice. Another node joins at once."""
        node = self._random.choice(self._nodes[1:])
        raylets = processes_of(node.process.pid, "/raylet/raylet ")
        if raylets:
            raylets[0].kill()
            self._nodes.remove(node)
            self._lost.append(node)
            self._nodes.append(self._new_node())
        return bool(raylets)

    def _hang_rank(self) -> bool:
        """A straggler: it goes on, with rows that nobody waits for, when its lease has long been given to others."""
        ranks = self._ranks()
        if ranks:
            rank = self._random.choice(ranks)
            rank.suspend()
            self._hung.append((time.monotonic() + 2 * LEASE_TIMEOUT_S, rank))
        return bool(ranks)

    def _cut_cable(self) -> bool:
        """A node that is heard of again when its leases have long been given to others, before it is taken for dead."""
        return self._cut_off(2 * LEASE_TIMEOUT_S) is not None

    def _part_for_good(self) -> bool:
        """A node of which nothing is heard any more, and which hears nothing. Another one joins at once."""
        node = self._cut_off(float("inf"))
        if node is not None:
            self._nodes.remove(node)
            self._lost.append(node)
            self._nodes.append(self._new_node())
        return node is not None

    def _cut_off(self, seconds: float) -> Node | None:
        """A node with a scoring group, which is cut off; None where there is none."""
        assert self._network is not None
        busy = [node for node in self._nodes[1:] if processes_of(node.process.pid, "ray::RayTrainWorker")]
        whole = [node for node in busy if node.namespace and not self._network.is_cut(node.namespace)]
        if not whole:
            return None
        node = self._random.choice(whole)
        self._network.cut(str(node.namespace), seconds)
        return node

    def _kill_driver(self) -> bool:
        os.kill(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        self.start_driver()
        return True


@pytest.fixture
def disturbed(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    student = tmp_path / "student"
    student.mkdir()
    write_student(student)
    texts = rows(TEXTS, 0)
    examples = [{**texts[number % TEXTS], "example_id": f"e{number:05d}"} for number in range(POINTS)]
    for name, table in {"examples": examples, "reference": rows(41, 10_000)}.items():
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    temp = Path(f"/tmp/dist-{os.getpid()}")  # sockets need short paths
    temp.mkdir()
    network = Network() if can_make_namespaces() else None
    if network is None:
        warnings.warn("no node is cut off: this user may not make network namespaces", stacklevel=1)
    cluster = Disturbed(tmp_path, temp, network)
    try:
        cluster.start_cluster()
        cluster.start_driver()
        yield cluster
    finally:
        try:
            cluster.stop()
        finally:
            if network is not None:
                network.close()


def undisturbed(student: Path) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Scores by text, computed in this process."""
    torch.set_num_threads(1)
    join_alone()
    try:
        scorer = Scorer(student, rows(41, 10_000), Score(reference_tokens=64), worker="here", **FORMAT)
        scores = {(row["instruction"], row["response"]): scorer.score(row) for row in rows(TEXTS, 0)}
        return {text: (score.loss_before, score.loss_after, score.influence) for text, score in scores.items()}  # type: ignore[misc]
    finally:
        leave()


def test_disturbances_change_no_bit(disturbed: Disturbed, tmp_path: Path) -> None:
    kinds = [kind for kind, count in disturbed.schedule.items() for _ in range(count)]
    random.Random(SEED).shuffle(kinds)
    for number, kind in enumerate(kinds, start=1):
        until(lambda: disturbed.look() >= number * POINTS / (len(kinds) + 1), timeout=120)  # noqa: B023
        disturbed.disturb(kind)
    until(lambda: disturbed.look() == POINTS and disturbed.driver.poll() == 0, timeout=200)
    assert disturbed.done == Counter(disturbed.schedule)
    assert disturbed.done.total() >= 20
    tables = [pq.read_table(part).to_pylist() for part in sorted((disturbed.run / "influence").glob("part-*"))]
    scored = [row for table in tables for row in table]
    assert sorted(row["example_id"] for row in scored) == [f"e{number:05d}" for number in range(POINTS)]
    expected = undisturbed(tmp_path / "student")
    texts = rows(TEXTS, 0)
    for row in scored:
        text = texts[int(row["example_id"][1:]) % TEXTS]
        assert (row["loss_before"], row["loss_after"], row["influence"]) == expected[
            text["instruction"], text["response"]
        ]
