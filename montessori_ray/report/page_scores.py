"""Sections on influence: its distributions and their worth, the pairs, examples to read."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from montessori_ray.report import plots
from montessori_ray.report.collect import Report
from montessori_ray.report.html import details, figure, figures, join, paragraph, subtitle, table
from montessori_ray.report.page_results import INFLUENCE, influence_scale
from montessori_ray.report.scores import Example, Examples, Influence, Pairs
from montessori_ray.report.words import NONE, Scale, count, number, percent

UNPAIRED = {
    "single_example": "fewer than two different outputs scored",
    "all_helpful": "all outputs help",
    "all_harmful": "all outputs harm",
    "within_noise": "both signs, but not beyond the noise",
}
"""Why a prompt has no pair (`preferences.Unpaired`), for people."""

VISIBLE = 1 / 20
"""Share of a bin below which the width of a band cannot be seen."""


def influence(report: Report) -> Markup | None:
    """Distributions with their noise, and how well scores agree with exact ones."""
    if not report.influences:
        return None
    scale = influence_scale(report)
    rows = [
        (entry.name, entry.estimator, f"{entry.mean.count:,}", scale.plus_minus(entry.mean.mean, entry.mean.se),
         percent(entry.share_helpful), scale.number(entry.mean_se, digits=2), scale.number(entry.noise, digits=2))
        for entry in report.influences
    ]  # fmt: skip
    sizes = (scale.label("mean"), "help", scale.label("SE of a score"), scale.label("noise"))
    heads = ("stage", "estimator", "scored", *sizes)
    note = (
        "How much the student's loss on the reference set changes when it takes one step on an example alone. SE of a "
        "score: its mean standard error over the reference rows. Noise: what estimator and precision put into a score, "
        "measured on examples that were scored a second time, exactly and in float32."
    )
    measured = [entry for entry in report.influences if len(entry.rechecked) > 1 and entry.recheck]
    drawn = [_histogram(entry, scale) for entry in report.influences if not entry.fresh]
    drawn += [_agreement(entry, scale) for entry in measured]
    return join(
        [
            paragraph(note, kind="note"),
            figures(*drawn),
            table(heads, rows, numbers=(2, 3, 4, 5, 6)),
            _agreements(measured) if measured else "",
            *(paragraph(sentence, kind="note") for entry in report.influences for sentence in _remarks(entry)),
        ]
    )


def _histogram(entry: Influence, scale: Scale) -> Markup:
    noise, error = entry.noise or 0.0, entry.mean_se or 0.0
    seen = VISIBLE * (entry.edges[1] - entry.edges[0])
    keys = [("helpful", "helps"), ("harmful", "harms")]
    if error > seen:
        keys.append(("noise", f"± one standard error ({scale.in_unit(scale.number(error, digits=2))})"))
    caption = f"{count(entry.mean.count, 'example')}, {percent(entry.share_helpful)} of them help."
    said_noise = scale.in_unit(scale.number(noise, digits=2))
    if noise > seen:
        caption += f" Bars are pale within the noise of a score, ± {said_noise}."
    elif noise:
        caption += f" The noise of a score, {said_noise}, is too little to be seen here."
    low, high = (scale.number(value) for value in entry.extremes)
    if entry.extremes[0] < entry.edges[0] or entry.extremes[1] > entry.edges[-1]:
        caption += f" The outermost bars hold what lies beyond them too: scores go from {low} to {scale.in_unit(high)}."
    title = f"Influence, {_of(entry)}"
    plot = plots.histogram(
        f"influence-{_id(entry)}", title, entry.edges, entry.counts, xlabel=INFLUENCE, ylabel="examples",
        extremes=entry.extremes, scale=scale, noise=noise, error=error,
    )  # fmt: skip
    return figure(title, plot, caption, keys)


def _agreements(measured: list[Influence]) -> Markup:
    rows = []
    for entry in measured:
        again = entry.recheck or {}
        correlations = [NONE if again[name] is None else f"{again[name]:.3f}" for name in ("spearman", "pearson")]
        changed = f"{again['pairs_changed']} of {again['pairs']}"
        rows.append((entry.name, f"{again['points']}", *correlations, percent(again["same_sign"]), changed))
    heads = (
        "stage",
        "scored twice",
        "rank correlation",
        "correlation",
        "same sign",
        "pairs by sign that only one scoring gives",
    )
    return table(heads, rows, numbers=(1, 2, 3, 4, 5))


def _agreement(entry: Influence, scale: Scale) -> Markup:
    title = f"Scored by {entry.estimator}, and again, {_of(entry)}"
    plot = plots.scatter(
        f"agreement-{_id(entry)}", title, entry.rechecked, xlabel="influence", ylabel="scored again",
        scale=scale, noise=entry.noise or 0.0,
    )  # fmt: skip
    caption = "On the line both scores are equal; the band is the noise."
    if entry.estimator == "exact" and not entry.noise:
        caption = "The estimator is exact in float32 already, so all lie on the line."
    return figure(title, plot, caption)


def _remarks(entry: Influence) -> Iterable[str]:
    """What influence was measured from, and which examples have none."""
    if len(entry.baselines) == 2 and not entry.fresh:  # the first iteration's again
        warmed, null_step = (number(entry.baselines[name], digits=4) for name in ("warmed_loss", "null_step_loss"))
        yield f"{entry.name}: the warmed student's reference loss is {warmed}, after a null step {null_step}."
    for reason, amount in entry.quarantined.items():
        yield f"{entry.name}: {count(amount, 'example')} without a score ({reason})."


def _of(entry: Influence) -> str:
    if not entry.fresh:
        return entry.place or "all examples"
    loop, _, _ = entry.place.rpartition(", ")  # what is left is where it was measured: at the end, or in a comparison
    return ", ".join(filter(None, [loop, "fresh instructions of all teachers"]))


def _id(entry: Influence) -> str:
    return entry.name.replace("/", "-")


# -- pairs ----------------------------------------------------------------------------------------------------------


def pairs(report: Report) -> Markup | None:
    """How many prompts gave pairs, and why others did not."""
    if not report.pairs:
        return None
    note = (
        "Among the outputs of one few-shot prompt, helpful ones are chosen and harmful ones rejected; a prompt without "
        "both gives no pair."
    )
    return join([paragraph(note, kind="note"), figures(*map(_prompts, report.pairs))])


def _prompts(entry: Pairs) -> Markup:
    paired = entry.prompts - sum(entry.without.values())
    rows = [plots.Bar(label="with a pair", value=paired, note=f"{paired:,}", role="helpful")]
    rows += [
        plots.Bar(label=UNPAIRED.get(reason, reason), value=amount, note=f"{amount:,}")
        for reason, amount in sorted(entry.without.items(), key=lambda item: -item[1])
    ]
    plot = plots.bars(
        f"pairs-{entry.name.replace('/', '-')}", "Prompts with and without a pair", rows, xlabel="prompts"
    )
    caption = f"{count(entry.pairs, 'pair')} kept"
    caption += f"; scores closer to zero than {number(entry.noise, digits=2)} make none." if entry.noise else "."
    return figure(f"Few-shot prompts, {entry.place}", plot, caption)


# -- examples -------------------------------------------------------------------------------------------------------


def examples(report: Report) -> Markup | None:
    """Tables of the ends of every distribution and of the widest pairs; the last iteration's are open."""
    if not report.examples:
        return None
    scale = influence_scale(report)
    shown = [join(_examples_of(entry, scale)) for entry in report.examples]
    earlier = [
        details(f"Examples of {entry.place}", body) for entry, body in zip(report.examples[:-1], shown, strict=False)
    ]
    return join([shown[-1], *earlier])


