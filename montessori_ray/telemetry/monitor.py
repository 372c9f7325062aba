"""Watches a running stage from the driver: console, events, Ray metrics and tracker, a few times a second."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

import psutil
import ray
from ray.util.metrics import Gauge

from montessori_ray.telemetry.console import Console
from montessori_ray.telemetry.events import EventLog
from montessori_ray.telemetry.progress import Progress
from montessori_ray.telemetry.trackers import Tracker

POLL_SECONDS = 0.5
EVENT_SECONDS = 5.0
MEMORY_AT_START = psutil.virtual_memory().total - psutil.virtual_memory().available


class StageMonitor:
    """Context manager around the body of a stage."""

    def __init__(self, stage: str, board: Any, console: Console, events: EventLog, tracker: Tracker) -> None:
        self.peak_memory_gb = 0.0
        self._stage = stage
        self._board = board
        self._console = console
        self._events = events
        self._tracker = tracker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stage-monitor", daemon=True)
        self._last_event = 0.0
        self._gauges = {} if board is None else _gauges()

    def __enter__(self) -> Self:
        self._console.started(self._stage)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if exception[0] is None:
            self._read()
        self._console.stopped()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        memory = psutil.virtual_memory()
        used = max(0, memory.total - memory.available - MEMORY_AT_START) / 1e9
        self.peak_memory_gb = round(max(self.peak_memory_gb, used), 2)
        if self._board is None:
            return
        progress, rate = ray.get(self._board.read.remote(self._stage), timeout=10)
        self._console.progress(self._stage, progress, rate)
        left = (progress.total - progress.done) / rate if progress.total and rate else None
        values = {
            "done": progress.done, "total": progress.total, "groups": progress.groups, "rate": rate,
            "seconds_left": left,
        }  # fmt: skip
        for name, gauge in self._gauges.items():
            gauge.set(values[name] or 0, tags={"stage": self._stage})
        for step, name, value in progress.curves:
            self._tracker.log(self._stage, step, {name: value})
        self._write_event(progress, rate)

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
    """Metrics on the Ray dashboard and in Prometheus, one time series a stage."""
    described = {
        "done": "units done", "total": "units planned", "rate": "units a second", "groups": "scoring groups at work",
        "seconds_left": "seconds left",
    }  # fmt: skip
    return {
        name: Gauge(f"montessori_stage_{name}", description=f"{text} in a stage", tag_keys=("stage",))
        for name, text in described.items()
    }
