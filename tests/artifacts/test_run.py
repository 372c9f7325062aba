"""The run directory: what exists, what is continued, what is refused, and what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_ray.artifacts.manifest import FORMAT_VERSION, Identity, Manifest, files_digest
from montessori_ray.artifacts.run import LOCATION, Artifact, Run
from montessori_ray.errors import RunError

COLUMNS = {"id": "int64"}
IDENTITY = Identity(stage="score", settings={"score.baseline": "null_step", "seed": 0}, inputs={"probing_set": "d1"})


@pytest.fixture(params=["folder", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """A run in a folder, and one in fsspec's memory file system in place of an object store."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield Run(str(tmp_path / "run") if request.param == "folder" else "memory://bucket/run")
    MemoryFileSystem.store.clear()


@pytest.fixture
def local_run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def table(*ids: int) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.int64())})


def ids(artifact: Artifact) -> list[int]:
    return [row["id"] for row in artifact.rows()]


def commit(artifact: Artifact, *, seconds: float = 1.0, **details: Any) -> Manifest:
    return artifact.commit(details=details, seconds=seconds, columns=COLUMNS)


def run_python(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# -- a dataset from begin to commit ---------------------------------------------------------------------------------


def test_an_artifact_exists_when_its_manifest_does(run: Run) -> None:
    artifact = run.artifact("iteration_00/influence")
    assert artifact.manifest() is None
    assert artifact.begun() is None
    with pytest.raises(RunError, match="iteration_00/influence does not exist yet: run the stage that makes it first"):
        artifact.require()
    artifact.begin(IDENTITY)
    artifact.append(table(1, 2))
    assert artifact.manifest() is None
    assert not artifact.check(IDENTITY)
    manifest = commit(artifact, spread=0.5)
    assert artifact.check(IDENTITY)
    assert run.artifact("iteration_00/influence").require() == manifest


def test_manifest_says_what_was_made_from_what(run: Run) -> None:
    artifact = run.artifact("set")
    artifact.begin(IDENTITY)
    artifact.append(table(1, 2))
    artifact.append(table(3))
    manifest = artifact.commit(details={"kept": 3}, seconds=1.5, columns=COLUMNS, peak_memory_gb=0.2)
    assert (manifest.artifact, manifest.identity, manifest.rows) == ("set", IDENTITY, 3)
    assert (manifest.columns, manifest.details, manifest.peak_memory_gb) == (COLUMNS, {"kept": 3}, 0.2)
    assert set(manifest.files) == {"part-000000.parquet", "part-000001.parquet"}
    assert manifest.files["part-000001.parquet"] == run.storage.digest("set/part-000001.parquet")
    assert manifest.digest == files_digest(manifest.files)
    assert manifest.seconds == 1.5
    assert manifest.started <= manifest.finished
    assert {"python", "ray", "torch", "transformers"} <= manifest.versions.keys()


def test_rows_come_back_in_the_order_of_their_parts(run: Run) -> None:
    artifact = run.artifact("set")
    artifact.begin(IDENTITY)
    for number in range(12):  # "part-10" must not come before "part-2"
        artifact.append(pa.table({"id": [number], "text": [f"t{number}"]}))
    assert ids(artifact) == list(range(12))
    assert artifact.column("text") == [f"t{number}" for number in range(12)]
    assert [part.column_names for part in artifact.tables(["text"])] == [["text"]] * 12
    assert artifact.part_paths() == [f"{artifact.url}/part-{number:06d}.parquet" for number in range(12)]


def test_a_dataset_without_rows_exists(run: Run) -> None:
    artifact = run.artifact("pairs")
    artifact.begin(IDENTITY)
    assert commit(artifact).rows == 0
    assert list(artifact.rows()) == []


def test_a_continued_dataset_goes_on_behind_its_last_part(run: Run) -> None:
    first = run.artifact("set")
    first.begin(IDENTITY)
    first.append(table(0))
    first.append(table(1))
    second = Run(run.root).artifact("set")
    second.begin(IDENTITY)
    second.append(table(2))
    second.append(table(3))
    assert [name.rsplit("/")[-1] for name in second.parts()] == [f"part-00000{number}.parquet" for number in range(4)]
    assert ids(second) == [0, 1, 2, 3]
    assert commit(second).rows == 4


def test_parts_that_are_made_anew_begin_at_zero(run: Run) -> None:
    artifact = run.artifact("set")
    artifact.begin(IDENTITY)
    artifact.append(table(0, 1))
    artifact.discard_parts()
    assert ids(artifact) == []
    artifact.append(table(7))
    assert artifact.parts() == ["set/part-000000.parquet"]
    assert ids(run.artifact("set")) == [7]


def test_seconds_add_up_over_sessions_and_the_start_is_the_first(run: Run) -> None:
    artifact = run.artifact("set")
    artifact.begin(IDENTITY)
    begun = artifact.begun()
    assert begun is not None
    artifact.add_seconds(2.0)
    artifact.add_seconds(3.0)
    artifact.begin(IDENTITY)
    manifest = commit(artifact, seconds=0.5)
    assert manifest.seconds == 5.5
    assert manifest.started == begun[1]


def test_seconds_of_what_was_never_begun_are_nobodys(run: Run) -> None:
    run.artifact("set").add_seconds(1.0)
    assert run.artifact("set").begun() is None


# -- digests --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=6), st.randoms())
def test_digest_of_files_does_not_depend_on_their_order(files: dict[str, str], shuffle: random.Random) -> None:
    items = list(files.items())
    shuffle.shuffle(items)
    assert files_digest(dict(items)) == files_digest(files)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
)
def test_digest_tells_sets_of_files_apart(one: dict[str, str], two: dict[str, str]) -> None:
    assert (files_digest(one) == files_digest(two)) == (one == two)


