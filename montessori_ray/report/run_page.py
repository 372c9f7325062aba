"""The page of a run: the result first, then what it rests on, then what it cost."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from montessori_ray.report import arms, page_results, page_scores, page_work
from montessori_ray.report.collect import Report
from montessori_ray.report.html import Section, Tile, join, page, paragraph, tiles
from montessori_ray.report.words import count, duration, listed, number, percent

SECTIONS: tuple[tuple[str, Callable[[Report], Markup | None]], ...] = (
    ("Arms", lambda report: arms.section(report.arms)),
    ("Student", page_results.student),
    ("Teacher", page_results.teacher),
    ("Influence", page_scores.influence),
    ("Pairs", page_scores.pairs),
    ("Teacher tuning", page_work.tuning),
    ("Student training", page_work.training),
    ("Examples", page_scores.examples),
    ("Instructions written", page_work.written),
    ("Time and cost", page_work.cost),
    ("Environment", page_work.environment),
)
"""Title -> what makes its body, or None where the run has nothing for it."""


def run_page(report: Report) -> str:
    """The page as HTML."""
    found: list[Section] = []
    missing: list[str] = []
    for title, make in SECTIONS:
        body = make(report)
        if body:
            found.append(Section(title.lower().replace(" ", "-"), title, body))
        elif title in _expected(report):
            missing.append(title.lower())
    if missing and report.stages_todo:
        sentence = f"Not in this report, since the run has not made it yet: {listed(missing)}."
        found.append(Section("missing", "Not there yet", paragraph(sentence)))
    return page(report.run.rstrip("/").rsplit("/", 1)[-1], _lead(report), found)


def _expected(report: Report) -> set[str]:
    """Titles of what such a run makes."""
    always = {"Influence", "Examples", "Time and cost", "Environment"}
    if report.scores_files:
        return always | ({"Student training"} if report.config["data"]["warm_up"] else set())
    loop = always | {"Pairs", "Teacher tuning", "Student training", "Instructions written"}
    return loop | ({"Arms"} if report.config["compare"] else {"Student", "Teacher"})


def _lead(report: Report) -> Markup:
    parts: list[Markup] = []
    for result in report.sentences:
        parts += [paragraph(result.headline, kind="result"), paragraph(result.detail, kind="detail")]
    if report.stages_todo:
        total = report.stages_done + len(report.stages_todo)
        unfinished = f"Unfinished: {report.stages_done} of {total} stages are done, next {report.stages_todo[0]}."
        parts.append(paragraph(unfinished, kind="warning"))
    parts.append(paragraph(report.what, kind="lead"))
    return join([*parts, tiles(_key_figures(report))])


def _key_figures(report: Report) -> list[Tile]:
    found = []
    for loss in report.losses:
        if (loss.student, loss.set) == ("trained", "held_out") and loss.change:
            found.append(
                Tile("Held-out loss", number(loss.loss.mean), f"{number(loss.change.mean, sign=True)} by training")
            )
    if len(report.fresh) > 1 and report.fresh[-1].change:
        shares = [percent(entry.share_helpful) for entry in (report.fresh[0], report.fresh[-1])]
        found.append(Tile("Fresh instructions that help", shares[1], f"{shares[0]} by the original teacher"))
    if report.influences:
        first = report.influences[0]
        note = f"of {first.mean.count:,} scored{f', {first.place}' if first.place else ''}"
        found.append(Tile("Examples that help", percent(first.share_helpful), note))
        if not report.fresh:
            scale = page_results.influence_scale(report)
            mean, sign, error = scale.plus_minus(first.mean.mean, first.mean.se).partition(" ± ")
            sure = f"± {error}, " if sign else ""
            found.append(Tile("Mean influence", scale.in_unit(mean), f"{sure}negative helps"))
    if report.pairs:
        prompts = sum(entry.prompts for entry in report.pairs)
        found.append(
            Tile(
                "Preference pairs",
                f"{sum(entry.pairs for entry in report.pairs):,}",
                f"from {count(prompts, 'prompt')}",
            )
        )
    spent = report.cost
    if spent.stages:
        hours = f"{spent.gpu_hours:.2f} GPU-hours" if spent.gpu_hours else f"{spent.cpu_hours:.2f} CPU-hours"
        found.append(Tile("Time", duration(spent.session_seconds or spent.stage_seconds), hours))
    if spent.peak_memory_gb is not None:
        found.append(Tile("Peak memory", f"{spent.peak_memory_gb:.1f} GB", "on the driver's node"))
    return found
