"""The ledger as a Ray actor, and what the driver is told at each look.

A file that imports no torch, which would more than double the memory of the actor's process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from montessori_ray.influence.ledger import Lease, Ledger, Row, Wait


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the driver is told at each look."""

    rows: list[Row]
    """Rows that came in since the last look; handed over once."""
    backlog: int
    open: int
    baselines: dict[str, dict[str, float]]
    """By group that is up: `Scorer.baselines`."""


@ray.remote(num_cpus=0)
class LedgerActor:
    """The ledger of one scoring stage and what its groups measured first; owned by the driver."""

    def __init__(self, lease_size: int, lease_timeout_s: float) -> None:
        self._ledger = Ledger(lease_size, lease_timeout_s)
        self._baselines: dict[str, dict[str, float]] = {}

    def join(self, group: str, baselines: dict[str, float]) -> None:
        """A group is ready to score."""
        self._baselines[group] = baselines

    def release(self, group: str) -> None:
        """A group died; its leases go back."""
        self._baselines.pop(group, None)
        self._ledger.release(group)

    def lease(self, group: str) -> Lease | Wait | None:
        return self._ledger.lease(group)

    def commit(self, lease_id: int, rows: Sequence[Row]) -> None:
        self._ledger.commit(lease_id, rows)

    def extend(self, examples: Sequence[Row]) -> None:
        self._ledger.extend(examples)

    def complete(self) -> None:
        self._ledger.complete()

    def pid(self) -> int:
        """Process id, for measurements."""
        return os.getpid()

    def look(self) -> LedgerState:
        """The driver's look; takes the finished rows along."""
        return LedgerState(self._ledger.drain(), self._ledger.backlog(), self._ledger.open(), dict(self._baselines))


def release_leases(ledger: Any, group: str) -> None:
    """Give the leases of a group that failed back; returns at once."""
    ledger.release.remote(group)