def test_equal_rows_have_equal_digests_whatever_else_differs(run: Run) -> None:
    digests = []
    for name, seed, seconds in (("one", 0, 1.0), ("two", 1, 9.0)):
        artifact = run.artifact(name)
        artifact.begin(IDENTITY.model_copy(update={"settings": {"seed": seed}}))
        artifact.append(table(1, 2))
        artifact.append(table(3))
        digests.append(commit(artifact, seconds=seconds, name=name).digest)
    assert digests[0] == digests[1]
    other = run.artifact("other")
    other.begin(IDENTITY)
    other.append(table(1, 2))
    other.append(table(4))
    assert commit(other).digest != digests[0]


def test_digest_of_a_model_covers_folders_below_and_no_leftovers(local_run: Run) -> None:
    digests = []
    for name, leftover in (("one", False), ("two", True)):
        artifact = local_run.artifact(name)
        artifact.begin(IDENTITY)
        with artifact.model_writer() as folder:
            (folder / "below").mkdir()
            (folder / "below/weights").write_bytes(b"w")
            if leftover:
                (folder / ".tmp-weights.1").write_bytes(b"half")
        manifest = artifact.commit(details={}, seconds=0)
        assert (set(manifest.files), manifest.rows, manifest.columns) == ({"below/weights"}, None, {})
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


# -- what is refused ------------------------------------------------------------------------------------------------

OTHERS = [
    ({"settings": {"score.baseline": "warmed", "seed": 0}}, ["score.baseline: null_step -> warmed"]),
    ({"settings": {"seed": 0}}, ["score.baseline: null_step -> unset"]),
    (
        {"settings": {"score.baseline": "null_step", "seed": 3, "new.key": 1}},
        ["new.key: unset -> 1", "seed: 0 -> 3"],
    ),
    ({"inputs": {"probing_set": "d2"}}, ["input probing_set has other content"]),
    ({"inputs": {}}, ["input probing_set is no longer one"]),
    ({"format_version": FORMAT_VERSION + 1}, [f"version {FORMAT_VERSION} -> {FORMAT_VERSION + 1}"]),
]
"""Changes of IDENTITY and what is said of them."""


@pytest.mark.parametrize("finished", [False, True], ids=["begun", "finished"])
@pytest.mark.parametrize(("changes", "said"), OTHERS)
def test_other_settings_or_inputs_are_refused_with_all_that_changed(
    run: Run, changes: dict[str, Any], said: list[str], finished: bool
) -> None:
    artifact = run.artifact("set")
    artifact.begin(IDENTITY)
    artifact.append(table(1))
    if finished:
        commit(artifact)
    other = IDENTITY.model_copy(update=changes)
    with pytest.raises(RunError) as caught:
        artifact.begin(other)
    for phrase in said:
        assert phrase in str(caught.value)
    for advice in (
        "was made with other settings",
        "choose another `run`",
        f"montessori stages --run {run.root} --remove set",
    ):
        assert advice in str(caught.value)
    assert ids(artifact) == [1]
    assert artifact.check(IDENTITY) is finished


def test_what_did_not_change_is_not_said() -> None:
    other = IDENTITY.model_copy(update={"settings": {"score.baseline": "warmed", "seed": 0}})
    assert IDENTITY.changes(other) == ["score.baseline: null_step -> warmed"]
    assert IDENTITY.changes(IDENTITY.model_copy()) == []


@pytest.mark.parametrize("content", [b"{", b'{"artifact": "set"}', b"[]"])
def test_a_manifest_of_an_unknown_version_is_refused(run: Run, content: bytes) -> None:
    run.storage.write("set/manifest.json", content)
    with pytest.raises(RunError, match=r"manifest\.json cannot be read by this version \(layout 1\)"):
        run.artifact("set").manifest()


