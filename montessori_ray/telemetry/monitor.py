"""Watches a running stage from the driver: console, events, Ray metrics and tracker, a few times a second.

Nothing here may cost work: what fails is told once, and the stage goes on.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from typing import Any, Self

import psutil
import ray
from ray.exceptions import GetTimeoutError
from ray.util.metrics import Gauge

from montessori_ray.telemetry.console import Console
from montessori_ray.telemetry.events import EventLog
from montessori_ray.telemetry.progress import Progress
from montessori_ray.telemetry.trackers import Tracker

POLL_SECONDS = 0.5
EVENT_SECONDS = 5.0
READ_SECONDS = 10.0
JOIN_SECONDS = 12.0
"""Longer than a read waits for the board; a tracker whose server hangs is not waited for."""

MEMORY_AT_START = psutil.virtual_memory().total - psutil.virtual_memory().available


class StageMonitor:
    """Context manager around the body of a stage; raises nothing once the body began."""

    def __init__(
        self, stage: str, board: Any, console: Console, events: EventLog, tracker: Tracker, *, run: str
    ) -> None:
        self.peak_memory_gb = 0.0
        """`Manifest.peak_memory_gb`."""
        self._stage = stage
        self._run = run
        self._board = board
        self._console = console
        self._events = events
        self._tracker = tracker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stage-monitor", daemon=True)
        self._last_event = 0.0
        self._gauges = {} if board is None else _gauges()
        self._asked: Any = None
        """A read that the board has not answered yet: its metric points come with that answer alone."""
        self._failed = False

    def __enter__(self) -> Self:
        self._console.started(self._stage)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._stop.set()
            self._thread.join(timeout=JOIN_SECONDS)
            if exception[0] is None and not self._thread.is_alive():
                self._try_read()
        finally:
            with suppress(Exception):  # a terminal that went away
                self._console.stopped()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._try_read()

    def _try_read(self) -> None:
        """`_read`, whatever happens in it.

        A busy machine makes Ray's answer late (`GetTimeoutError`), the board's actor dies with its node, a disk is
        full, and trackers raise types of their own when their server is away. None of that is a reason to stop
        watching, nor to lose work of the body that is not committed yet, so all is caught, and told once a stage.
        """
        try:
            self._read()
        except Exception as error:
            if not self._failed:
                self._failed = True
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        reason = (str(error).strip() or "-").splitlines()[0]
        sentence = (
            f"a look at the progress of {self._stage} failed ({type(error).__name__}: {reason}); the stage goes on, "
            "its curves may have gaps"
        )
        with suppress(Exception):  # the console may be what failed
            self._console.note(sentence)
        with suppress(Exception):  # or the disk
            self._events.write("note", text=sentence)

    def _read(self) -> None:
        memory = psutil.virtual_memory()
        used = max(0, memory.total - memory.available - MEMORY_AT_START) / 1e9
        self.peak_memory_gb = round(max(self.peak_memory_gb, used), 2)
        if self._board is None:
            return
        progress, rate = self._ask_board()
        self._write_event(progress, rate)  # first: the report's curves come from the events
        self._console.progress(self._stage, progress, rate)
        left = max(0.0, progress.total - progress.done) / rate if progress.total and rate else None
        values = {
            "done": progress.done, "total": progress.total, "groups": progress.groups, "rate": rate,
            "seconds_left": left,
        }  # fmt: skip
        for name, gauge in self._gauges.items():
            gauge.set(values[name] or 0, tags={"stage": self._stage, "run": self._run})
        for step, points in groupby(progress.curves, key=itemgetter(0)):
            self._tracker.log(self._stage, step, {name: value for _, name, value in points})

    def _ask_board(self) -> tuple[Progress, float | None]:
        """Progress and rate; an answer that is late is waited for again at the next read."""
        asked, self._asked = self._asked or self._board.read.remote(self._stage), None
        try:
            answer: tuple[Progress, float | None] = ray.get(asked, timeout=READ_SECONDS)
        except GetTimeoutError:
            self._asked = asked
            raise
        return answer

    def _write_event(self, progress: Progress, rate: float | None) -> None:
        points = [{"step": step, name: value} for step, name, value in progress.curves]
        if points:
            self._events.write("metrics", stage=self._stage, points=points)
        if progress.done and time.monotonic() - self._last_event >= EVENT_SECONDS:
            self._last_event = time.monotonic()
            self._events.write(
                "progress", stage=self._stage, done=progress.done, total=progress.total, unit=progress.unit,
                rate=rate, note=progress.note,
            )  # fmt: skip


def _gauges() -> dict[str, Gauge]:
    """Metrics on the Ray dashboard and in Prometheus, one time series a stage of a run."""
    described = {
        "done": "units done", "total": "units planned", "rate": "units a second", "groups": "scoring groups at work",
        "seconds_left": "seconds left",
    }  # fmt: skip
    return {
        name: Gauge(f"montessori_stage_{name}", description=f"{text} in a stage", tag_keys=("stage", "run"))
        for name, text in described.items()
    }
