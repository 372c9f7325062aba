"""A comparison: what its arms' students and teachers are like, and how they differ from one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from montessori_ray.config import Config
from montessori_ray.report import plots
from montessori_ray.report.html import figure, figures, join, paragraph, table
from montessori_ray.report.results import SMALLEST_INFLUENCE, Mean, Sentence
from montessori_ray.report.source import Source
from montessori_ray.report.words import NONE, Scale, percent
from montessori_ray.telemetry.console import say_counts

MEASURES = {
    "held_out_loss": ("Held-out loss", "change of the loss, nats a token"),
    "fresh_influence": ("Influence of fresh instructions", "change of the influence"),
    "fresh_influence_alone": ("Influence of fresh ones alone", "change of the influence"),
}
"""Measure of `stages.compare` -> its title, and what a difference is in."""

SMALLEST = {"held_out_loss": 0.01} | dict.fromkeys(("fresh_influence", "fresh_influence_alone"), SMALLEST_INFLUENCE)
"""Measure -> the size below which its numbers are given in powers of ten."""

AS_THEY_ARE = ("arm", "measure", "category", "models", "value", "value_se", "count", "value_by_model", "share_helpful")
"""Columns of a measure's row that `Arm` has as fields."""


OF_INSTRUCTIONS = ("self_rouge_l", "distinct_2", "sampled", "first_words", "effective_first_words", "words")
"""Measures of instructions (`evaluation.diversity`) that `Data` has as fields."""

FIRST_WORDS = 5
"""First words that are told of each arm."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm by one measure."""

    arm: str
    measure: str
    category: str | None
    """Of the held-out rows it is about; None: all of them."""
    models: int
    """Students or teachers that were measured."""
    value: float
    value_se: float
    count: int
    """Held-out rows, or fresh examples of all its teachers."""
    value_by_model: list[float]
    share_helpful: float | None
    difference: Mean | None
    """From the arm all are compared with, None for itself; `count` is the number of models."""
    sentence: str | None


@dataclass(frozen=True, kw_only=True)
class Data:
    """What an arm's teachers write afresh, and how much its students saw."""

    arm: str
    parse_rate: float
    duplicate_rate: float
    self_rouge_l: float | None
    """Of each teacher's instructions, the mean over teachers."""
    distinct_2: float | None
    """Different pairs of words as a share of all; likewise."""
    sampled: int
    """Instructions of each teacher that both were measured on, the same number in all arms."""
    first_words: dict[str, float]
    """The most frequent first words of instructions and their shares, most first."""
    effective_first_words: float
    """How many equally frequent ones would be as varied."""
    words: float
    """Of an instruction, on average."""
    answer_tokens: float
    kept: int
    """Fresh instructions that passed the filters."""
    near_reference: int
    """Those of them that nearly repeat a reference row, which no set takes in."""
    near_held_out: int
    training_rows: list[int]
    training_tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The result of a comparison."""

    against: str
    independent: bool
    """Whether every seed had a loop of its own."""
    tuning_seeds: int
    """Teachers tuned of each arm that tunes one, on the same pairs where seeds are not independent."""
    student_seeds: int
    measures: list[Arm]
    data: list[Data]

    def of(self, measure: str) -> list[Arm]:
        """The arms by this measure."""
        return [arm for arm in self.measures if arm.measure == measure and arm.category is None]

    def of_category(self, category: str) -> list[Arm]:
        """The arms by held-out loss in one category of rows."""
        return [arm for arm in self.measures if arm.category == category]


def arms(source: Source) -> Arms | None:
    """The comparison of a run, None where there is none (yet)."""
    manifest = source.run.artifact("compare/result").manifest()
    if manifest is None:
        return None
    details = manifest.details
    measures = [
        Arm(
            **{name: row[name] for name in AS_THEY_ARE},
            sentence=row["sentence"],
            difference=None if row["difference"] is None else Mean(
                mean=row["difference"], se=row["difference_se"], low=row["low"], high=row["high"],
                count=row["models"],
            ),
        )
        for row in details["measures"]
    ]  # fmt: skip
    data = [
        Data(
            arm=arm, parse_rate=told["fresh"]["parse_rate"], duplicate_rate=told["fresh"]["duplicate_rate"],
            **{name: told["fresh"]["instructions"][name] for name in OF_INSTRUCTIONS},
            answer_tokens=told["fresh"]["responses"]["tokens"],
            kept=told["fresh"]["kept"], near_reference=told["fresh"]["overlap"]["reference"]["near"],
            near_held_out=told["fresh"]["overlap"]["held_out"]["near"],
            training_rows=told["training_rows"], training_tokens=told["training_tokens"],
        )
        for arm, told in details["data"].items()
    ]  # fmt: skip
    assert isinstance(source.config, Config), "scores of a file have no arms"
    compared = source.config.compare
    assert compared is not None, "the result of a comparison"
    return Arms(
        against=details["against"], independent=details["independent"],
        tuning_seeds=len(compared.tuning_seeds), student_seeds=len(compared.student_seeds),
        measures=measures, data=data,
    )  # fmt: skip


def sentences(found: Arms | None) -> list[Sentence]:
    """What a comparison says of each arm's students."""
    if found is None:
        return []
    return [
        Sentence(headline=f"{named(arm.arm)}: held-out loss against {named(found.against)}", detail=arm.sentence)
        for arm in found.of("held_out_loss")
        if arm.sentence
    ]


