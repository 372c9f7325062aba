"""Score: the influence of every probing example on the reference set (paper section 3.2)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from statistics import fmean, stdev
from typing import Any

from montessori_ray.errors import RunError
from montessori_ray.evaluation.statistics import grouped_mean
from montessori_ray.influence.agreement import agreement
from montessori_ray.stages.base import AnySettings, StageContext

SUMMARY_COLUMNS = ["example_id", "prompt_id", "influence", "influence_se", "recheck_influence", "quarantine"]

ROWS_A_CHUNK = 256
"""Examples handed to the ledger at once; all the driver and the ledger hold besides finished rows."""


def score(context: StageContext[AnySettings]) -> dict[str, Any]:
    """Score the examples of all inputs after the warmed student and the reference set; continues row by row.

    Raises:
        SpoiltRowsError: a group has sent wrong rows; none is kept, or the next session would take them for right ones.
        RunError: another session worked on the same run.
    """
    from montessori_ray.influence.driver import SpoiltRowsError, score_examples  # late: see stages/__init__.py

    scored = context.output.count()
    sets = [context.input(position) for position in range(2, len(context.stage.inputs))]
    total = sum(examples.require().rows or 0 for examples in sets)
    prompt_of: dict[str, str] = {}

    def chunks() -> Iterator[list[dict[str, Any]]]:
        marked = mark_rechecks(
            (row for examples in sets for row in examples.rows()), context.config.score.recheck, total
        )
        rows = without(marked, (row["example_id"] for row in context.output.rows(["example_id"])))
        while chunk := list(islice(rows, ROWS_A_CHUNK)):
            prompt_of.update((row["example_id"], row["prompt_id"]) for row in chunk)
            yield chunk

    def commit(rows: list[dict[str, Any]]) -> None:
        context.append({**row, "prompt_id": prompt_of.pop(row["example_id"])} for row in rows)

    student = context.config.student
    summary: dict[str, Any] = {}
    if scored < total:
        try:
            summary = score_examples(
                student=context.model(0), examples=chunks(), reference=list(context.input(1).rows()), on_rows=commit,
                settings=context.config.score, chat_template=student.chat_template, max_length=student.max_length,
                name=context.train_name, storage=context.run.train_storage(), progress=context.progress,
                total=total, done=scored, note=context.note,
            )  # fmt: skip
        except SpoiltRowsError:
            context.output.discard_parts()
            raise
    if (found := context.output.count()) != total:  # in a bucket, which has no lock
        raise RunError(
            f"{context.output.url} holds {found} scores of {total} examples: another session worked on this run at the "
            "same time; stop it, remove these scores (`montessori stages --remove`), and score again"
        )
    return summary | summarise(context.output.rows(SUMMARY_COLUMNS))


def without(rows: Iterable[dict[str, Any]], scored: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The rows whose `example_id` is not among the `scored` ones.

    Scores come in nearly in the order of the rows, so only ids that are ahead of their row are held, not all of them.
    """
    ahead: set[str] = set()
    for row in rows:
        example_id = row["example_id"]
        while example_id not in ahead and (id_ := next(scored, None)) is not None:
            ahead.add(id_)
        if example_id in ahead:
            ahead.remove(example_id)
        else:
            yield row


def mark_rechecks(rows: Iterable[dict[str, Any]], recheck: int, total: int) -> Iterator[dict[str, Any]]:
    """The rows with `recheck`: true for those of every so many few-shot prompts, about `recheck` of `total` in all.

    Whole prompts, so that the pairs among them are known too, but no more than `recheck` rows of one: examples of a
    user's own may all be of the same. The first one always, so that every run measures its noise.
    """
    every = max(1, round(total / recheck)) if recheck else 0
    number, of_prompt, prompt_id = -1, 0, None
    for row in rows:
        if row["prompt_id"] != prompt_id:
            number, of_prompt, prompt_id = number + 1, 0, row["prompt_id"]
        of_prompt += 1
        yield {**row, "recheck": bool(every) and number % every == 0 and of_prompt <= recheck}


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Mean influence with its standard error over few-shot prompts, whose examples are alike, the share that helps,
    noise, quarantined by reason."""
    of_prompt: dict[str, array[float]] = {}
    noise = array("d")
    reasons: dict[str, int] = {}
    rechecked: list[dict[str, Any]] = []
    for row in rows:
        if row["quarantine"] is not None:
            reasons[row["quarantine"]] = reasons.get(row["quarantine"], 0) + 1
        if row["influence"] is not None:
            of_prompt.setdefault(row["prompt_id"], array("d")).append(row["influence"])
        if row["influence_se"] is not None:
            noise.append(row["influence_se"])
        if row["recheck_influence"] is not None:
            rechecked.append(row)
    if not of_prompt:
        return {"scored": 0, "quarantined": reasons, "recheck": None}
    influences = array("d", chain.from_iterable(of_prompt.values()))
    mean = grouped_mean(list(of_prompt.values()))
    return {
        "scored": len(influences),
        "influence": {"mean": mean.mean, "se": mean.se},
        "spread": stdev(influences) if len(influences) > 1 else None,
        "share_helpful": sum(value < 0 for value in influences) / len(influences),
        "mean_se_over_reference": fmean(noise) if noise else None,
        "quarantined": reasons,
        "recheck": agreement(rechecked) if rechecked else None,
    }


def score_probing_set(context: StageContext) -> dict[str, Any]:
    """Influence of the probing set; says so when all scores have one sign, where no pair can come of that."""
    details = score(context)
    share, baseline, pair = details.get("share_helpful"), context.config.score.baseline, context.config.pair
    by_sign = pair.signal in ("influence", "shuffled_labels") and pair.threshold == "baseline"
    if share in (0.0, 1.0) and by_sign:
        hint = "set score.baseline=null_step" if baseline == "warmed" else "see docs/settings.md on warm-up rates"
        context.note(
            f"all {details['scored']} scores have one sign with score.baseline={baseline}, so no few-shot prompt has "
            f"both a helpful and a harmful instruction: {hint}"
        )
    return details
