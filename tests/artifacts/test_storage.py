"""Storage: all of a file or nothing, on a disk and in a bucket, whatever is killed, full or forbidden."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors import SafetensorError

from montessori_ray.artifacts.storage import TEMPORARY, Storage, in_job_copy, rows_of
from montessori_ray.errors import ModelError, RunError

TABLE = pa.table({"id": ["a", "b"], "score": [0.5, None]})


@pytest.fixture
def bucket() -> Iterator[Storage]:
    """fsspec's memory file system in place of an object store."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield Storage("memory://bucket/run")
    MemoryFileSystem.store.clear()


@pytest.fixture(params=["folder", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, bucket: Storage) -> Storage:
    return Storage(str(tmp_path / "run")) if request.param == "folder" else bucket


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# -- the same everywhere --------------------------------------------------------------------------------------------


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write("deep/folder/file", b"first")
    storage.write("deep/folder/file", b"second")
    assert storage.read("deep/folder/file") == b"second"
    assert storage.exists("deep/folder/file")
    assert storage.exists("deep")
    assert not storage.exists("deep/other")
    assert storage.digest("deep/folder/file") == hashlib.sha256(b"second").hexdigest()


def test_entries_are_sorted_names(storage: Storage) -> None:
    for name in ("z", "a", "m/inner"):
        storage.write(f"folder/{name}", b"")
    assert storage.entries("folder") == ["a", "m", "z"]
    assert storage.entries("absent") == []


def test_remove_takes_files_and_folders_and_minds_nothing_absent(storage: Storage) -> None:
    for name in ("folder/a", "folder/below/b", "kept"):
        storage.write(name, b"x")
    storage.remove("folder")
    storage.remove("absent")
    assert not storage.exists("folder")
    storage.remove("kept")
    assert not storage.exists("kept")


def test_table_round_trip_and_digest_of_its_file(storage: Storage) -> None:
    storage.write_table("set/part-0.parquet", TABLE)
    assert storage.digest("set/part-0.parquet") == hashlib.sha256(storage.read("set/part-0.parquet")).hexdigest()
    assert storage.read_table("set/part-0.parquet").equals(TABLE)
    assert storage.read_table("set/part-0.parquet", ["score"]).column_names == ["score"]
    assert rows_of(TABLE) == [{"id": "a", "score": 0.5}, {"id": "b", "score": None}]


def test_equal_tables_have_equal_digests(storage: Storage) -> None:
    storage.write_table("one", TABLE)
    storage.write_table("two", TABLE.slice(0))
    assert storage.digest("one") == storage.digest("two")


def test_sweep_removes_what_killed_writers_left_and_nothing_else(storage: Storage) -> None:
    for name in (f"{TEMPORARY}part-0.parquet.1234", "part-0.parquet", "begun.json"):
        storage.write(f"set/{name}", b"x")
    storage.sweep("set")
    storage.sweep("absent")
    assert storage.entries("set") == ["begun.json", "part-0.parquet"]


def test_folder_writer_and_local_folder_carry_a_model(storage: Storage, tmp_path: Path) -> None:
    with storage.folder_writer("model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "below").mkdir()
        (folder / "below/weights").write_bytes(b"\x00\x01")
    assert storage.read("model/below/weights") == b"\x00\x01"
    local = storage.local_folder("model", tmp_path / "cache")
    assert (local / "config.json").read_text() == "{}"
    assert (local / "below/weights").read_bytes() == b"\x00\x01"
    assert storage.local_folder("model", tmp_path / "cache") == local


def test_a_folder_writer_that_fails_uploads_nothing(bucket: Storage) -> None:
    def save() -> None:
        with bucket.folder_writer("model") as folder:
            (folder / "weights").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save()
    assert not bucket.exists("model")


def test_unknown_kind_of_url() -> None:
    with pytest.raises(RunError, match=r"cannot open nosuch://bucket/run: .*; give a folder or a URL fsspec knows"):
        Storage("nosuch://bucket/run")


def test_only_paths_of_the_machine_are_local(bucket: Storage, tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).is_local
    assert Storage(f"file://{tmp_path}").path("a/b") == f"{tmp_path}/a/b"
    assert not bucket.is_local
    assert bucket.path("") == "/bucket/run"


# -- kills ----------------------------------------------------------------------------------------------------------

WRITE_AND_DIE = """
import os, signal, sys
from montessori_ray.artifacts.storage import Storage
storage = Storage(sys.argv[1])
storage.write("file", b"old")
setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
storage.write("file", b"new" * 1000)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    """Killed when the bytes are written but not synced, and when they are synced but nameless."""
    process = run_python(WRITE_AND_DIE, tmp_path, moment)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    storage = Storage(str(tmp_path))
    assert storage.read("file") == b"old"
    left = [name for name in storage.entries("") if name != "file"]
    assert len(left) == 1
    assert left[0].startswith(TEMPORARY)
    storage.sweep("")
    assert storage.entries("") == ["file"]


WRITE_FOR_EVER = """
import sys
from montessori_ray.artifacts.storage import Storage
storage, number = Storage(sys.argv[1]), 0
while True:
    storage.write("file", bytes([number % 251]) * 300_000)
    if number == 0:
        print("writing", flush=True)
    number += 1
"""


def test_a_reader_beside_a_writer_sees_whole_files_before_and_after_its_kill(tmp_path: Path) -> None:
    process = run_python(WRITE_FOR_EVER, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    storage, versions = Storage(str(tmp_path)), set()

    def look() -> None:
        content = storage.read("file")
        assert len(content) == 300_000
        assert content == content[:1] * len(content)
        versions.add(content[0])

    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        look()
    process.kill()
    process.communicate()
    look()
    assert len(versions) > 1


# -- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=r"no space left to write .*/file: free some and give the same command again"
        ):
            storage.write("file", b"new")
    assert storage.entries("") == ["file"]
    assert storage.read("file") == b"old"
    storage.write("file", b"new")
    assert storage.read("file") == b"new"


def test_a_full_disk_under_another_librarys_error_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of tensors and copies of folders fail in types of their own, without the system's number."""
    storage = Storage(str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    for free, error in ((0, RunError), (1 << 30, SafetensorError)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        said = "header" if free else "no space left to write .*/model"
        with pytest.raises(error, match=said), storage.folder_writer("model"):
            raise SafetensorError("header")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(ModelError, match="too large"), storage.folder_writer("model"):
        raise ModelError("too large")


def test_a_read_only_file_system_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(RunError, match="its file system is read-only; choose another `run`"),
        Storage(str(tmp_path)).folder_writer("model"),
    ):
        pytest.fail("a folder was made")


def test_a_jobs_copy_of_the_working_directory_is_known_by_its_path() -> None:
    """As Ray 2.60 unpacks a local folder and a remote archive."""
    resources = Path("/tmp/ray/session_1/runtime_resources/working_dir_files")
    assert in_job_copy(resources / "_ray_pkg_0a1b/configs")
    assert in_job_copy(resources / "s3_bucket_code")
    assert not in_job_copy(Path("/home/me/working_dir/runs"))


def test_other_faults_are_not_disguised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        Storage(str(tmp_path)).write("file", b"new")
    assert list(tmp_path.iterdir()) == []


FORBIDDEN = """
import os, sys
from montessori_ray.artifacts.storage import Storage
from montessori_ray.errors import ModelError, RunError
storage = Storage(sys.argv[1])
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)  # root may write anywhere, nobody may not
for act in (lambda: storage.write("new", b"x"), lambda: storage.write("deep/new", b"x"), lambda: storage.remove("file"),
            lambda: storage.folder_writer("model").__enter__()):
    try:
        act()
    except RunError as error:
        print(error)
"""


def test_no_permission_is_said() -> None:
    with TemporaryDirectory() as folder:  # not pytest's, which others may not even enter
        Path(folder).chmod(0o755)
        storage = Storage(f"{folder}/run")
        storage.write("file", b"x")
        (Path(folder) / "run").chmod(0o555)
        output, errors = run_python(FORBIDDEN, storage.root).communicate()
        (Path(folder) / "run").chmod(0o755)
        said = output.splitlines()
        assert len(said) == 4, errors
        for name, line in zip(("new", "deep/new", "file", "model"), said, strict=True):
            assert line == f"no permission to write {storage.root}/{name}: choose another `run` or change its owner"
        assert storage.entries("") == ["file"]


def test_a_file_in_place_of_the_run_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError):
        Storage(str(tmp_path / "run")).write("config.yaml", b"x")
