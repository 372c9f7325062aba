"""The result: losses of the students and influence of fresh instructions, with intervals and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from montessori_ray.evaluation.fresh import COLUMNS, Groups, by_place, share_helpful
from montessori_ray.evaluation.statistics import grouped_mean, mean_interval, welch_difference
from montessori_ray.report.plots import MAX_DOTS, quantiles
from montessori_ray.report.source import Source
from montessori_ray.report.words import Scale, count, number, percent, plus_minus, span
from montessori_ray.telemetry.console import said_of_win_rate

SMALLEST_INFLUENCE = 0.1
"""Influences below this are given in powers of ten: they are small changes of a loss."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean with its uncertainty."""

    mean: float
    se: float
    """Standard error; NaN where it is not known: of a single value or few-shot prompt."""
    low: float
    """Lower end of the 95 % interval (Student's t)."""
    high: float
    """Upper end."""
    count: int
    """Values it is the mean of."""

    @property
    def settled(self) -> bool:
        """Whether there is an interval, and it excludes zero."""
        return self.low < self.high and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Losses of a student on a set, and their change from the original student's, paired by row."""

    student: str
    set: str
    loss: Mean
    change: Mean | None


@dataclass(frozen=True, kw_only=True)
class Category:
    """Change of the trained student's held-out loss in one category, paired by row."""

    category: str
    change: Mean


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """Influence of what one teacher wrote to the prompts that all teachers are shown."""

    teacher: str
    influence: Mean
    share_helpful: float
    values: list[float]
    """The influences, or 200 quantiles of more."""
    change: Mean | None
    """From the original teacher's mean."""


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, standard error and interval of values taken as independent."""
    return Mean(**mean_interval(values)._asdict(), count=len(values))


def mean_of_groups(groups: Groups) -> Mean:
    """The same of values in groups, which alone are independent: of a few-shot prompt's examples."""
    return Mean(**grouped_mean(groups)._asdict(), count=sum(map(len, groups)))


# -- losses ---------------------------------------------------------------------------------------------------------

FRESH_OF_LOOP = "final/score_fresh"
"""A comparison scores the fresh instructions of all arms together; see `arms`."""

_ORIGINAL, _TRAINED, _HELD_OUT = "original", "trained", "held_out"


def losses(source: Source) -> list[Loss]:
    """Losses of every student on every set."""
    tables = _loss_rows(source)
    found = []
    for (student, of_set), rows in tables.items():
        original = tables.get((_ORIGINAL, of_set), {})
        paired = [loss - original[id][0] for id, (loss, _) in rows.items() if id in original]
        change = mean_of(paired) if paired and student != _ORIGINAL else None
        found.append(
            Loss(student=student, set=of_set, loss=mean_of([loss for loss, _ in rows.values()]), change=change)
        )
    return found


def categories(source: Source) -> list[Category]:
    """By category of the held-out rows, where they have at least two; most improved first."""
    tables = _loss_rows(source)
    trained, original = (tables.get((student, _HELD_OUT), {}) for student in (_TRAINED, _ORIGINAL))
    changes: dict[str, list[float]] = {}
    for id, (loss, category) in trained.items():
        if category and id in original:
            changes.setdefault(category, []).append(loss - original[id][0])
    if len(changes) < 2:
        return []
    found = [Category(category=name, change=mean_of(values)) for name, values in changes.items() if len(values) > 1]
    return sorted(found, key=lambda entry: entry.change.mean)


def _loss_rows(source: Source) -> dict[tuple[str, str], dict[str, tuple[float, str | None]]]:
    """(student, set) -> example id -> loss and category."""
    found: dict[tuple[str, str], dict[str, tuple[float, str | None]]] = {}
    for _, _, artifact in source.finished("evaluate"):
        if source.has(artifact, ("student", "set", "example_id", "loss")):
            for row in artifact.rows():
                found.setdefault((row["student"], row["set"]), {})[row["example_id"]] = (row["loss"], row["category"])
    return found


# -- fresh instructions ---------------------------------------------------------------------------------------------


def fresh(source: Source) -> list[Fresh]:
    """By teacher, the original one first."""
    tables = [
        artifact.rows(COLUMNS)
        for stage, _, artifact in source.finished("score_fresh")
        if stage.name == FRESH_OF_LOOP and source.has(artifact, COLUMNS)
    ]
    teachers = list(by_place(chain(*tables)).values())
    return [_fresh_of(groups, teachers[0] if tuned else None, tuned) for tuned, groups in enumerate(teachers)]


