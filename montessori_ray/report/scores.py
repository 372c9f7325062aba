"""Scores: distributions of influence, what they are worth, the pairs made of them, and examples to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from itertools import chain
from math import ceil, floor
from typing import Any

import numpy as np

from montessori_ray.artifacts.run import Artifact
from montessori_ray.report.results import Mean, mean_of_groups
from montessori_ray.report.source import Source, place
from montessori_ray.stages.base import Stage

MAX_EXAMPLES = 50
"""Most helpful, most harmful examples and widest pairs that a table shows."""

MAX_RECHECKED = 500
"""Points of an agreement plot."""

MAX_CHARACTERS = 1000
"""Of a text in a table; a longer one is cut."""

_TAIL = 0.002
"""Share of the scores at either end that an axis may leave to its outermost bins."""


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Influence of one set of examples."""

    name: str
    """Name of the stage, e.g. `iteration_00/score`."""
    place: str
    fresh: bool
    """Whether it is of fresh instructions, which all teachers of a loop wrote."""
    estimator: str
    mean: Mean
    share_helpful: float
    edges: list[float]
    """Ends of the bins of the histogram; scores beyond them are counted in the outermost bins."""
    counts: list[int]
    extremes: tuple[float, float]
    """The lowest and the highest score."""
    mean_se: float | None
    """Mean standard error of a score over the reference rows; None where the estimator does not know it."""
    noise: float | None
    """Root mean square difference from the same examples scored exactly in float32; None where none were."""
    recheck: dict[str, Any] | None
    """Agreement with them: correlations, equal signs, pairs that would be others."""
    rechecked: list[tuple[str, float, float]]
    """(example id, influence, influence scored again)."""
    quarantined: dict[str, int]
    """Why an example has no score -> examples."""
    baselines: dict[str, float]
    """Reference loss of the warmed student and after a null step."""
    seconds: dict[str, float]
    """Mean seconds a point: step, restore, evaluate."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Preference pairs of one iteration."""

    name: str
    place: str
    pairs: int
    prompts: int
    """Few-shot prompts with a scored output."""
    without: dict[str, int]
    """Why a prompt has no pair -> prompts."""
    noise: float
    """Scores closer to zero than this make no pair."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A scored example."""

    example_id: str
    influence: float
    influence_se: float | None
    instruction: str
    response: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference pair, as instructions."""

    chosen: str
    rejected: str
    chosen_influence: float
    rejected_influence: float


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What to read of one iteration."""

    name: str
    place: str
    helpful: list[Example]
    """Most helpful first."""
    harmful: list[Example]
    """Most harmful first."""
    pairs: list[Pair]
    """Widest difference of influence first."""


COLUMNS = [
    "example_id", "prompt_id", "influence", "estimator", "recheck_influence",
    "step_seconds", "restore_seconds", "evaluate_seconds",
]  # fmt: skip


def influences(source: Source) -> list[Influence]:
    """Distributions of every scored set that has a score."""
    return [
        _influence(stage, manifest.details, artifact)
        for stage, manifest, artifact in source.finished("score", "score_fresh")
        if manifest.details.get("scored") and source.has(artifact, COLUMNS)
    ]


def _influence(stage: Stage, details: dict[str, Any], artifact: Artifact) -> Influence:
    of_prompt: dict[str, list[float]] = {}
    rechecked: list[tuple[str, float, float]] = []
    seconds: dict[str, float] = {}
    for row in artifact.rows(COLUMNS):
        if row["influence"] is None:
            continue
        of_prompt.setdefault(row["prompt_id"], []).append(row["influence"])
        estimator = row["estimator"]
        if row["recheck_influence"] is not None and len(rechecked) < MAX_RECHECKED:
            rechecked.append((row["example_id"], row["influence"], row["recheck_influence"]))
        for part in ("step", "restore", "evaluate"):
            seconds[part] = seconds.get(part, 0.0) + (row[f"{part}_seconds"] or 0.0)
    values = list(chain.from_iterable(of_prompt.values()))
    edges, counts = histogram(values)
    recheck = details.get("recheck")
    return Influence(
        name=stage.name,
        place=place(stage.name),
        fresh=stage.kind == "score_fresh",
        estimator=estimator,
        mean=mean_of_groups(list(of_prompt.values())),
        share_helpful=sum(value < 0 for value in values) / len(values),
        edges=edges,
        counts=counts,
        extremes=(min(values), max(values)),
        mean_se=details.get("mean_se_over_reference"),
        noise=recheck["noise"] if recheck else None,
        recheck=recheck,
        rechecked=rechecked,
        quarantined=details.get("quarantined", {}),
        baselines={name: details[name] for name in ("warmed_loss", "null_step_loss") if name in details},
        seconds={part: total / len(values) for part, total in seconds.items()},
    )


