"""Where the time went: by stage and by kind of work, with what each held of the cluster meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from montessori_ray.report.source import Source
from montessori_ray.stages.base import bundles_of
from montessori_ray.telemetry.events import read_events

WORK = {
    "instructions": "synthesis",
    "responses": "synthesis",
    "fresh_instructions": "synthesis",
    "fresh_responses": "synthesis",
    "candidates": "synthesis",
    "warm_up": "training the student",
    "train_student": "training the student",
    "score": "scoring influence",
    "score_fresh": "scoring influence",
    "tune_teacher": "tuning the teacher",
    "grade": "answers and judging",
    "answer_original": "answers and judging",
    "answer_trained": "answers and judging",
    "win_rate": "answers and judging",
    "evaluate": "evaluation",
    "measure_students": "evaluation",
}
"""Kind of a stage -> the work it is; any other is `OTHER`."""

OTHER = "data, models and pairs"
OUTSIDE = "outside of stages"
"""Starting the cluster and the teacher pool, what lies between two stages, and stages that are not finished yet."""
REMOVED = "work that was removed"
"""What stages took whose output was removed since, to be made again."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Time and resources of a finished stage."""

    name: str
    work: str
    rows: int | None
    """Rows it made; None for a model."""
    seconds: float
    """Over all sessions."""
    rows_a_second: float | None
    peak_memory_gb: float | None
    """In use on the driver's node, by whatever program, over what was in use when the driver started."""
    cpu_hours: float
    """CPUs it held, as configured, times its time."""
    gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time and resources of a run."""

    stages: list[Stage]
    by_work: dict[str, float]
    """Seconds, most first."""
    stage_seconds: float
    session_seconds: float | None
    """How long drivers were at work, over all sessions; None where no events are left."""
    sessions: int
    cpu_hours: float
    gpu_hours: float
    peak_memory_gb: float | None


def costs(source: Source) -> Costs:
    """Of all finished stages."""
    stages = []
    for stage in source.stages:
        manifest = source.manifests.get(stage.name)
        if manifest is None:
            continue
        bundles = bundles_of(stage, stage.config or source.config)
        hours = manifest.seconds / 3600
        stages.append(
            Stage(
                name=stage.name,
                work=WORK.get(stage.kind, OTHER),
                rows=manifest.rows,
                seconds=manifest.seconds,
                rows_a_second=manifest.rows / manifest.seconds if manifest.rows and manifest.seconds else None,
                peak_memory_gb=manifest.peak_memory_gb,
                cpu_hours=hours * sum(bundle.get("CPU", 0) for bundle in bundles),
                gpu_hours=hours * sum(bundle.get("GPU", 0) for bundle in bundles),
            )
        )
    sessions = _sessions(source)
    stage_seconds = sum(stage.seconds for stage in stages)
    session_seconds = sum(sessions) if sessions else None
    return Costs(
        stages=stages,
        by_work=_by_work(stages, _removed(source), session_seconds),
        stage_seconds=stage_seconds,
        session_seconds=session_seconds,
        sessions=len(sessions),
        cpu_hours=sum(stage.cpu_hours for stage in stages),
        gpu_hours=sum(stage.gpu_hours for stage in stages),
        peak_memory_gb=max(
            (stage.peak_memory_gb for stage in stages if stage.peak_memory_gb is not None), default=None
        ),
    )


def _by_work(stages: Sequence[Stage], removed: float, session_seconds: float | None) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for stage in stages:
        seconds[stage.work] = seconds.get(stage.work, 0.0) + stage.seconds
    outside = (session_seconds or 0.0) - sum(seconds.values()) - removed
    seconds |= {name: spent for name, spent in ((REMOVED, removed), (OUTSIDE, outside)) if spent >= 1}
    return dict(sorted(seconds.items(), key=lambda entry: -entry[1]))


def _removed(source: Source) -> float:
    """Seconds of finished stages beyond those that their outputs know of."""
    finished: dict[str, float] = {}
    for event in source.events:
        if event["event"] == "stage_finished":
            finished[event["stage"]] = finished.get(event["stage"], 0.0) + event["seconds"]
    known = source.manifests
    kept = (min(seconds, known[name].seconds) if name in known else 0.0 for name, seconds in finished.items())
    return sum(finished.values()) - sum(kept)


def _sessions(source: Source) -> list[float]:
    """Seconds of each session that finished a stage or tried to; a killed one ends with its last event."""
    found: list[tuple[float, float, bool]] = []
    for event in read_events(source.run.storage):  # how far a stage is, too: it is the last a killed one has said
        if event["event"] == "session_started":
            found.append((event["time"], event["time"], False))
        elif found:
            start, _, worked = found[-1]
            found[-1] = (start, event["time"], worked or event["event"].startswith("stage_"))
    return [end - start for start, end, worked in found if worked]