def _fresh_of(groups: Groups, first: Groups | None, tuned: int) -> Fresh:
    values = [value for group in groups for value in group]
    change = None
    if first is not None and min(len(groups), len(first)) > 1:
        change = Mean(**welch_difference(groups, first)._asdict(), count=len(values) + sum(map(len, first)))
    return Fresh(
        teacher=f"tuned {tuned}x" if tuned else _ORIGINAL,
        influence=mean_of_groups(groups),
        share_helpful=share_helpful(groups),
        values=quantiles(values, MAX_DOTS),
        change=change,
    )


# -- sentences ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One result in words."""

    headline: str
    detail: str
    """The numbers it rests on."""


def sentences(source: Source) -> list[Sentence]:
    """What came out, the result of the student first; a difference within its noise is called that."""
    return [
        *_said_of_losses(losses(source)),
        *_said_of_fresh(fresh(source)),
        *_said_of_win_rate(win_rate(source)),
        *_said_of_scores(source),
    ]


def _said_of_losses(found: Sequence[Loss]) -> list[Sentence]:
    by_student = {entry.student: entry for entry in found if entry.set == _HELD_OUT}
    trained, original = by_student.get(_TRAINED), by_student.get(_ORIGINAL)
    if trained is None or original is None or trained.change is None:
        return []
    change = trained.change
    size = plus_minus(abs(change.mean), change.se)
    headline = f"The student's held-out loss {'fell' if change.mean < 0 else 'rose'} by {size}."
    if not change.settled:
        headline = f"The student's held-out loss shows no difference beyond noise: {_signed(change)}."
    detail = (
        f"From {number(original.loss.mean)} of the original student to {number(trained.loss.mean)} after training on "
        f"what the last teacher wrote; {_interval(change)}, paired over {count(change.count, 'held-out row')}."
    )
    return [Sentence(headline=headline, detail=detail)]


def _said_of_fresh(found: Sequence[Fresh]) -> list[Sentence]:
    if len(found) < 2 or found[-1].change is None:
        return []
    first, last, change = found[0].influence, found[-1].influence, found[-1].change
    headline = f"What the tuned teacher writes helps {'more' if change.mean < 0 else 'less'}: {_signed(change)}."
    if not change.settled:
        headline = f"What the tuned teacher writes shows no difference beyond noise: {_signed(change)}."
    scale = Scale.of(first.mean, last.mean, smallest=SMALLEST_INFLUENCE)
    detail = (
        f"Mean influence of fresh instructions: {scale.plus_minus(first.mean, first.se)} by the original teacher, "
        f"{scale.plus_minus(last.mean, last.se)} by the tuned one; 95 % interval of the change "
        f"{scale.span(change.low, change.high)}. {_unit(scale)}egative helps."
    )
    return [Sentence(headline=headline, detail=detail)]


def win_rate(source: Source) -> dict[str, Any] | None:
    """What `evaluation.judge.win_rate` found, the judge's name and the length-controlled rate; None without a judge."""
    return next((manifest.details for _, manifest, _ in source.finished("win_rate")), None)


def _said_of_win_rate(found: dict[str, Any] | None) -> list[Sentence]:
    if found is None:
        return []
    headline, *detail = said_of_win_rate(found)
    return [Sentence(headline=f"{headline}.", detail=f"{'. '.join(map(_capital, detail))}.")]


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _said_of_scores(source: Source) -> list[Sentence]:
    """Of a run that only scores examples: how many help."""
    scored = [manifest.details for stage, manifest, _ in source.finished("score") if "/" not in stage.name]
    if not scored or not scored[0].get("scored"):
        return []
    details: dict[str, Any] = scored[0]
    mean = details["influence"]
    headline = f"{percent(details['share_helpful'])} of {count(details['scored'], 'example')} help the student."
    scale = Scale.of(details["spread"] or mean["mean"], smallest=SMALLEST_INFLUENCE)
    detail = (
        f"Mean influence {scale.plus_minus(mean['mean'], mean['se'])}, spread {scale.number(details['spread'])}. "
        f"{_unit(scale)}egative helps."
    )
    return [Sentence(headline=headline, detail=detail)]


def _unit(scale: Scale) -> str:
    """The beginning of a sentence that ends with `egative helps`."""
    return f"In {scale.unit}; n" if scale.unit else "N"


def _signed(change: Mean) -> str:
    return plus_minus(change.mean, change.se, sign=True)


def _interval(change: Mean) -> str:
    return f"95 % interval {span(change.low, change.high)}"
