"""Sections on what came out: the student's losses, and what the teacher learned."""

from __future__ import annotations

from markupsafe import Markup

from montessori_ray.report import plots
from montessori_ray.report.collect import Report
from montessori_ray.report.html import figure, figures, join, paragraph, stack, table
from montessori_ray.report.results import SMALLEST_INFLUENCE, Mean
from montessori_ray.report.words import NONE, Scale, percent

LOSS = "change of the loss, nats a token"
INFLUENCE = "influence (change of the reference loss)"
PLAIN = Scale()


def student(report: Report) -> Markup | None:
    """Losses of the students, their change from the original one, by category where the data has one."""
    if not report.losses:
        return None
    rows = [
        (f"{loss.student}, {_set(loss.set)} ({loss.loss.count})", PLAIN.plus_minus(loss.loss.mean, loss.loss.se),
         change_cell(loss.change, PLAIN), interval_cell(loss.change, PLAIN))
        for loss in report.losses
    ]  # fmt: skip
    changed = [_row(f"{loss.student}, {_set(loss.set)}", loss.change) for loss in report.losses if loss.change]
    heads = ("student, rows", "loss", "change", "95 % interval")
    cells = [table(heads, rows, numbers=(1, 2, 3))]
    if changed:
        plot = plots.forest("losses", "Change of the student's loss", changed, xlabel=LOSS)
        caption = "Paired by row; lines are 95 % intervals. A hollow grey mark is a change within noise."
        cells.insert(0, figure("Change of the loss against the original student", plot, caption))
    drawn = [stack(*cells)]
    if report.categories:
        drawn.append(_categories(report))
    note = (
        "Mean cross entropy over the response tokens of a row, then over rows; ± is one standard error over rows. Of "
        "the held-out rows no stage has seen more than their instructions, to keep rows near them out of the training "
        "set; the reference rows define influence."
    )
    return join([paragraph(note, kind="note"), figures(*drawn)])


def _categories(report: Report) -> Markup:
    rows = [_row(f"{entry.category} ({entry.change.count})", entry.change) for entry in report.categories]
    plot = plots.forest("categories", "Change of held-out loss by category", rows, xlabel=LOSS)
    caption = (
        f"The trained student; in brackets the rows of a category. Of these {len(rows)} intervals of 95 % one in "
        "twenty excludes zero by chance."
    )
    return figure("Held-out change by category", plot, caption)


def teacher(report: Report) -> Markup | None:
    """Influence of fresh instructions, original against tuned teachers."""
    if not report.fresh:
        return None
    scale = influence_scale(report)
    rows = [
        plots.Values(
            label=f"{entry.teacher} ({entry.influence.count})", values=entry.values, mean=entry.influence.mean,
            low=entry.influence.low, high=entry.influence.high, note=f"{percent(entry.share_helpful)} help",
            role="neutral" if entry.change is None else "helpful",
        )
        for entry in report.fresh
    ]  # fmt: skip
    cells = [
        (f"{entry.teacher} ({entry.influence.count})", scale.plus_minus(entry.influence.mean, entry.influence.se),
         percent(entry.share_helpful), change_cell(entry.change, scale), interval_cell(entry.change, scale))
        for entry in report.fresh
    ]  # fmt: skip
    note = (
        "Every teacher wrote to the same prompts, and all of it was scored against the same warmed student: only the "
        "teachers differ. Left of zero helps."
    )
    plot = plots.dots("fresh", "Influence of fresh instructions by teacher", rows, xlabel=INFLUENCE, scale=scale)
    caption = "A dot is an example; the diamond is the mean with its 95 % interval."
    heads = ("teacher", scale.label("mean"), "help", scale.label("change"), "95 % interval")
    drawn = figures(figure("Influence of fresh instructions", plot, caption), table(heads, cells, numbers=(1, 2, 3, 4)))
    return join([paragraph(note, kind="note"), drawn])


def influence_scale(report: Report) -> Scale:
    """The power of ten that every influence of a report is given in."""
    ends = (end for entry in report.influences for end in (entry.edges[0], entry.edges[-1]))
    return Scale.of(*ends, smallest=SMALLEST_INFLUENCE)


def change_cell(change: Mean | None, scale: Scale) -> Markup | str:
    """A change with its standard error, in colour where it is more than noise."""
    if change is None:
        return NONE
    kind = "" if not change.settled else "good" if change.mean < 0 else "bad"
    return Markup('<span class="{}">{}</span>').format(kind, scale.plus_minus(change.mean, change.se, sign=True))


def interval_cell(change: Mean | None, scale: Scale) -> str:
    """The interval of a change."""
    return NONE if change is None else scale.span(change.low, change.high)


def _row(label: str, change: Mean) -> plots.Interval:
    note = PLAIN.plus_minus(change.mean, change.se, sign=True)
    return plots.Interval(label=label, mean=change.mean, low=change.low, high=change.high, note=note)


def _set(name: str) -> str:
    return name.replace("_", "-")
