"""The monitor of a stage: it shows what the board says, and whatever fails in it costs the stage nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from montessori_ray.artifacts.storage import Storage
from montessori_ray.errors import RunError
from montessori_ray.telemetry import monitor as monitor_module
from montessori_ray.telemetry.events import EventLog, read_events
from montessori_ray.telemetry.monitor import StageMonitor
from montessori_ray.telemetry.progress import Progress

Reply = Callable[[], tuple[Progress, float | None]]


class Told:
    """A console and a tracker that remember what they are told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stops = 0
        self.shown: list[int] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def started(self, stage: str) -> None: ...

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def progress(self, stage: str, progress: Progress, rate: float | None) -> None:
        self.shown.append(progress.done)

    def stopped(self) -> None:
        self.stops += 1

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.logged.append((step, metrics))


class Watched:
    """A monitor over a board whose replies are given, one a read; the last one is given again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *replies: Reply) -> None:
        self.told = Told()
        self.storage = Storage(str(folder))
        self.asked = 0
        """Reads that the board was asked for."""
        self._replies = list(replies)
        self._reads = 0
        self._enough = threading.Event()
        self._awaited = 10**9
        monkeypatch.setattr(monitor_module, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(monitor_module, "ray", SimpleNamespace(get=self._get))
        monkeypatch.setattr(monitor_module, "_gauges", dict)
        board = SimpleNamespace(read=SimpleNamespace(remote=self._ask))
        told: Any = self.told
        self.monitor = StageMonitor("warm_up", board, told, EventLog(self.storage), told, run="first")

    def wait(self, reads: int) -> None:
        """Until so many reads were tried."""
        self._awaited = reads
        assert self._enough.wait(20)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.storage) if event["event"] == kind]

    def _ask(self, stage: str) -> int:
        self.asked += 1
        return self.asked

    def _get(self, asked: int, timeout: float) -> tuple[Progress, float | None]:
        self._reads += 1
        if self._reads >= self._awaited:
            self._enough.set()
        return (self._replies.pop(0) if len(self._replies) > 1 else self._replies[0])()


def fails(error: Exception) -> Reply:
    def reply() -> tuple[Progress, float | None]:
        raise error

    return reply


def says(done: int, *curves: tuple[int, str, float]) -> Reply:
    return lambda: (Progress(done=done, curves=list(curves)), None)


@pytest.mark.parametrize(
    "error",
    [GetTimeoutError("late\nand more"), ActorDiedError(), ConnectionError("no route to mlflow"), ValueError()],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_read_is_told_once_and_the_next_ones_follow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    watched = Watched(monkeypatch, tmp_path, fails(error), fails(error), says(7))
    with watched.monitor:
        watched.wait(5)
    (note,) = watched.told.notes
    assert f"progress of warm_up failed ({type(error).__name__}: " in note
    assert "\n" not in note
    assert [event["text"] for event in watched.events("note")] == [note]
    assert watched.told.shown[-1] == 7
    assert watched.told.stops == 1


def test_a_stage_whose_last_read_fails_is_finished_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, fails(ActorDiedError()))
    monkeypatch.setattr(monitor_module, "POLL_SECONDS", 60)
    with watched.monitor:
        pass
    assert (len(watched.told.notes), watched.told.stops) == (1, 1)
    assert watched.monitor.peak_memory_gb >= 0


def test_the_body_s_own_error_is_the_one_that_is_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, tmp_path, fails(GetTimeoutError("late")))

    def broken_terminal() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(watched.told, "stopped", broken_terminal)

    def stage() -> None:
        with watched.monitor:
            watched.wait(2)
            raise RunError("the body's")

    with pytest.raises(RunError, match="the body's"):
        stage()
    assert len(watched.told.notes) == 1


def test_what_cannot_be_told_either_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, tmp_path, fails(GetTimeoutError("late")))

    def broken_terminal(sentence: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(watched.told, "note", broken_terminal)
    with watched.monitor:
        watched.wait(2)
    assert watched.told.stops == 1
    assert len(watched.events("note")) == 1


def test_points_are_in_the_events_when_the_tracker_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, tmp_path, says(1, (1, "loss", 2.5)), says(1))

    def away(stage: str, step: int, metrics: dict[str, float]) -> None:
        raise ConnectionError("no route to mlflow")

    monkeypatch.setattr(watched.told, "log", away)
    with watched.monitor:
        watched.wait(2)
    assert [event["points"] for event in watched.events("metrics")] == [[{"step": 1, "loss": 2.5}]]
    assert "ConnectionError: no route to mlflow" in watched.told.notes[0]


def test_a_late_answer_is_waited_for_since_its_points_are_handed_over_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, fails(GetTimeoutError("late")), says(1, (1, "loss", 2.5)))
    monkeypatch.setattr(monitor_module, "POLL_SECONDS", 60)
    watched.monitor._try_read()
    watched.monitor._try_read()
    assert watched.asked == 1
    assert watched.told.logged == [(1, {"loss": 2.5})]
    watched.monitor._try_read()
    assert watched.asked == 2


def test_memory_is_the_most_in_use_on_the_node_over_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched = Watched(monkeypatch, tmp_path, says(1))
    monkeypatch.setattr(monitor_module, "MEMORY_AT_START", 3 * 10**9)
    for available in (4, 1, 6):
        memory = SimpleNamespace(total=8 * 10**9, available=available * 10**9)
        monkeypatch.setattr(monitor_module, "psutil", SimpleNamespace(virtual_memory=lambda memory=memory: memory))
        watched.monitor._try_read()
    assert watched.monitor.peak_memory_gb == 4.0