@pytest.mark.parametrize(
    "content", [b"{", b'{"identity": {}}', b'{"identity": {"stage": "x"}, "started": 0, "seconds": 0}']
)
def test_a_beginning_of_an_unknown_version_is_refused(run: Run, content: bytes) -> None:
    run.storage.write("set/begun.json", content)
    with pytest.raises(RunError, match=r"begun\.json cannot be read"):
        run.artifact("set").begin(IDENTITY)


# -- removal --------------------------------------------------------------------------------------------------------


def test_removal_leaves_nothing_and_another_beginning_is_free(run: Run) -> None:
    artifact = run.artifact("set")
    artifact.begin(IDENTITY)
    artifact.append(table(1))
    commit(artifact)
    artifact.remove()
    artifact.remove()
    assert artifact.manifest() is None
    assert not run.storage.exists("set")
    other = IDENTITY.model_copy(update={"inputs": {}})
    again = run.artifact("set")
    again.begin(other)
    again.append(table(5))
    assert ids(again) == [5]


def test_a_removal_cut_short_leaves_no_finished_artifact(local_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = local_run.artifact("set")
    artifact.begin(IDENTITY)
    artifact.append(table(1))
    commit(artifact)
    remove = local_run.storage.remove

    def killed(name: str) -> None:
        if name == "set":
            raise KeyboardInterrupt
        remove(name)

    monkeypatch.setattr(local_run.storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        artifact.remove()
    assert artifact.manifest() is None


# -- models ---------------------------------------------------------------------------------------------------------


def make_model(artifact: Artifact, weights: bytes) -> Manifest:
    artifact.begin(IDENTITY)
    with artifact.model_writer() as folder:
        (folder / "weights").write_bytes(weights)
    return artifact.commit(details={}, seconds=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONTESSORI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_is_an_ordinary_folder_for_its_readers(run: Run, cache: Path) -> None:
    artifact = run.artifact("iteration_00/teacher")
    with pytest.raises(RunError, match="does not exist yet"):
        artifact.model_path()
    manifest = make_model(artifact, b"w")
    assert manifest.rows is None
    path = artifact.model_path()
    assert (path / "weights").read_bytes() == b"w"
    assert path.is_relative_to(cache) == (not run.storage.is_local)


@pytest.mark.usefixtures("cache")
def test_a_model_that_is_made_again_is_not_read_from_the_cache(run: Run) -> None:
    artifact = run.artifact("iteration_00/teacher")
    for weights in (b"first", b"second"):
        make_model(artifact, weights)
        assert (artifact.model_path() / "weights").read_bytes() == weights
        artifact.remove()


def test_a_model_outside_of_the_run_stays_where_it_is(run: Run) -> None:
    artifact = run.artifact("inputs/teacher")
    artifact.begin(IDENTITY)
    run.storage.write(f"inputs/teacher/{LOCATION}", json.dumps({"path": "/models/x", "digest": "d"}).encode())
    artifact.commit(details={}, seconds=0)
    assert artifact.model_path() == Path("/models/x")


# -- kills ----------------------------------------------------------------------------------------------------------

APPEND_AND_DIE = """
import os, signal, sys
import pyarrow as pa
from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
artifact = Run(sys.argv[1]).artifact("set")
artifact.begin(Identity.model_validate_json(sys.argv[2]))
artifact.append(pa.table({"id": [0, 1]}))
setattr(os, sys.argv[3], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
if sys.argv[4] == "append":
    artifact.append(pa.table({"id": [2, 3]}))
else:
    artifact.commit(details={}, seconds=1.0, columns={"id": "int64"})
"""


@pytest.mark.parametrize("action", ["append", "commit"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_killed_writer_loses_the_part_in_flight_alone(local_run: Run, moment: str, action: str) -> None:
    process = run_python(APPEND_AND_DIE, local_run.root, IDENTITY.model_dump_json(), moment, action)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    artifact = local_run.artifact("set")
    assert ids(artifact) == [0, 1]
    assert artifact.manifest() is None
    artifact.begin(IDENTITY)
    artifact.append(table(2, 3))
    assert ids(artifact) == [0, 1, 2, 3]
    assert set(commit(artifact).files) == {"part-000000.parquet", "part-000001.parquet"}
    assert local_run.storage.entries("set") == [
        "begun.json",
        "manifest.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]


# -- a full disk ----------------------------------------------------------------------------------------------------

FILL_A_DISK = """
import json, os, subprocess, sys
import numpy as np, pyarrow as pa
from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.errors import RunError

disk = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=True)
print("mounted", flush=True)
artifact, said = Run(disk + "/run").artifact("set"), []
artifact.begin(Identity.model_validate_json(sys.argv[2]))
artifact.append(pa.table({"id": [0, 1]}))
noise = np.random.default_rng(0)
large = pa.table({"id": noise.integers(0, 2**62, 50_000)})

def attempt(act):
    try:
        act()
    except RunError as error:
        said.append(str(error))

attempt(lambda: artifact.append(large))
with open(disk + "/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
attempt(lambda: artifact.commit(details={}, seconds=1.0, columns={"id": "int64"}))
full = {"entries": artifact.storage.entries("set"), "ids": artifact.column("id"), "manifest": artifact.manifest()}
os.unlink(disk + "/filler")
subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
artifact.append(large)
manifest = artifact.commit(details={}, seconds=1.0, columns={"id": "int64"})
print(json.dumps({"said": said, "full": full, "rows": manifest.rows, "files": sorted(manifest.files),
                  "equal": artifact.column("id")[2:] == large["id"].to_pylist()}))
"""


def test_a_disk_that_fills_up_keeps_what_is_committed_and_the_same_append_works_later(tmp_path: Path) -> None:
    """On a real file system of 200 KB, in a mount namespace of its own that ends with the process."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    process = run_python(FILL_A_DISK, tmp_path, IDENTITY.model_dump_json(), prefix=("unshare", "-Urm"))
    output, errors = process.communicate()
    if not output.startswith("mounted"):
        pytest.skip(f"nothing may be mounted here: {errors.strip().splitlines()[-1:]}")
    assert process.returncode == 0, errors
    found = json.loads(output.splitlines()[1])
    for name, said in zip(("part-000001.parquet", "manifest.json"), found["said"], strict=True):
        assert said.startswith(f"no space left to write {tmp_path}/run/set/{name}: free some and give the same command")
    assert found["full"] == {"entries": ["begun.json", "part-000000.parquet"], "ids": [0, 1], "manifest": None}
    assert found["files"] == ["part-000000.parquet", "part-000001.parquet"]
    assert found["rows"] == 50_002
    assert found["equal"]


# -- the lock -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from montessori_ray.artifacts.run import Run
with Run(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_system_without_locks_is_told(local_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre, mounted without them."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(RunError, match=r"cannot be locked .*mount option `flock`"), local_run.lock():
        pytest.fail("locked")


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(local_run: Run) -> None:
    holder = run_python(HOLD, local_run.root)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=rf"{local_run.root} is being worked on by process {holder.pid} on .*: wait"),
            local_run.lock(),
        ):
            pytest.fail("two processes hold one run")
    finally:
        holder.kill()
        holder.communicate()
    with local_run.lock():
        assert (Path(local_run.root) / "lock").read_text() == f"{os.getpid()} on {socket.gethostname()}"
    with local_run.lock():
        pass


def test_the_lock_is_let_go_when_its_body_fails(local_run: Run) -> None:
    with pytest.raises(ZeroDivisionError), local_run.lock():
        raise ZeroDivisionError
    with local_run.lock():
        pass


def test_faults_of_the_body_are_not_said_to_be_the_locks(local_run: Run) -> None:
    with pytest.raises(PermissionError), local_run.lock():
        raise PermissionError("somewhere else")


def test_a_stages_checkpoints_are_removed_and_no_others(run: Run) -> None:
    run.remove_trainings("final/score")
    kept = ["arms-x-final-score-1a2b", "final-score_fresh-1a2b-group-0"]
    for name in ("final-score-1a2b-group-0", "final-score-3c4d", *kept):
        run.storage.write(f"train/{name}/checkpoint/weights", b"many")
    run.remove_trainings("final/score")
    assert run.storage.entries("train") == kept


@pytest.mark.parametrize("run", ["bucket"], indirect=True)
def test_a_bucket_needs_no_lock(run: Run) -> None:
    with run.lock(), run.lock():
        pass


def test_places_of_a_run(tmp_path: Path) -> None:
    folder, bucket = Run(str(tmp_path / "run")), Run("memory://bucket/run")
    assert folder.root == str(tmp_path / "run")
    assert folder.train_storage() == str(tmp_path / "run/train")
    assert folder.artifact("a/b").url == str(tmp_path / "run/a/b")
    assert bucket.root.startswith("memory://")
    bucket.artifact("a/b").begin(IDENTITY)
    bucket.artifact("a/b").append(table(1, 2))
    (part,) = bucket.artifact("a/b").part_paths()
    with fsspec.open(part, "rb") as file:  # as readers in other processes do, which know the path alone
        assert pq.read_table(file).num_rows == 2
    assert bucket.train_storage() == f"{bucket.root}/train"
    assert Run(bucket.root).root == bucket.root