def _examples_of(entry: Examples, scale: Scale) -> Iterable[Markup]:
    where = f", {entry.place}" if entry.place else ""
    heads = (scale.label("influence"), "instruction", "response")
    for words, shown in (("Most helpful", entry.helpful), ("Most harmful", entry.harmful)):
        if shown:
            yield subtitle(f"{words}{where}")
            rows = [(_score(row, scale), row.instruction, row.response) for row in shown]
            yield table(heads, rows, numbers=(0,), caption=f"{words}{where}", search=True)
    if entry.pairs:
        rows = [
            (f"{scale.number(pair.chosen_influence)} / {scale.number(pair.rejected_influence, sign=True)}",
             pair.chosen, pair.rejected)
            for pair in entry.pairs
        ]  # fmt: skip
        yield subtitle(f"Widest preference pairs{where}")
        heads = (scale.label("influence"), "chosen", "rejected")
        yield table(heads, rows, numbers=(0,), caption=f"Preference pairs{where}", search=True)


def _score(row: Example, scale: Scale) -> Markup | str:
    said = (
        scale.number(row.influence) if row.influence_se is None else scale.plus_minus(row.influence, row.influence_se)
    )
    return Markup('<span class="{}">{}</span>').format("good" if row.influence < 0 else "bad", said)
