"""Which probing examples are waiting, out on lease, or scored: the book that makes scoring survive deaths.

The ledger holds only what is open: an example comes in with `extend`, goes out on leases until one group has committed
its row, and is forgotten when the driver has drained that row. So it never grows with the data set, and a row that
comes in a second time (from a lease that had been given up) is recognised by its example not being open any more.

Plain Python; `ledger_actor.LedgerActor` puts it behind Ray.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from montessori_ray.influence.score import Score

Row = dict[str, Any]

MAX_DEATHS = 3
"""Deaths of a group over one example after which the example is given up: it, not the machine, is the cause."""


class Wait(Enum):
    """Nothing to hand out now, but a lease elsewhere may still come back, or the driver may send more."""

    WAIT = "wait"


WAIT = Wait.WAIT


@dataclass(frozen=True, slots=True)
class Lease:
    """Probing examples given to a scoring group."""

    id: int
    examples: tuple[Row, ...]


@dataclass(slots=True)
class _Out:
    """A lease that is out: who has it, what is not yet committed, when it runs out."""

    group: str
    open_ids: list[str]
    deadline: float


class Ledger:
    """Leases over open probing examples.

    Every example that is added is drained exactly once, whatever dies or comes late. A lease ends when its last row is
    committed; it is returned to the front of the queue when its deadline passes (each commit on it postpones the
    deadline) or its group is released.
    """

    def __init__(self, lease_size: int, lease_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_size = lease_size
        self._timeout = lease_timeout_s
        self._clock = clock
        self._open: dict[str, Row] = {}
        self._pending: deque[str] = deque()
        self._out: dict[int, _Out] = {}
        self._deaths: Counter[str] = Counter()
        self._finished: list[Row] = []
        self._leases = 0
        self._complete = False

    def extend(self, examples: Sequence[Row]) -> None:
        """Add examples (rows with an `example_id` that was not added before) to the end of the queue."""
        assert not self._complete, "extend after complete"
        for example in examples:
            assert example["example_id"] not in self._open, f"{example['example_id']} added twice"
            self._open[example["example_id"]] = example
            self._pending.append(example["example_id"])

    def complete(self) -> None:
        """No example will be added any more: groups are sent home once all are scored."""
        self._complete = True

    def backlog(self) -> int:
        """Examples that wait for a lease (leases given up while their rows came in late count until passed over)."""
        return len(self._pending)

    def open(self) -> int:
        """Examples without a row yet."""
        return len(self._open)

    def lease(self, group: str) -> Lease | Wait | None:
        """The next examples for `group`; WAIT when there is none at the moment; None when scoring is over."""
        self._return_expired()
        ids = self._take()
        if not ids:
            return None if self._complete and not self._open else WAIT
        self._leases += 1
        self._out[self._leases] = _Out(group, ids, self._clock() + self._timeout)
        return Lease(self._leases, tuple(self._open[example_id] for example_id in ids))

    def commit(self, lease_id: int, rows: Iterable[Row]) -> None:
        """Take in rows (each with an `example_id`) of a lease, even of one that has run out; duplicates are dropped."""
        for row in rows:
            if self._open.pop(row["example_id"], None) is not None:
                self._deaths.pop(row["example_id"], None)
                self._finished.append(row)
        out = self._out.get(lease_id)
        if out is not None:
            out.deadline = self._clock() + self._timeout
            out.open_ids = [example_id for example_id in out.open_ids if example_id in self._open]
            if not out.open_ids:
                del self._out[lease_id]

    def release(self, group: str) -> None:
        """Return the leases of a group that died; an example it died over too often is quarantined."""
        held = [lease_id for lease_id, out in self._out.items() if out.group == group]
        ids = [id_ for lease_id in held for id_ in self._out[lease_id].open_ids if id_ in self._open]
        for lease_id in reversed(held):
            self._return(lease_id)
        if ids:
            self._count_death(ids[0])

    def drain(self) -> list[Row]:
        """Rows that came in since the last call; each is handed over once."""
        rows, self._finished = self._finished, []
        return rows

    def _take(self) -> list[str]:
        ids: list[str] = []
        while self._pending and len(ids) < self._lease_size:
            example_id = self._pending.popleft()
            if example_id in self._open:
                ids.append(example_id)
        return ids

    def _return_expired(self) -> None:
        now = self._clock()
        for lease_id in [lease_id for lease_id, out in self._out.items() if out.deadline <= now]:
            self._return(lease_id)

    def _return(self, lease_id: int) -> None:
        self._pending.extendleft(reversed(self._out.pop(lease_id).open_ids))

    def _count_death(self, example_id: str) -> None:
        """Groups score leases, and each lease, in order: the first open example is the one a group died over."""
        self._deaths[example_id] += 1
        if self._deaths[example_id] >= MAX_DEATHS:
            reason = f"its scoring group died {MAX_DEATHS} times while scoring it"
            self._open.pop(example_id)
            del self._deaths[example_id]
            self._finished.append(Score(example_id=example_id, quarantine=reason).row())
