"""A scoring group: the ranks that hold one copy of the warmed student and score leases until none is left.

Every rank runs `score_loop` under Ray Train. Rank 0 talks to the ledger and passes each lease on; if any rank dies, Ray
Train starts the whole group again, and its first call to the ledger returns the leases of its former life.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from montessori_ray.config import Score as ScoreSettings
from montessori_ray.influence.estimators import NotRestoredError
from montessori_ray.influence.ledger import Lease, Row, Wait
from montessori_ray.influence.scorer import Scorer

WAIT_S = 0.5
"""Seconds between asking for a lease when there is none at the moment."""

COMMIT_S = 1.0
"""Seconds of finished rows a group may hold back, which a kill would lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What every rank of a scoring group is told."""

    name: str
    ledger: Any
    """Handle of the `LedgerActor`."""
    student: Path
    reference: tuple[Row, ...]
    settings: ScoreSettings
    chat_template: str | None
    max_length: int


def score_loop(settings: dict[str, Any]) -> None:
    """The Ray Train loop of one rank; `settings["group"]` is the `Group`."""
    group: Group = settings["group"]
    leader = dist.get_rank() == 0
    if leader:
        ray.get(group.ledger.release.remote(group.name))
    worker = f"{group.name}@{socket.gethostname()}"
    scorer = Scorer(
        group.student,
        group.reference,
        group.settings,
        chat_template=group.chat_template,
        max_length=group.max_length,
        worker=worker,
    )
    leases = _Leases(group, scorer.baselines, leader)
    rows = _Rows(group, leader)
    try:
        for lease in leases:
            scores = scorer.score_each(lease.examples)
            for example in lease.examples:
                if example is lease.examples[-1] and not lease.alone:
                    leases.ask()
                rows.add(lease, next(scores).row())
            rows.send()
        rows.finish()
        scorer.verify()
    except NotRestoredError as error:
        ray.get(group.ledger.spoil.remote(f"{worker}: {error}"))
        raise


class _Leases:
    """The group's leases, on all its ranks, until scoring is over; the next one can be asked for beforehand."""

    def __init__(self, group: Group, baselines: dict[str, float], leader: bool) -> None:
        self._group = group
        self._baselines = baselines
        self._leader = leader
        self._asked: ray.ObjectRef[Lease | Wait | None] | None = None

    def ask(self) -> None:
        """Ask for the next lease without waiting: late enough that no group holds examples it is far from scoring."""
        if self._leader and self._asked is None:
            self._asked = self._group.ledger.lease.remote(self._group.name, self._baselines)

    def __iter__(self) -> Iterator[Lease]:
        while True:
            self.ask()
            offer: list[Lease | Wait | None] = [ray.get(self._asked) if self._asked is not None else None]
            self._asked = None
            if dist.get_world_size() > 1:
                # WAIT is passed on too: ranks left alone in a broadcast for long would run into its timeout.
                dist.broadcast_object_list(offer, src=0)
            match offer[0]:
                case None:
                    return
                case Lease() as lease:
                    yield lease
                case _:
                    time.sleep(WAIT_S)


class _Rows:
    """Finished rows on their way to the ledger: sent as they pile up, while the next point is scored."""

    def __init__(self, group: Group, leader: bool) -> None:
        self._ledger = group.ledger
        self._leader = leader
        self._rows: list[Row] = []
        self._lease_id = 0
        self._sent = time.monotonic()
        self._under_way: ray.ObjectRef[None] | None = None

    def add(self, lease: Lease, row: Row) -> None:
        """Take a row in the order of its lease; all ranks have it, the leader's counts."""
        if not self._leader:
            return
        self._lease_id = lease.id
        self._rows.append(row)
        if time.monotonic() - self._sent > COMMIT_S:
            self.send()

    def send(self) -> None:
        """Send what there is; waits only for what was sent before."""
        if not self._rows:
            return
        self.finish()
        self._under_way = self._ledger.commit.remote(self._lease_id, self._rows)
        self._rows, self._sent = [], time.monotonic()

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        if self._under_way is not None:
            ray.get(self._under_way)
            self._under_way = None
