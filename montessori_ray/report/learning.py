"""How models learned and what was written: curves of trainings, samples and their filters, responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from montessori_ray.report.plots import MAX_POINTS, thinned
from montessori_ray.report.source import Source, place

Points = list[tuple[float, float]]
"""(step, value)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A fine-tuning of the student, or a tuning of the teacher."""

    name: str
    """Name of the stage, e.g. `iteration_00/warm_up`."""
    place: str
    curves: dict[str, Points]
    """Metric -> its points that are numbers; of a long training, means of neighbouring steps."""
    details: dict[str, Any]
    """What the training says at its end."""


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Instructions and responses that one teacher wrote for one purpose."""

    name: str
    """Name of the stage that sampled the instructions."""
    place: str
    fresh: bool
    """Written to judge the teacher, not to train on."""
    samples: int
    kept: int
    rejected: dict[str, int]
    """Reason -> samples."""
    responses: int | None
    truncated: int | None
    """Responses cut at `synthesize.responses.max_tokens`."""
    tokens: int | None
    """Tokens of the responses."""


def trainings(source: Source, *kinds: str) -> list[Training]:
    """Stages of these kinds that trained a step, finished or not."""
    points: dict[str, dict[str, dict[float, float]]] = {}
    for event in source.events:
        if event["event"] == "metrics":
            for point in event["points"]:
                for metric in point.keys() - {"step"}:
                    points.setdefault(event["stage"], {}).setdefault(metric, {})[point["step"]] = point[metric]
    found = []
    for stage in source.stages:
        if stage.kind in kinds and (stage.name in points or stage.name in source.manifests):
            curves = {metric: _curve(values) for metric, values in points.get(stage.name, {}).items()}
            manifest = source.manifests.get(stage.name)
            found.append(
                Training(
                    name=stage.name,
                    place=place(stage.name),
                    curves=curves,
                    details=manifest.details if manifest else {},
                )
            )
    return found


def _curve(values: dict[float, float]) -> Points:
    """In the order of steps; a step that was done again after a kill counts as it was done last.

    A batch without a response token has no loss (NaN), which cannot be drawn and would make its neighbours' mean none.
    """
    finite = sorted((step, value) for step, value in values.items() if isfinite(value))
    if not finite:
        return []
    steps, thin = thinned(finite, MAX_POINTS)
    return list(zip(steps, thin, strict=True))


def syntheses(source: Source) -> list[Synthesis]:
    """All finished samplings of instructions, with the responses where they are finished too."""
    responses = {
        stage.inputs[0]: manifest.details for stage, manifest, _ in source.finished("responses", "fresh_responses")
    }
    found = []
    for stage, manifest, _ in source.finished("instructions", "fresh_instructions"):
        if "statuses" not in manifest.details:
            continue
        answered = responses.get(stage.output, {})
        statuses: dict[str, int] = manifest.details["statuses"]
        found.append(
            Synthesis(
                name=stage.name,
                place=place(stage.name),
                fresh=stage.kind.startswith("fresh_"),
                samples=manifest.details["samples"],
                kept=manifest.details["kept"],
                rejected={reason: amount for reason, amount in statuses.items() if reason != "kept"},
                responses=answered.get("responses"),
                truncated=answered.get("truncated"),
                tokens=answered.get("tokens"),
            )
        )
    return found


def reasons(found: Sequence[Synthesis]) -> list[str]:
    """Reasons of rejection that occur, the most frequent first."""
    totals: dict[str, int] = {}
    for entry in found:
        for reason, amount in entry.rejected.items():
            totals[reason] = totals.get(reason, 0) + amount
    return sorted(totals, key=lambda reason: (-totals[reason], reason))