def histogram(values: Sequence[float]) -> tuple[list[float], list[int]]:
    """Edges and counts of equal bins of which zero is an edge, so that each has one sign; at most 40 or so.

    Their width is Freedman and Diaconis's. The outermost hold what lies beyond them too: few and far values would
    press all others into one bin.
    """
    table = np.asarray(values, dtype=np.float64)
    low, lower, upper, high = np.quantile(table, [_TAIL, 0.25, 0.75, 1 - _TAIL]).tolist()
    wide = min(2 * (upper - lower) / len(table) ** (1 / 3), (high - low) / 12)  # few values: a dozen bins show more
    width = max(wide, (high - low) / 36, 1e-12 * max(abs(low), abs(high), 1e-300))
    numbers = np.floor(table / width).clip(floor(low / width), max(ceil(high / width) - 1, floor(low / width)))
    first, last = int(numbers.min()), int(numbers.max())
    counts = np.bincount((numbers - first).astype(np.int64), minlength=last - first + 1)
    return [number * width for number in range(first, last + 2)], counts.tolist()


def pairs(source: Source) -> list[Pairs]:
    """Counts of every iteration."""
    return [
        Pairs(
            name=stage.name,
            place=place(stage.name),
            pairs=manifest.rows or 0,
            prompts=manifest.details["prompts"],
            without=manifest.details["prompts_without_pair"],
            noise=manifest.details.get("noise") or 0.0,
        )
        for stage, manifest, _ in source.finished("pair")
        if "prompts_without_pair" in manifest.details
    ]


# -- examples -------------------------------------------------------------------------------------------------------


def examples(source: Source) -> list[Examples]:
    """The ends of every distribution, and the widest pairs, as texts."""
    found = []
    for stage, manifest, artifact in source.finished("score"):
        if not manifest.details.get("scored") or not source.has(artifact, COLUMNS):
            continue
        helpful = nsmallest(MAX_EXAMPLES, _scored(artifact, helps=True), key=lambda row: row["influence"])
        harmful = nlargest(MAX_EXAMPLES, _scored(artifact, helps=False), key=lambda row: row["influence"])
        texts = _texts(source, stage, {row["example_id"] for row in (*helpful, *harmful)})
        found.append(
            Examples(
                name=stage.name,
                place=place(stage.name),
                helpful=[_example(row, texts) for row in helpful],
                harmful=[_example(row, texts) for row in harmful],
                pairs=_pairs(source, stage.output),
            )
        )
    return found


def _scored(artifact: Artifact, *, helps: bool) -> Iterator[dict[str, Any]]:
    for row in artifact.rows(["example_id", "influence", "influence_se"]):
        if row["influence"] is not None and row["influence"] != 0 and (row["influence"] < 0) == helps:
            yield row


def _texts(source: Source, stage: Stage, wanted: set[str]) -> dict[str, dict[str, str]]:
    """Instruction and response of the wanted ids, from the sets the stage scored."""
    found: dict[str, dict[str, str]] = {}
    for name in stage.inputs[2:]:
        for row in source.run.artifact(name).rows(["example_id", "instruction", "response"]):
            if row["example_id"] in wanted:
                found[row["example_id"]] = row
    return found


def _example(row: dict[str, Any], texts: dict[str, dict[str, str]]) -> Example:
    text = texts.get(row["example_id"], {"instruction": "", "response": ""})
    return Example(
        example_id=row["example_id"],
        influence=row["influence"],
        influence_se=row["influence_se"],
        instruction=cut(text["instruction"]),
        response=cut(text["response"]),
    )


def _pairs(source: Source, influence: str) -> list[Pair]:
    """The widest pairs made of this influence, their outputs as the instructions parsed from them."""
    for stage, _, artifact in source.finished("pair"):
        if stage.inputs[0] == influence and source.has(artifact, ("chosen_id", "rejected_id")):
            widest = nlargest(
                MAX_EXAMPLES, artifact.rows(), key=lambda row: row["rejected_influence"] - row["chosen_influence"]
            )
            wanted = {row[f"{side}_id"] for row in widest for side in ("chosen", "rejected")}
            texts = {
                row["example_id"]: row["instruction"]
                for row in source.run.artifact(stage.inputs[1]).rows(["example_id", "instruction"])
                if row["example_id"] in wanted
            }
            return [
                Pair(
                    chosen=cut(_told_apart(texts, row, "chosen")),
                    rejected=cut(_told_apart(texts, row, "rejected")),
                    chosen_influence=row["chosen_influence"],
                    rejected_influence=row["rejected_influence"],
                )
                for row in widest
            ]
    return []


def _told_apart(texts: dict[str, str | None], row: dict[str, Any], side: str) -> str:
    """The instruction of a side; its raw output where there is none, or both answer the same one."""
    instruction = texts.get(row[f"{side}_id"])
    same = texts.get(row["chosen_id"]) == texts.get(row["rejected_id"])
    return row[side] if same or not instruction else instruction


def cut(text: str | None) -> str:
    """A text of at most MAX_CHARACTERS."""
    text = text or ""
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
