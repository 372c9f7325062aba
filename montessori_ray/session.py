"""One process at work on a run: its lock, its cluster, its teacher pool, and what the user is shown meanwhile."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from montessori_ray.artifacts.run import Run
from montessori_ray.artifacts.storage import in_job_copy
from montessori_ray.cluster import Bundle, cluster_nodes, connected, say_bundles
from montessori_ray.config import Config, ScoreFiles
from montessori_ray.errors import RunError, UserError
from montessori_ray.stages.base import Stage, StageContext, identity_of
from montessori_ray.synthesis.pool import TeacherPool
from montessori_ray.telemetry.console import Console
from montessori_ray.telemetry.events import EventLog, read_events
from montessori_ray.telemetry.monitor import StageMonitor
from montessori_ray.telemetry.progress import ProgressBoard, ProgressChannel
from montessori_ray.telemetry.trackers import NoTracker, Tracker, open_tracker


def open_run(root: str) -> Run:
    """The run at `root`, a relative path taken from the working directory.

    Raises:
        RunError: the path is relative in a Ray job, whose working directory is a copy that goes with the job.
    """
    if "://" in root or os.path.isabs(os.path.expanduser(root)):
        return Run(os.path.expanduser(root))
    if in_job_copy(Path.cwd()):
        raise RunError(
            f"run={root} is a relative path inside the job's own copy of the working directory, which is deleted with "
            "the job: give an absolute path that all nodes see"
        )
    return Run(os.path.abspath(os.path.expanduser(root)))


class Session:
    """Executes stages; the cluster and the pool come up when the first stage needs them."""

    def __init__(self, config: Config | ScoreFiles) -> None:
        self.config = config
        self.run = open_run(config.run)
        self.console = Console()
        self._exit = ExitStack()
        self._board: Any = None
        self._pool: TeacherPool | None = None
        self._tracker: Tracker = NoTracker()

    def __enter__(self) -> Self:
        with self._exit:  # what is open is closed again when something here fails
            self._exit.enter_context(self.run.lock())
            self.events = EventLog(self.run.storage)
            self._exit.callback(self.events.flush)
            self.events.write("session_started", run=self.run.root, pid=os.getpid())
            self._exit = self._exit.pop_all()
        return self

    def accept_settings(self) -> None:
        """Leave the settings in the run and open its tracker; only once it is known that the run fits them.

        Raises:
            UserError: one of the two cannot be done.
        """
        settings = self.config.model_dump(mode="json")
        self.run.storage.write("config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
        self._tracker = open_tracker(self.config.telemetry, self.run, settings)
        self._exit.callback(self._close_tracker)

    def __exit__(self, *exception: object) -> None:
        with suppress(RunError):
            self.events.write("session_ended", error=str(exception[1]) if exception[1] else None)
        self._exit.__exit__(None, None, None)

    def _close_tracker(self) -> None:
        """A tracker whose server is away raises types of its own; a run that is done is not failed by that."""
        try:
            self._tracker.close()
        except Exception as error:
            reason = (str(error).strip() or "-").splitlines()[0]
            self.console.note(
                f"the tracker {self.config.telemetry.tracker} did not take the last of its curves "
                f"({type(error).__name__}: {reason}); all of them are in events.jsonl"
            )

    def connect(self) -> list[Bundle]:
        """Connect to the cluster; returns what its nodes have."""
        started = time.monotonic()
        name = self._exit.enter_context(connected(self.config.cluster))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not to be lost
        self._board = ProgressBoard.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        nodes = cluster_nodes()
        self.note(f"Ray on {name}: {say_bundles(nodes)}, up in {time.monotonic() - started:.0f} s")
        if isinstance(self.config, Config) and self._new_pool(self.config).is_left_over():
            self._own(self._new_pool(self.config))
        return nodes

    def execute(self, stage: Stage) -> None:
        """Make the output of a stage, unless it exists; continues what an earlier session left."""
        artifact = self.run.artifact(stage.output)
        if artifact.check(identity_of(stage, self.config, self.run)):
            self.console.skipped(stage.name, artifact.require())
            self._remove_trainings(stage)
            return
        client = self._host(stage)
        context = StageContext(
            stage=stage, config=stage.config or self.config, run=self.run, note=self.note, client=client,
            progress=ProgressChannel(stage.name, self._board),
        )  # fmt: skip
        earlier = self._earlier_seconds(stage.name, begun=artifact.begun() is not None)
        artifact.begin(identity_of(stage, self.config, self.run))
        artifact.add_seconds(earlier)
        self.events.write("stage_started", stage=stage.name)
        started = time.monotonic()
        try:
            with StageMonitor(
                stage.name, self._board, self.console, self.events, self._tracker, run=Path(self.run.root).name
            ) as monitor:
                details = stage.body(context)
        except BaseException as error:
            with suppress(RunError):  # a full disk must not hide the first error
                artifact.add_seconds(time.monotonic() - started)
                if isinstance(error, UserError):
                    artifact.forget_if_empty()
                self.events.write("stage_stopped", stage=stage.name, error=f"{type(error).__name__}: {error}")
            raise
        columns = {field.name: str(field.type) for field in stage.schema} if stage.schema else None
        seconds = time.monotonic() - started
        manifest = artifact.commit(
            details=details, seconds=seconds, columns=columns, peak_memory_gb=monitor.peak_memory_gb
        )
        self.events.write(
            "stage_finished", stage=stage.name, rows=manifest.rows, seconds=manifest.seconds, details=details
        )
        self.events.flush()
        self.console.finished(stage.name, manifest)
        self._remove_trainings(stage)

    def _earlier_seconds(self, stage: str, *, begun: bool) -> float:
        """How long earlier sessions worked on a stage beyond what its artifact knows of.

        One that is `begun` lacks the last session's time if that was killed before it could say so; one that has been
        forgotten, since a training that failed left nothing, all since the stage was last finished.
        """
        total = lost = started = last = 0.0
        for event in read_events(self.run.storage):
            if event["event"] == "session_started":
                lost, started = (last - started if started else lost), 0.0
            elif event.get("stage") == stage and event["event"].startswith("stage_"):
                stopped = event["event"] == "stage_stopped"
                total = 0.0 if event["event"] == "stage_finished" else total + lost
                total += event["time"] - started if stopped and started else 0.0
                lost, started = 0.0, event["time"] if event["event"] == "stage_started" else 0.0
            last = event["time"]
        return lost if begun else total + lost

    def _remove_trainings(self, stage: Stage) -> None:
        """The stage is done, so a failure here must not end the session."""
        try:
            self.run.remove_trainings(stage.name)
        except (RunError, OSError) as error:
            self.note(f"checkpoints of {stage.name} stay and take disk space: {error}")

    def note(self, sentence: str, **fields: Any) -> None:
        """Tell the user something, on the console and as an event."""
        self.events.write("note", text=sentence, **fields)
        self.console.note(sentence)

    def finish(self, stages: Sequence[Stage]) -> None:
        """Write the report and show what happened, as far as the run got."""
        from montessori_ray.report.write import write_report  # late: matplotlib takes a second

        report = None
        try:
            report = write_report(self.run, self.config, stages)
        except Exception as error:  # whatever it is, the run is finished, and that must be seen
            self.note(
                f"the report could not be written ({type(error).__name__}: {error}); the run is not touched by that, "
                f"`montessori report {self.run.root}` tries again"
            )
        self.console.summary(self.run, stages, report)

    def _host(self, stage: Stage) -> Any:
        """Give the stage its teacher, or the pool's resources where it has none."""
        if isinstance(self.config, ScoreFiles):
            return None
        if stage.teacher is None:
            if self._pool is not None and stage.bundles and not self.config.pool.resident:
                self._pool.release()
            return None
        pool = self._pool or self._own(self._new_pool(self.config))
        started = time.monotonic()
        if pool.host(str(self.run.artifact(stage.teacher).model_path())):
            self.note(f"teacher pool serves {stage.teacher}, up in {time.monotonic() - started:.0f} s")
        return pool.client()

    def _new_pool(self, config: Config) -> TeacherPool:
        """Runs may share a cluster; the next session of a killed one takes its pool over by this name."""
        return TeacherPool(config.pool, name=f"teacher-{hashlib.sha256(self.run.root.encode()).hexdigest()[:8]}")

    def _own(self, pool: TeacherPool) -> TeacherPool:
        """End the pool's replicas where their resources are wanted, and with the session."""
        self._pool = pool
        self._exit.callback(pool.release)
        return pool
