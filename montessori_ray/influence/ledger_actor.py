"""The ledger as a Ray actor, and what the driver is told at each look.

A file that imports no torch, which would more than double the memory of the actor's process.
"""

from __future__ import annotations

import os
import time
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
    """By group that asked for a lease and did not die since: `Scorer.baselines`."""
    late: set[str]
    """Those of these groups that let a lease run out and were not heard of since."""
    over_one: set[str]
    """Groups that died over one example and no other."""
    spoilt: str | None
    """What a group said that has sent wrong rows."""

    @property
    def up(self) -> set[str]:
        """Groups that are at work."""
        return self.baselines.keys() - self.late


# Ray starts a ledger that died again, empty, and repeats the calls whose answer it has not seen; see `ledger.py`.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class LedgerActor:
    """The ledger of one scoring stage and what its groups measured first; owned by the driver."""

    def __init__(self, lease_size: int, lease_timeout_s: float) -> None:
        self._ledger = Ledger(lease_size, lease_timeout_s, first_lease=time.time_ns())
        self._baselines: dict[str, dict[str, float]] = {}
        self._spoilt: str | None = None

    def spoil(self, sentence: str) -> None:
        """A group has sent rows that are wrong."""
        self._spoilt = self._spoilt or sentence

    def release(self, group: str) -> None:
        """A group died; its leases go back."""
        self._baselines.pop(group, None)
        self._ledger.release(group)

    def lease(self, group: str, baselines: dict[str, float]) -> Lease | Wait | None:
        """`Ledger.lease`; says what the group measured every time, as the ledger may be a new one."""
        self._baselines[group] = baselines
        return self._ledger.lease(group)

    def commit(self, lease_id: int, rows: Sequence[Row]) -> None:
        self._ledger.commit(lease_id, rows)

    def extend(self, examples: Sequence[Row]) -> None:
        self._ledger.extend(examples)

    def close(self) -> None:
        self._ledger.close()

    def pid(self) -> int:
        """Process id, for measurements."""
        return os.getpid()

    def look(self) -> LedgerState:
        """The driver's look; takes the finished rows along."""
        ledger = self._ledger
        return LedgerState(
            rows=ledger.drain(), backlog=ledger.backlog(), open=ledger.open(), baselines=dict(self._baselines),
            late=ledger.late(), over_one=ledger.over_one(), spoilt=self._spoilt,
        )  # fmt: skip


def release_leases(ledger: Any, group: str) -> None:
    """Give the leases of a group that failed back; returns at once."""
    ledger.release.remote(group)