def section(found: Arms | None) -> Markup | None:
    """Both measures as a forest plot and a table, then the data."""
    if found is None:
        return None
    drawn = [_forest(found, measure) for measure in MEASURES if any(arm.difference for arm in found.of(measure))]
    note = (
        f"All arms share everything but one choice; differences are from {named(found.against)}. Losses are paired by "
        f"row and seed, and their intervals hold for {_repeated(found)}; {_said_of_influence(found)} Lower is better."
    )
    if found.of("fresh_influence_alone"):
        note += (
            " The original teacher's probing examples count as fresh, as they are scored as these are; the last plot "
            "and table are without them."
        )
    tables = [_table(found, measure) for measure in MEASURES if found.of(measure)]
    return join([paragraph(note, kind="note"), figures(*drawn), *tables, _by_category(found), _data(found.data)])


def _said_of_influence(found: Arms) -> str:
    if found.independent:
        return (
            "every seed has a loop of its own, with data, pairs and models drawn anew, and influences, measured on the "
            "loop's warmed student, are compared loop by loop, so that both intervals hold for other loops."
        )
    return "teachers write different texts, so influences are not paired, and their intervals are about these teachers."


def _repeated(found: Arms) -> str:
    """What the losses' intervals hold for."""
    if found.tuning_seeds == found.student_seeds == 1:
        return "other rows, not for other seeds"
    if found.tuning_seeds == 1:
        return "other rows and students, not for other teachers"
    if found.student_seeds == 1:
        return "other rows and teachers, not for other seeds of their students"
    return "other rows and seeds"


def named(arm: str) -> str:
    """`shuffled_labels` -> `shuffled labels`."""
    return arm.replace("_", " ")


def _forest(found: Arms, measure: str) -> Markup:
    title, unit = MEASURES[measure]
    changed = [(arm, arm.difference) for arm in found.of(measure) if arm.difference]
    scale = Scale.of(*(end for _, change in changed for end in (change.low, change.high)), smallest=SMALLEST[measure])
    rows = [
        plots.Interval(
            label=named(arm.arm), mean=change.mean, low=change.low, high=change.high,
            note=scale.plus_minus(change.mean, change.se, sign=True),
        )
        for arm, change in changed
    ]  # fmt: skip
    plot = plots.forest(f"arms-{measure}", f"{title}: difference by arm", rows, xlabel=unit, scale=scale)
    caption = "Lines are 95 % intervals. A hollow grey mark is a difference within noise."
    return figure(f"{title} against {named(found.against)}", plot, caption)


