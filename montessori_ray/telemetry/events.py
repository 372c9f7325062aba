"""Structured events of a run: one JSON object a line in `RUN/events.jsonl`, appended by the driver alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from montessori_ray.artifacts.storage import Storage

EVENTS = "events.jsonl"


class EventLog:
    """Appends events; a bucket, which cannot append, gets the whole file again at `flush`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lines: list[str] = []
        before = storage.read(EVENTS) if storage.exists(EVENTS) else b""
        if not storage.is_local:
            self._lines = before.decode().splitlines()
        elif before and not before.endswith(b"\n"):
            storage.append(EVENTS, "\n")  # a kill cut the last line short; the next one must not be lost with it

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event with the time it happened."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, default=str)
        if self._storage.is_local:
            self._storage.append(EVENTS, line + "\n")
        else:
            self._lines.append(line)

    def flush(self) -> None:
        """Make what was written visible to other readers."""
        if not self._storage.is_local:
            self._storage.write(EVENTS, "\n".join([*self._lines, ""]).encode())


def read_events(storage: Storage) -> Iterator[dict[str, Any]]:
    """Events so far; a line that a kill cut short is passed over."""
    if not storage.exists(EVENTS):
        return
    for line in storage.read(EVENTS).decode(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
