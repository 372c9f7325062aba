"""A run directory: where artifacts are looked up, begun, continued and committed.

artifact = run.artifact("iteration_00/influence")
artifact.begin(identity)            # refuses an artifact begun with other settings or inputs
artifact.append(rows)               # one Parquet part, atomic
artifact.commit(details={...})      # the manifest: from now on the artifact exists
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from montessori_ray.artifacts.manifest import FORMAT_VERSION, Begun, Identity, Manifest, files_digest, library_versions
from montessori_ray.artifacts.storage import TEMPORARY, Storage, cache_folder, rows_of
from montessori_ray.errors import RunError

BEGUN = "begun.json"
MANIFEST = "manifest.json"
LOCATION = "location.json"
"""In a model artifact that is not copied into the run: where the model lies, and its digest."""


class Artifact:
    """A dataset (Parquet parts) or a model directory in a run."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.name = name
        self._next_part: int | None = None

    @property
    def url(self) -> str:
        """Path or URL of the artifact's folder."""
        return self.storage.url_of(self.name)

    # -- what is there ------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the artifact does not exist."""
        if not self.storage.exists(f"{self.name}/{MANIFEST}"):
            return None
        try:
            return Manifest.model_validate_json(self.storage.read(f"{self.name}/{MANIFEST}"))
        except ValidationError as error:
            raise self._unreadable(MANIFEST, error) from None

    def _unreadable(self, name: str, error: ValidationError) -> RunError:
        return RunError(
            f"{self.url}/{name} cannot be read by this version (layout {FORMAT_VERSION}): {error.error_count()} fields "
            "differ; use the version that wrote it, or another `run`"
        )

    def require(self) -> Manifest:
        """The manifest; raises RunError if the artifact does not exist."""
        manifest = self.manifest()
        if manifest is None:
            raise RunError(f"{self.url} does not exist yet: run the stage that makes it first (`montessori stages`)")
        return manifest

    def parts(self) -> list[str]:
        """Names of the committed parts, in the order of their rows."""
        entries = self.storage.entries(self.name)
        return [f"{self.name}/{entry}" for entry in entries if entry.startswith("part-") and entry.endswith(".parquet")]

    def part_paths(self) -> list[str]:
        """Paths or URLs of the committed parts, for readers in other processes."""
        return [self.storage.url_of(part) for part in self.parts()]

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The committed parts one by one."""
        for part in self.parts():
            yield self.storage.read_table(part, list(columns) if columns else None)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The committed rows, streamed part by part."""
        for table in self.tables(columns):
            yield from rows_of(table)

    def column(self, name: str) -> list[Any]:
        """One column of all committed rows."""
        return [value for table in self.tables([name]) for value in table.column(name).to_pylist()]

    def model_path(self) -> Path:
        """An ordinary folder with the model; a copy in the cache where the run lies in a bucket."""
        digest = self.require().digest
        if (location := self.location()) is not None:
            return Path(location["path"])
        return self.storage.local_folder(self.name, cache_folder() / digest[:16])  # another model, another copy

    def location(self) -> dict[str, str] | None:
        """`path` and content `digest` of a model that lies outside of the run; None for what lies in it."""
        file = f"{self.name}/{LOCATION}"
        return json.loads(self.storage.read(file)) if self.storage.exists(file) else None

    def count(self) -> int:
        """Number of committed rows, read from the parts' footers."""
        return sum(self.storage.count_rows(part) for part in self.parts())

    # -- making it ----------------------------------------------------------------------------------------------

    def begun(self) -> tuple[Identity, float, float] | None:
        """What the artifact was begun with: identity, start time, seconds worked in earlier sessions."""
        if not self.storage.exists(f"{self.name}/{BEGUN}"):
            return None
        try:
            begun = Begun.model_validate_json(self.storage.read(f"{self.name}/{BEGUN}"))
        except ValidationError as error:
            raise self._unreadable(BEGUN, error) from None
        return begun.identity, begun.started, begun.seconds

    def begin(self, identity: Identity) -> None:
        """Start the artifact, or continue one begun with the same identity.

        Raises:
            RunError: it was begun with other settings or inputs.
        """
        self.check(identity)
        self.storage.sweep(self.name)
        if self.begun() is None:
            self._write_begun(identity, time.time(), 0.0)

    def made_from(self) -> Identity | None:
        """What the artifact is made from, finished or begun; None where there is nothing of it."""
        if (manifest := self.manifest()) is not None:
            return manifest.identity
        begun = self.begun()
        return begun[0] if begun else None

    def check(self, identity: Identity) -> bool:
        """Whether the artifact is finished.

        Raises:
            RunError: it is finished or begun, but with other settings or inputs than `identity`.
        """
        before = self.made_from()
        if before is not None and (changes := before.changes(identity)):
            raise RunError(
                f"{self.url} was made with other settings ({'; '.join(changes)}): choose another `run`, change the "
                "settings back, or remove it and what was made from it with `montessori stages --run "
                f"{self.storage.url_of('')} --remove {self.name}`"
            )
        return self.manifest() is not None

    def append(self, table: pa.Table) -> None:
        """Commit rows as the next part. One process at a time appends (`Run.lock`)."""
        if self._next_part is None:
            self._next_part = len(self.parts())
        self.storage.write_table(f"{self.name}/part-{self._next_part:06d}.parquet", table)
        self._next_part += 1

    def discard_parts(self) -> None:
        """Remove the parts of an unfinished dataset that is made anew rather than continued."""
        for part in reversed(self.parts()):  # what a kill leaves is numbered without a gap
            self.storage.remove(part)
        self._next_part = 0

    @contextmanager
    def model_writer(self) -> Iterator[Path]:
        """A folder to save a model into; `commit` afterwards makes it exist."""
        with self.storage.folder_writer(self.name) as folder:
            yield folder

    def commit(
        self,
        *,
        details: dict[str, Any],
        seconds: float,
        columns: dict[str, str] | None = None,
        peak_memory_gb: float | None = None,
    ) -> Manifest:
        """Write the manifest: the artifact exists from here on. `columns` of a dataset, None for a model."""
        begun = self.begun()
        assert begun is not None, f"{self.name} is committed but was never begun"
        identity, started, earlier = begun
        entries = [entry for entry in self._files() if entry not in (BEGUN, MANIFEST)]
        files = {entry: self.storage.digest(f"{self.name}/{entry}") for entry in entries}
        rows = None if columns is None else self.count()
        manifest = Manifest(
            artifact=self.name, identity=identity, digest=files_digest(files), files=files, columns=columns or {},
            rows=rows, started=started, finished=time.time(), seconds=round(earlier + seconds, 3),
            peak_memory_gb=peak_memory_gb, versions=library_versions(), details=details,
        )  # fmt: skip
        self.storage.write(f"{self.name}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())
        return manifest

    def forget_if_empty(self) -> None:
        """Forget an unfinished artifact with nothing in it: a file that was refused must not bind the run to it."""
        if self._files() == [BEGUN]:
            self.remove()

    def add_seconds(self, seconds: float) -> None:
        """Remember time worked on an artifact that a session leaves unfinished."""
        begun = self.begun()
        if begun is not None:
            identity, started, earlier = begun
            self._write_begun(identity, started, earlier + seconds)

    def remove(self) -> None:
        """Remove the artifact, finished or not: manifest first, so that a kill leaves it not existing."""
        self.storage.remove(f"{self.name}/{MANIFEST}")
        self.storage.remove(self.name)

    def _write_begun(self, identity: Identity, started: float, seconds: float) -> None:
        record = Begun(identity=identity, started=started, seconds=seconds)
        self.storage.write(f"{self.name}/{BEGUN}", record.model_dump_json().encode())

    def _files(self) -> list[str]:
        """Names of all files in the artifact's folder, folders within it included."""
        top = self.storage.path(self.name)
        return sorted(
            str(path)[len(top) + 1 :]
            for path in self.storage.fs.find(top)
            if not str(path)[len(top) + 1 :].startswith(TEMPORARY)
        )


class Run:
    """A run directory."""

    def __init__(self, root: str) -> None:
        self.storage = Storage(root)

    @property
    def root(self) -> str:
        """Path or URL of the run."""
        return self.storage.url_of("")

    def artifact(self, name: str) -> Artifact:
        """The artifact of this name, existing or not."""
        return Artifact(self.storage, name)

    def train_storage(self) -> str:
        """Where Ray Train keeps checkpoints of unfinished trainings."""
        return f"{self.root}/train"

    def remove_trainings(self, stage: str) -> bool:
        """Remove what Ray Train keeps of the trainings of a stage (see `StageContext.train_name`); False if nothing.

        Raises:
            RunError, OSError: it cannot be removed.
        """
        kept = [entry for entry in self.storage.entries("train") if entry.startswith(f"{stage.replace('/', '-')}-")]
        for entry in kept:
            self.storage.remove(f"train/{entry}")
        return bool(kept)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go when it ends, however it ends.

        Raises:
            RunError: another process works on this run, or the directory cannot be written.
        """
        if not self.storage.is_local:
            yield
            return
        with self.storage.folder_writer("") as folder:
            file = (folder / "lock").open("a+")
        with file:  # outside of folder_writer, which would take the body's faults for its own
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    f"{self.root} is being worked on by process {file.read() or 'unknown'}: wait for it, stop it, or "
                    "choose another `run`"
                ) from None
            except OSError as error:
                raise RunError(
                    f"{self.root} cannot be locked ({error}): its file system must have flock (for Lustre the mount "
                    "option `flock`), which keeps two processes from working on one run"
                ) from None
            with self.storage.said_plainly(f"{self.root}/lock"):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield
