"""A run directory as plain values: `report.json`, and all that the page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from montessori_ray.config import Config
from montessori_ray.report import arms, costs, learning, results, scores
from montessori_ray.report.source import Source
from montessori_ray.report.words import count, listed


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What a finished artifact is and was made from."""

    name: str
    stage: str
    rows: int | None
    digest: str
    inputs: dict[str, str]
    """Artifact -> digest."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report shows; lists are empty where the run has no such thing yet."""

    run: str
    scores_files: bool
    """A run of `montessori score`: no teacher, no loop."""
    what: str
    """What was run, in a sentence."""
    sentences: list[results.Sentence]
    """What came out, in sentences."""
    stages_done: int
    stages_todo: list[str]
    arms: arms.Arms | None
    """The arms of a comparison."""
    losses: list[results.Loss]
    categories: list[results.Category]
    fresh: list[results.Fresh]
    win_rate: dict[str, Any] | None
    """What a judge said of the trained student's answers."""
    influences: list[scores.Influence]
    pairs: list[scores.Pairs]
    examples: list[scores.Examples]
    tunings: list[learning.Training]
    trainings: list[learning.Training]
    syntheses: list[learning.Synthesis]
    cost: costs.Costs
    versions: dict[str, list[str]]
    """Library -> its versions; more than one where sessions differed."""
    artifacts: list[Artifact]
    notes: list[str]
    """What the run told its user, each sentence once."""
    config: dict[str, Any]


def collect(source: Source) -> Report:
    """Read a run as far as it got."""
    compared = arms.arms(source)
    versions: dict[str, list[str]] = {}
    for manifest in source.manifests.values():
        for library, version in manifest.versions.items():
            if version not in versions.setdefault(library, []):
                versions[library].append(version)
    return Report(
        run=source.run.root,
        scores_files=not isinstance(source.config, Config),
        what=_what(source),
        sentences=[*arms.sentences(compared), *results.sentences(source)],
        stages_done=len(source.manifests),
        stages_todo=source.todo,
        arms=compared,
        losses=results.losses(source),
        categories=results.categories(source),
        fresh=results.fresh(source),
        win_rate=results.win_rate(source),
        influences=scores.influences(source),
        pairs=scores.pairs(source),
        examples=scores.examples(source),
        tunings=learning.trainings(source, "tune_teacher"),
        trainings=learning.trainings(source, "warm_up", "train_student"),
        syntheses=learning.syntheses(source),
        cost=costs.costs(source),
        versions=versions,
        artifacts=[
            Artifact(
                name=manifest.artifact, stage=name, rows=manifest.rows, digest=manifest.digest,
                inputs=manifest.identity.inputs,
            )
            for name, manifest in source.manifests.items()
        ],
        notes=list(dict.fromkeys(event["text"] for event in source.events if event["event"] == "note")),
        config=source.config.model_dump(mode="json"),
    )  # fmt: skip


def _what(source: Source) -> str:
    """Teacher, student, iterations, rows."""
    config = source.config
    student = _model(config.student.model)
    if config.student.drop_layers:
        student += f" without {count(len(config.student.drop_layers), 'layer')}"
    rows = {stage.output: source.manifests[stage.name].rows for stage, _, _ in source.finished(*_COUNTED)}
    if not isinstance(config, Config):
        return f"{count(rows.get('inputs/examples') or 0, 'example')} for the student {student}{_scored(source)}."
    totals = {
        "examples written": _total(rows, "responses"),
        "scored": sum(manifest.details["scored"] for _, manifest, _ in source.finished("score")),
        "preference pairs": _total(rows, "pairs"),
        "in the training set": _total(rows, "training_set"),
    }
    amounts = listed([f"{amount:,} {what}" for what, amount in totals.items() if amount])
    if config.compare is not None:
        return (
            f"The teacher {_model(config.teacher.model)} and the student {student} in "
            f"{count(len(config.compare.arms), 'arm')} ({listed(list(config.compare.arms))})"
            f"{f'; in all of them together {amounts}' if amounts else ''}."
        )
    return (
        f"The teacher {_model(config.teacher.model)} writes for the student {student}: "
        f"{count(config.iterations, 'iteration')}{f', {amounts}' if amounts else ''}."
    )


def _scored(source: Source) -> str:
    """`: 58 scored, 2 without a score (empty response: 2)`, once they are."""
    for _, manifest, _ in source.finished("score"):
        left = manifest.details["quarantined"]
        reasons = "; ".join(f"{reason}: {amount}" for reason, amount in left.items())
        without = f", {sum(left.values()):,} without a score ({reasons})" if left else ""
        return f": {manifest.details['scored']:,} scored{without}"
    return ", not scored yet"


_COUNTED = ("responses", "score", "pair", "training_set", "examples")


def _total(rows: dict[str, int | None], artifact: str) -> int:
    return sum(amount or 0 for name, amount in rows.items() if name.endswith(f"/{artifact}"))


def _model(name: str) -> str:
    """A model's own name, without the way to it."""
    return name.rstrip("/").rsplit("/", 1)[-1].removeprefix("embedded:")
