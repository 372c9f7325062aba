"""Progress of the running stage, from any process of the cluster to the driver.

Workers push (`ProgressChannel.update`, fire and forget), the driver pulls (`ProgressBoard.read`) a few times a second:
nothing a stage does waits for a console.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray


@dataclass(slots=True)
class Progress:
    """Where a stage stands.

    `done` and `total` count `unit`s; `curves` holds metric points as `(step, name, value)` since the last read.
    """

    done: int = 0
    total: int | None = None
    unit: str = "rows"
    note: str = ""
    groups: int = 0
    """Scoring groups at work."""
    found: int | None = None
    """Units done at the first report: those of a run that is continued."""
    first_done: int | None = None
    """Units done at the first report with more than that; from then on there is a rate."""
    first_time: float = 0.0
    curves: list[tuple[int, str, float]] = field(default_factory=list)

    def reach(self, done: int) -> None:
        """So many units are done."""
        if self.found is None:
            self.found = done
        elif self.first_done is None and done > self.found:
            self.first_done, self.first_time = done, time.monotonic()
        self.done = done

    def rate(self) -> float | None:
        """Units a second since the first were done, so that starting workers does not count; None until more are."""
        if self.first_done is None or self.done <= self.first_done:
            return None
        return (self.done - self.first_done) / max(time.monotonic() - self.first_time, 1e-9)


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the latest progress of each stage; one per run, owned by the driver."""

    def __init__(self) -> None:
        self._stages: dict[str, Progress] = {}

    def update(
        self,
        stage: str,
        done: int,
        total: int | None,
        unit: str,
        note: str,
        groups: int,
        metrics: dict[str, float],
    ) -> None:
        """Record that `done` of `total` are finished and append metric points at step `done`."""
        progress = self._stages.setdefault(stage, Progress())
        progress.reach(done)
        progress.unit, progress.note, progress.groups = unit, note, groups
        progress.total = total if total is not None else progress.total
        progress.curves.extend((done, name, value) for name, value in metrics.items())

    def advance(self, stage: str, done: int) -> None:
        """Record that `done` more are finished: for many workers, none of which knows the whole."""
        progress = self._stages.setdefault(stage, Progress())
        progress.reach(progress.done + done)

    def read(self, stage: str) -> tuple[Progress, float | None]:
        """Progress and rate of a stage; its metric points are handed over once."""
        progress = self._stages.setdefault(stage, Progress())
        answer = replace(progress)
        progress.curves = []
        return answer, progress.rate()


@dataclass(frozen=True, slots=True)
class ProgressChannel:
    """A picklable way to the board for one stage; `board=None` drops everything (library use, tests)."""

    stage: str = ""
    board: Any = None

    def update(
        self,
        done: int,
        total: int | None = None,
        *,
        unit: str = "rows",
        note: str = "",
        groups: int = 0,
        **metrics: float,
    ) -> None:
        """Report progress and, as keyword arguments, metrics of step `done`."""
        if self.board is not None:
            self.board.update.remote(self.stage, done, total, unit, note, groups, metrics)

    def advance(self, done: int = 1) -> None:
        """Report that `done` more are finished, from one worker of many."""
        if self.board is not None:
            self.board.advance.remote(self.stage, done)