def _table(found: Arms, measure: str) -> Markup:
    arms_of = found.of(measure)
    values = Scale.of(*(arm.value for arm in arms_of), smallest=SMALLEST[measure])
    ends = (end for arm in arms_of if arm.difference for end in (arm.difference.low, arm.difference.high))
    changes = Scale.of(*ends, smallest=SMALLEST[measure])
    title, _ = MEASURES[measure]
    rows = [
        (
            named(arm.arm), f"{arm.models}", f"{arm.count:,}", values.plus_minus(arm.value, arm.value_se),
            _spread(arm, values),
            NONE if arm.share_helpful is None else percent(arm.share_helpful),
            NONE if arm.difference is None else changes.plus_minus(arm.difference.mean, arm.difference.se, sign=True),
            NONE if arm.difference is None else changes.span(arm.difference.low, arm.difference.high),
        )
        for arm in arms_of
    ]  # fmt: skip
    models, of = ("students", "rows") if measure == "held_out_loss" else ("teachers", "examples")
    heads = (
        "arm",
        models,
        of,
        values.label(title.lower()),
        "lowest to highest",
        "help",
        changes.label("difference"),
        "95 % interval",
    )
    return table(heads, rows, numbers=range(1, len(heads)))


def _by_category(found: Arms) -> Markup:
    """Change of the held-out loss in every category of rows; nothing where the rows have none."""
    categories = list(dict.fromkeys(arm.category for arm in found.measures if arm.category))
    if not categories:
        return Markup()
    arms_of = {category: [arm for arm in found.of_category(category) if arm.difference] for category in categories}
    scale = Scale.of(*(arm.difference.mean for told in arms_of.values() for arm in told if arm.difference))
    rows = [
        (
            category,
            *(scale.plus_minus(arm.difference.mean, arm.difference.se, sign=True) for arm in told if arm.difference),
        )
        for category, told in arms_of.items()
    ]  # fmt: skip
    names = [named(arm.arm) for arm in next(iter(arms_of.values()))]
    return table((scale.label("held-out loss by category: difference"), *names), rows, numbers=range(1, 1 + len(names)))


def _spread(arm: Arm, values: Scale) -> str:
    """How far the arm's models lie apart."""
    lowest, highest = min(arm.value_by_model), max(arm.value_by_model)
    return NONE if lowest == highest else values.span(lowest, highest)


def _data(data: Sequence[Data]) -> Markup:
    rows = [
        (
            named(arm.arm), f"{arm.parse_rate:.1%}", f"{arm.duplicate_rate:.1%}", f"{arm.answer_tokens:.0f}",
            f"{arm.near_reference:,} / {arm.near_held_out:,} of {arm.kept:,}",
            say_counts(arm.training_rows), say_counts(arm.training_tokens),
        )
        for arm in data
    ]  # fmt: skip
    heads = (
        "arm", "parsed", "duplicates", "tokens an answer", "near reference / held-out", "training rows",
        "training tokens",
    )  # fmt: skip
    note = (
        "What the teachers write afresh, and how much the students trained on. No set takes in an example near a "
        "reference row, and no training set one near a held-out row; nothing else reads held-out rows before the "
        "students are measured on them."
    )
    return join([paragraph(note, kind="note"), table(heads, rows, numbers=range(1, len(heads))), _instructions(data)])


def _instructions(data: Sequence[Data]) -> Markup:
    """What the teachers ask for, and how varied it is."""
    rows = [
        (
            named(arm.arm), f"{arm.words:.0f}", *_shares(arm.self_rouge_l, arm.distinct_2),
            f"{arm.effective_first_words:.0f}",
            ", ".join(f"{word} {percent(share)}" for word, share in list(arm.first_words.items())[:FIRST_WORDS]),
        )
        for arm in data
    ]  # fmt: skip
    heads = ("arm", "words an instruction", "self-ROUGE-L", "distinct-2", "first words", "most frequent ones")
    note = (
        "What they ask for. Self-ROUGE-L is lower and distinct-2 (different pairs of words as a share of all) higher "
        f"where instructions vary more; both are of {data[0].sampled:,} instructions of each teacher, and the mean "
        "over an arm's teachers. First words are given as how many equally frequent ones would be as varied."
    )
    return join([paragraph(note, kind="note"), table(heads, rows, numbers=range(1, len(heads) - 1))])


def _shares(*values: float | None) -> Iterator[str]:
    return (NONE if value is None else f"{value:.2f}" for value in values)
