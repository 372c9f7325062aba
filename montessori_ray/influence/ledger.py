"""Which probing examples are waiting, out on lease, or scored: the book that makes scoring survive deaths.

The ledger holds only what is open: an example comes in with `extend`, goes out on leases until one group has committed
its row, and is forgotten when the driver has drained that row. So it never grows with the data set, and a row that
comes in a second time (from a lease that had been given up) is recognised by its example not being open any more.

The ledger itself may die and start empty, and any call may run twice or its answer be lost. Nothing depends on it: the
driver keeps what it has handed over until the row is there (`Outstanding`) and hands it over again.

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

ALONE_DEATHS = 2
"""Deaths of a group with one example and no other, after which the example is given up: it, not the machine, is the
cause. With the death that made it a suspect these are three, as many as `score.max_group_failures` lets a group
survive."""


class Wait(Enum):
    """Nothing to hand out now, but a lease elsewhere may still come back, or the driver may send more."""

    WAIT = "wait"


WAIT = Wait.WAIT


@dataclass(frozen=True, slots=True)
class Lease:
    """Probing examples given to a scoring group."""

    id: int
    examples: tuple[Row, ...]
    alone: bool = False
    """A single example: the group asks for nothing else before its row is committed, so that a death is due to it, or
    to the machine."""


@dataclass(slots=True)
class _Out:
    """A lease that is out: who has it, what is not yet committed, when it runs out."""

    group: str
    open_ids: list[str]
    deadline: float
    alone: bool


class Ledger:
    """Leases over open probing examples.

    Every example that is added is drained once, whatever group dies or comes late. A lease ends when its last row is
    committed; it is returned to the front of the queue when its deadline passes (each commit on it postpones the
    deadline).

    When its group is released its examples are suspects: which of them the group died over is not known, as rows of
    finished ones may have been on their way. Suspects go out before others, one by one: a death then has one cause,
    unless it is the machine. So they go to groups that are trusted: a group that has scored nothing since it began, or
    died, is first given an example that was scored before.
    """

    def __init__(
        self,
        lease_size: int,
        lease_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        first_lease: int = 0,
    ) -> None:
        """`first_lease`: number of the first lease; another one for every life of a ledger, so that what is committed
        on a lease of an earlier life is taken for no other."""
        self._lease_size = lease_size
        self._timeout = lease_timeout_s
        self._clock = clock
        self._open: dict[str, Row] = {}
        self._pending: deque[str] = deque()
        self._suspects: deque[str] = deque()
        self._out: dict[int, _Out] = {}
        self._deaths: Counter[str] = Counter()
        self._finished: dict[str, Row] = {}
        self._next_lease = first_lease
        self._late: set[str] = set()
        self._trusted: set[str] = set()
        self._scored: Row | None = None
        self._over_one: set[str] = set()
        self._closed = False

    def extend(self, examples: Sequence[Row]) -> None:
        """Add examples (rows with an `example_id`) to the end of the queue; the ledger passes over those it has."""
        for example in examples:
            example_id = example["example_id"]
            if example_id not in self._open and example_id not in self._finished:
                self._open[example_id] = example
                self._pending.append(example_id)

    def close(self) -> None:
        """Scoring is over: groups are sent home."""
        self._closed = True

    def backlog(self) -> int:
        """Examples that wait for a lease (leases given up while their rows came in late count until passed over)."""
        return len(self._pending) + len(self._suspects)

    def open(self) -> int:
        """Examples without a row yet."""
        return len(self._open)

    def late(self) -> set[str]:
        """Groups that let a lease run out and have not asked for another since: slow, hung or gone."""
        self._return_expired()
        return set(self._late)

    def over_one(self) -> set[str]:
        """Groups that died, at least once, over one example and no other while they were trusted (or there was nothing
        to try them with): an example's fault rather than theirs."""
        return set(self._over_one)

    def lease(self, group: str) -> Lease | Wait | None:
        """The next examples for `group`; WAIT when there is none at the moment; None when scoring is over."""
        self._late.discard(group)
        if self._closed:
            return None
        self._return_expired()
        while self._suspects and self._suspects[0] not in self._open:
            self._suspects.popleft()  # its row came in after all
        alone = bool(self._suspects)
        if alone and self._held_by(group):
            return WAIT
        examples = self._single(group) if alone else self._take(self._pending, self._lease_size)
        if not examples:
            return WAIT
        lease = Lease(self._next_lease, tuple(examples), alone)
        self._next_lease += 1
        ids = [example["example_id"] for example in examples]
        self._out[lease.id] = _Out(group, ids, self._clock() + self._timeout, alone)
        return lease

    def _single(self, group: str) -> list[Row]:
        """A suspect for a trusted group. For another one an example that was scored before, or else the last that
        waits, since what kills groups often comes together."""
        if group in self._trusted:
            return self._take(self._suspects, 1)
        if self._scored is not None:
            return [self._scored]
        self._pending.rotate()
        return self._take(self._pending, 1) or self._take(self._suspects, 1)

    def commit(self, lease_id: int, rows: Sequence[Row]) -> None:
        """Take in rows (each with an `example_id`) of a lease, even of one that has run out; duplicates are dropped."""
        for row in rows:
            if (example := self._open.pop(row["example_id"], None)) is not None:
                self._deaths.pop(row["example_id"], None)
                self._finished[row["example_id"]] = row
                self._scored = self._scored if row.get("quarantine") else example
        out = self._out.get(lease_id)
        if out is not None:
            if rows:
                self._trusted.add(out.group)
            out.deadline = self._clock() + self._timeout
            out.open_ids = [example_id for example_id in out.open_ids if example_id in self._open]
            if not out.open_ids:
                del self._out[lease_id]

    def release(self, group: str) -> None:
        """Take the leases of a group that died back: their examples are suspects, and one it died over alone too often
        is quarantined."""
        self._late.discard(group)
        leases = [self._out.pop(lease_id) for lease_id in self._held_by(group)]
        for lease in leases:
            self._suspects.extend(id_ for id_ in lease.open_ids if id_ in self._open)
        believed = group in self._trusted or not (self._scored or self._pending)
        if len(leases) == 1 and leases[0].alone and believed:
            self._over_one.add(group)
            self._count_death(leases[0].open_ids[0])
        self._trusted.discard(group)

    def drain(self) -> list[Row]:
        """Rows that came in since the last call; each is handed over once."""
        rows, self._finished = list(self._finished.values()), {}
        return rows

    def _take(self, queue: deque[str], count: int) -> list[Row]:
        taken: list[Row] = []
        while queue and len(taken) < count:
            example = self._open.get(queue.popleft())
            if example is not None:
                taken.append(example)
        return taken

    def _held_by(self, group: str) -> list[int]:
        return [lease_id for lease_id, out in self._out.items() if out.group == group]

    def _return_expired(self) -> None:
        now = self._clock()
        for lease_id in [lease_id for lease_id, out in self._out.items() if out.deadline <= now]:
            out = self._out.pop(lease_id)
            self._late.add(out.group)
            (self._suspects if out.alone else self._pending).extendleft(reversed(out.open_ids))

    def _count_death(self, example_id: str) -> None:
        if example_id not in self._open:
            return
        self._deaths[example_id] += 1
        if self._deaths[example_id] >= ALONE_DEATHS:
            reason = f"its scoring group died {ALONE_DEATHS} times while scoring it and nothing else"
            self._open.pop(example_id)
            del self._deaths[example_id]
            self._finished[example_id] = Score(example_id=example_id, quarantine=reason).row()


class Outstanding:
    """The driver's side of the book: examples it has handed to the ledger and has no row of yet.

    What the ledger knows is a part of it, except where a ledger died or an answer got lost on the way.
    """

    def __init__(self) -> None:
        self._examples: dict[str, Row] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def add(self, examples: Iterable[Row]) -> None:
        """Examples are handed over."""
        self._examples.update((example["example_id"], example) for example in examples)

    def take(self, rows: Iterable[Row]) -> list[Row]:
        """Those of the rows that are waited for: of each example the first, and no other."""
        return [row for row in rows if self._examples.pop(row["example_id"], None) is not None]

    def lost(self, open_: int) -> list[Row]:
        """What must be handed over again to a ledger that has `open_` open examples; it passes over those it has."""
        return list(self._examples.values()) if open_ < len(self._examples) else []
