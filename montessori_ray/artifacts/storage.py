"""Bytes in a folder or a bucket: the few operations the run directory needs, atomic where a reader could look.

On a local (or shared POSIX) file system a write goes to a temporary name, is synced, and takes its name by rename; an
object store shows an object only when it is complete, so there the put itself is the commit.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from montessori_ray.errors import RunError, UserError

FULL = 1 << 20
"""Bytes free on a file system that is full."""

TEMPORARY = ".tmp-"
"""Prefix of names no reader looks at; what a kill leaves under it is swept by the next writer."""


class Storage:
    """A root on any fsspec file system; paths are relative to it, with `/`."""

    def __init__(self, root: str) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise RunError(f"cannot open {root}: {error}; give a folder or a URL fsspec knows (s3://, gs://)") from None

    @property
    def is_local(self) -> bool:
        """Whether paths are ordinary file paths (a shared POSIX mount counts)."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The file system's own path of `name`."""
        return f"{self.root}/{name}" if name else str(self.root)

    def url_of(self, name: str) -> str:
        """What any process opens `name` by: an ordinary path, or a URL in a bucket."""
        return self.path(name) if self.is_local else str(self.fs.unstrip_protocol(self.path(name)))

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def entries(self, name: str) -> list[str]:
        """Names in the folder `name`, sorted; empty if there is no such folder."""
        if not self.exists(name):
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.path(name), detail=False))

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return bytes(self.fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that a reader sees all of it or nothing.

        Raises:
            RunError: no permission, or no space left; nothing of the file is left behind.
        """
        target = self.path(name)
        with self.said_plainly(target):
            if self.is_local:
                _write_by_rename(Path(target), content)
            else:
                self.fs.pipe_file(target, content)

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a local file; not atomic: a kill may leave a part of it.

        Raises:
            RunError: no permission, or no space left.
        """
        with self.said_plainly(self.path(name)), self.fs.open(self.path(name), "a") as file:
            file.write(text)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all in it, if there."""
        if self.exists(name):
            with self.said_plainly(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)

    def sweep(self, name: str) -> None:
        """Remove what killed writers left in the folder `name`."""
        for entry in self.entries(name):
            if entry.startswith(TEMPORARY):
                self.remove(f"{name}/{entry}")

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table as one Parquet file, atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, sink.getvalue().to_pybytes())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file.

        Without Arrow's threads: one that still drops its reference to the Python file when the interpreter ends aborts
        the process ("terminate called without an active exception", seen in 1 of 10 exits on Python 3.11).
        """
        with self.fs.open(self.path(name), "rb") as file:
            return pq.read_table(file, columns=columns, use_threads=False, pre_buffer=False)

    def count_rows(self, name: str) -> int:
        """Rows of a Parquet file."""
        with self.fs.open(self.path(name), "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, read in chunks."""
        digest = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    @contextmanager
    def folder_writer(self, name: str) -> Iterator[Path]:
        """An ordinary folder to write into; afterwards its files are in `name` (uploaded where that is a bucket).

        Raises:
            RunError: no permission, or no space left.
        """
        with self.said_plainly(self.path(name)):
            if self.is_local:
                folder = Path(self.path(name))
                folder.mkdir(parents=True, exist_ok=True)
                with _full_is_no_space(folder):
                    yield folder
                return
            with TemporaryDirectory() as folder_name:
                with _full_is_no_space(Path(folder_name)):
                    yield Path(folder_name)
                self.fs.put(folder_name + "/", self.path(name) + "/", recursive=True)

    def local_folder(self, name: str, cache: Path) -> Path:
        """An ordinary folder with the files of `name`: itself, or a copy under `cache` where it lies in a bucket."""
        if self.is_local:
            return Path(self.path(name))
        copy = cache / hashlib.sha256(self.path(name).encode()).hexdigest()[:16]
        if not copy.exists():
            partial = copy.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            self.fs.get(self.path(name) + "/", str(partial) + "/", recursive=True)
            partial.rename(copy)
        return copy

    @contextmanager
    def said_plainly(self, target: str) -> Iterator[None]:
        """Turns the faults every long run meets into a sentence.

        Raises:
            RunError: no permission to write `target`, or no space left.
        """
        try:
            yield
        except PermissionError:
            raise RunError(f"no permission to write {target}: choose another `run` or change its owner") from None
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"cannot write {target}: {error.filename} is a file; choose another `run`") from None
        except OSError as error:
            if error.errno == errno.EROFS:
                raise RunError(f"cannot write {target}: its file system is read-only; choose another `run`") from None
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"no space left to write {target}: free some and give the same command again; "
                "all that was committed is kept"
            ) from None


@contextmanager
def _full_is_no_space(folder: Path) -> Iterator[None]:
    """An error while the file system of a folder is full becomes the one for that: what copies folders and writes
    tensors hides its number in errors of other types."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free > FULL:
            raise
        raise OSError(errno.ENOSPC, str(error), str(folder)) from error


def in_job_copy(folder: Path) -> bool:
    """Whether a folder lies in a copy of the working directory that Ray made for a job, and removes with it."""
    return any(part.startswith("_ray_pkg_") or part == "working_dir_files" for part in folder.parts)


def _write_by_rename(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def cache_folder() -> Path:
    """Where unpacked models and copies from buckets are kept: `$MONTESSORI_CACHE`, else `~/.cache/montessori_ray`."""
    folder = Path(os.environ.get("MONTESSORI_CACHE") or Path.home() / ".cache" / "montessori_ray")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """A table as rows; typed here once, since pyarrow's own stub is not."""
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
