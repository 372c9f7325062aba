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
    scorer = Scorer(
        group.student,
        group.reference,
        group.settings,
        chat_template=group.chat_template,
        max_length=group.max_length,
        worker=f"{group.name}@{socket.gethostname()}",
    )
    if leader:
        ray.get(group.ledger.join.remote(group.name, scorer.baselines))
    for lease in _leases(group, leader):
        _score_lease(lease, scorer, group.ledger, leader)


def _leases(group: Group, leader: bool) -> Iterator[Lease]:
    """The group's leases, on all its ranks, until scoring is over."""
    while True:
        offer: list[Lease | Wait | None] = [ray.get(group.ledger.lease.remote(group.name)) if leader else None]
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


def _score_lease(lease: Lease, scorer: Scorer, ledger: Any, leader: bool) -> None:
    """Score a lease in order, committing as rows pile up."""
    rows: list[Row] = []
    committed = time.monotonic()
    for example in lease.examples:
        rows.append(scorer.score(example).row())
        last = example is lease.examples[-1]
        if leader and (last or time.monotonic() - committed > COMMIT_S):
            ray.get(ledger.commit.remote(lease.id, rows))
            rows, committed = [], time.monotonic()
