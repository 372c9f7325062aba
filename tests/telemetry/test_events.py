"""The event log: appended, readable at any moment, and no worse for a kill in the middle of a line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_ray.artifacts.storage import Storage
from montessori_ray.errors import RunError
from montessori_ray.telemetry.events import EVENTS, EventLog, read_events


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def bucket() -> Iterator[Storage]:
    MemoryFileSystem.store.clear()
    yield Storage("memory://bucket/run")
    MemoryFileSystem.store.clear()


def kinds(storage: Storage) -> list[str]:
    return [event["event"] for event in read_events(storage)]


def test_events_carry_their_kind_fields_and_time(folder: Storage) -> None:
    before = time.time()
    log = EventLog(folder)
    log.write("note", text="two\nlines \u2028 \u00e9", path=Path("/a"), nothing=None, points=[{"step": 1}])
    [event] = read_events(folder)
    assert before - 0.001 <= event.pop("time") <= time.time() + 0.001
    assert event == {
        "event": "note",
        "text": "two\nlines \u2028 \u00e9",
        "path": "/a",
        "nothing": None,
        "points": [{"step": 1}],
    }


def test_a_run_without_events_has_none(folder: Storage, bucket: Storage) -> None:
    assert kinds(folder) == kinds(bucket) == []


def test_every_event_is_readable_at_once_and_later_sessions_append(folder: Storage) -> None:
    first = EventLog(folder)
    first.write("one")
    assert kinds(folder) == ["one"]
    first.write("two")
    EventLog(folder).write("three")
    assert kinds(folder) == ["one", "two", "three"]


def test_a_bucket_has_them_after_a_flush_and_later_sessions_append(bucket: Storage) -> None:
    first = EventLog(bucket)
    first.write("one")
    first.write("two")
    assert kinds(bucket) == []
    first.flush()
    assert kinds(bucket) == ["one", "two"]
    second = EventLog(bucket)
    second.write("three")
    second.flush()
    second.flush()
    assert kinds(bucket) == ["one", "two", "three"]


def cut_last_line(storage: Storage, length: int) -> None:
    """Leave `length` bytes of the last line, as a kill in the middle of a write does."""
    lines = storage.read(EVENTS).splitlines(keepends=True)
    storage.write(EVENTS, b"".join(lines[:-1]) + lines[-1][:length])


@settings(deadline=None)
@given(length=st.integers(0, 40))
def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("run")))
    log = EventLog(storage)
    for kind in ("one", "two", "a_long_kind_of_event"):
        log.write(kind, text="\u00e9" * 20)
    cut_last_line(storage, length)
    assert kinds(storage) == ["one", "two"]


def test_bytes_that_are_no_text_are_passed_over(folder: Storage) -> None:
    EventLog(folder).write("one")
    folder.write(EVENTS, folder.read(EVENTS) + b'\xff\xfe{"event"\n')
    EventLog(folder).write("two")
    assert kinds(folder) == ["one", "two"]


def test_the_event_after_a_cut_line_is_not_lost(folder: Storage) -> None:
    log = EventLog(folder)
    log.write("one")
    log.write("two")
    cut_last_line(folder, 10)
    later = EventLog(folder)
    later.write("session_started")
    later.write("three")
    assert kinds(folder) == ["one", "session_started", "three"]


def test_a_full_disk_is_said_plainly(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    log = EventLog(folder)
    monkeypatch.setattr(folder, "path", lambda _: "/dev/full")
    with pytest.raises(RunError, match="no space left to write /dev/full"):
        log.write("one")
