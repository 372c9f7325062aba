"""Sections on the work: trainings, what was written, time and cost, environment."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from markupsafe import Markup

from montessori_ray.report import plots
from montessori_ray.report.collect import Report
from montessori_ray.report.colours import NUM_SERIES, series
from montessori_ray.report.costs import Costs
from montessori_ray.report.html import bar_cell, details, figure, figures, join, paragraph, preformatted, table
from montessori_ray.report.learning import Training, reasons
from montessori_ray.report.scores import Influence
from montessori_ray.report.source import arm_of
from montessori_ray.report.words import NONE, count, duration, number, percent
from montessori_ray.telemetry.console import clock

METRICS = {
    "loss": "DPO loss",
    "reward_margin": "reward margin",
    "reward_accuracy": "reward accuracy",
    "logp_chosen": "log p, chosen",
    "logp_rejected": "log p, rejected",
}
"""What is measured on pairs, for people."""

SHORT = 0.01
"""Share of the time below which a stage is not listed by itself."""


def tuning(report: Report) -> Markup | None:
    """DPO: its curves, and pairs kept out of training before and after."""
    metrics = (
        ("loss", "Loss while tuning", "loss"),
        ("reward_margin", "Reward margin", "chosen less rejected"),
        ("reward_accuracy", "Reward accuracy", "share of pairs"),
    )
    drawn = [
        figure(title, plot, "", _keys(report.tunings))
        for metric, title, unit in metrics
        if (plot := _curves(f"dpo-{metric}", title, report.tunings, metric, unit))
    ]
    rows = [
        (_evaluated_on(entry), *(f"{number(before[metric])} → {number(after[metric])}" for metric in METRICS))
        for entry in report.tunings
        if (before := entry.details.get("eval_before")) and (after := entry.details.get("eval_after"))
    ]
    heads = ("pairs kept out of training, before → after", *METRICS.values())
    parts = [figures(*drawn)] if drawn else []
    if rows:
        parts.append(table(heads, rows, numbers=range(1, len(heads))))
    return join(parts) if parts else None


def _evaluated_on(entry: Training) -> str:
    amount = entry.details.get("pairs", {}).get("evaluation")
    return entry.place if amount is None else f"{entry.place} ({count(amount, 'pair')})"


def training(report: Report) -> Markup | None:
    """Loss of the student while it is warmed up and trained."""
    plot = _curves("training", "Loss of the student while it trains", report.trainings, "loss", "nats a token")
    rows = [
        (entry.name, f"{entry.details['steps']:,}", f"{entry.details['tokens']:,}", number(entry.details["loss_first"]),
         number(entry.details["loss_last"]), f"{entry.details['tokens'] / max(entry.details['seconds'], 1e-9):,.0f}")
        for entry in report.trainings if "loss_last" in entry.details
    ]  # fmt: skip
    if plot is None and not rows:
        return None
    heads = ("stage", "steps", "response tokens", "first loss", "last loss", "tokens/s")
    caption = "Of each batch, before its step."
    parts = [figures(figure("Training loss", plot, caption, _keys(report.trainings)))] if plot else []
    return join([*parts, table(heads, rows, numbers=(1, 2, 3, 4, 5)) if rows else Markup("")])


def _curves(name: str, title: str, trainings: Sequence[Training], metric: str, unit: str) -> Markup | None:
    roles = _roles(trainings)
    lines = [
        plots.Curve(label=entry.name, points=entry.curves[metric], role=roles.get(_group(entry), "neutral"))
        for entry in trainings
        if entry.curves.get(metric)
    ]
    return plots.curves(name, title, lines, xlabel="step", ylabel=unit) if lines else None


def _keys(trainings: Sequence[Training]) -> list[tuple[str, str]]:
    """The legend, where there is more than one colour."""
    roles = _roles(trainings)
    return [(role, group) for group, role in roles.items()] if len(roles) > 1 else []


def _roles(trainings: Sequence[Training]) -> dict[str, str]:
    """A colour for each arm, or where there are none for each training; none if there are more than can be told apart.
    What arms share stays grey."""
    in_arms = [entry for entry in trainings if arm_of(entry.name)]
    groups = list(dict.fromkeys(_group(entry) for entry in in_arms or trainings))
    return {group: series(position) for position, group in enumerate(groups)} if len(groups) <= NUM_SERIES else {}


def _group(entry: Training) -> str:
    return arm_of(entry.name) or entry.name


# -- what was written -----------------------------------------------------------------------------------------------


def written(report: Report) -> Markup | None:
    """Samples, what the filters did with them, responses."""
    found = report.syntheses
    if not found:
        return None
    rows = [
        (entry.name, f"{entry.samples:,}", f"{entry.kept:,} ({percent(entry.kept / max(entry.samples, 1))})",
         *([NONE] * 3 if not entry.responses else
           [f"{entry.responses:,}", percent((entry.truncated or 0) / entry.responses),
            f"{(entry.tokens or 0) / entry.responses:.0f}"]))
        for entry in found
    ]  # fmt: skip
    bars = [
        plots.Bar(
            label=f"{reason.replace('_', ' ')}, {entry.place}", value=share, note=f"{percent(share)} ({amount:,})",
            role=series(position),
        )
        for reason in reasons(found)
        for position, entry in enumerate(entry for entry in found if not entry.fresh and arm_of(entry.name) is None)
        for amount in [entry.rejected.get(reason, 0)]
        for share in [amount / max(entry.samples, 1)]
    ]  # fmt: skip
    plot = plots.bars("rejected", "Samples the filters rejected, by reason", bars, xlabel="share of the samples")
    caption = "Share of the samples (and their number), by reason and by where in the loop they were written."
    heads = ("stage", "samples", "kept", "responses", "cut at the limit", "tokens a response")
    drawn = figures(figure("Samples the filters rejected", plot, caption)) if bars else ""
    return join([drawn, table(heads, rows, numbers=range(1, len(heads)))])


# -- cost and environment -------------------------------------------------------------------------------------------


def cost(report: Report) -> Markup | None:
    """Where the time went."""
    spent = report.cost
    if not spent.stages:
        return None
    sentence = f"{duration(spent.stage_seconds)} in stages"
    if spent.session_seconds is not None:
        sentence += f", {duration(spent.session_seconds)} in all over {count(spent.sessions, 'session')}"
    gpu_hours = f"{spent.gpu_hours:.2f} GPU-hours and " if spent.gpu_hours else ""
    sentence += f"; stages held {gpu_hours}{spent.cpu_hours:.2f} CPU-hours (what they ask for, times their time)."
    return join(
        [
            paragraph(sentence, kind="note"),
            _work(spent),
            _stages(spent),
            _points(report.influences),
        ]
    )


def _work(spent: Costs) -> Markup:
    total = sum(spent.by_work.values())
    rows = [
        plots.Bar(label=name, value=seconds, note=f"{duration(seconds)}, {percent(seconds / total)}", role="series-0")
        for name, seconds in spent.by_work.items()
        if total and seconds / total >= SHORT / 2
    ]
    if not rows:
        return Markup("")
    return figures(figure("Where the time went", plots.bars("time", "Time by kind of work", rows, xlabel="time")))


def _stages(spent: Costs) -> Markup:
    """Stages in their order, the short ones together."""
    longest = max(stage.seconds for stage in spent.stages) or 1.0
    long = [stage for stage in spent.stages if stage.seconds >= SHORT * spent.stage_seconds]
    short = [stage for stage in spent.stages if stage not in long]
    on_gpus = spent.gpu_hours > 0
    rows = [
        (stage.name, bar_cell(stage.seconds / longest, clock(stage.seconds)),
         "model" if stage.rows is None else f"{stage.rows:,}",
         NONE if stage.rows_a_second is None else number(stage.rows_a_second),
         NONE if stage.peak_memory_gb is None else f"{stage.peak_memory_gb:.1f}",
         f"{stage.gpu_hours if on_gpus else stage.cpu_hours:.3f}")
        for stage in long
    ]  # fmt: skip
    if short:
        seconds = sum(stage.seconds for stage in short)
        hours = sum(stage.gpu_hours if on_gpus else stage.cpu_hours for stage in short)
        name = count(len(short), "shorter stage")
        rows.append((name, bar_cell(0, clock(seconds)), "", "", "", f"{hours:.3f}"))
    unit = "h:mm:ss" if longest >= 3600 else "m:ss"
    heads = ("stage", f"time, {unit}", "rows", "rows/s", "peak GB", "GPU-hours" if on_gpus else "CPU-hours")
    return table(heads, rows, numbers=(1, 2, 3, 4, 5))


def _points(influences: Sequence[Influence]) -> Markup | str:
    """What a scored point cost."""
    parts = ("step", "restore", "evaluate")
    rows = [
        (entry.name, *(f"{entry.seconds.get(part, 0.0):.3f}" for part in parts), f"{sum(entry.seconds.values()):.3f}")
        for entry in influences
        if sum(entry.seconds.values())
    ]
    return table(("seconds a scored point", *parts, "in all"), rows, numbers=(1, 2, 3, 4)) if rows else ""


def environment(report: Report) -> Markup:
    """Versions, artifacts with their digests, what the run said, settings."""
    versions = [(library, ", ".join(found)) for library, found in report.versions.items()]
    artifacts = [
        (
            entry.name,
            "model" if entry.rows is None else f"{entry.rows:,}",
            entry.digest[:12],
            ", ".join(entry.inputs) or NONE,
        )
        for entry in report.artifacts
    ]
    parts = []
    if versions:
        parts.append(table(("library", "version"), versions))
    if artifacts:
        made = table(("artifact", "rows", "digest", "made from"), artifacts, numbers=(1,))
        parts.append(details("Artifacts and what they were made from", made))
    if report.notes:
        notes = join(Markup("<li>{}</li>").format(note) for note in report.notes)
        parts.append(details("What the run said", Markup("<ul>{}</ul>").format(notes)))
    settings = yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True)
    parts.append(details("Settings", preformatted(settings)))
    return join(
        [
            *parts,
            paragraph(f"Run directory: {report.run}. Every number is in report.json beside this page.", kind="note"),
        ]
    )
