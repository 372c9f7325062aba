"""Pair: influence becomes preference pairs (paper section 3.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from montessori_ray.errors import DataError
from montessori_ray.preferences import build_pairs, by_signal, exchange_labels
from montessori_ray.stages.base import StageContext


def pair(context: StageContext) -> dict[str, Any]:
    """Pairs among the scored examples of each few-shot prompt.

    Inputs: the influence, the sampled outputs, and the grades where a judge's are the signal.
    """
    settings = context.config.pair
    seed = settings.seed if settings.seed is not None else context.config.seed
    recheck = context.input(0).require().details["recheck"] or {"noise": 0.0}
    by_influence = settings.signal in ("influence", "shuffled_labels")
    noise = recheck["noise"] if settings.below_noise == "drop" and by_influence else 0.0
    rows = by_signal(_scored_samples(context), settings.signal, seed)
    if not rows:
        raise DataError(_why_nothing_is_scored(context))
    result = build_pairs(
        rows, rule=settings.rule, threshold=settings.threshold, margin_se=settings.margin_se,
        max_pairs=settings.max_pairs, noise=noise,
    )  # fmt: skip
    pairs = exchange_labels(result.pairs, seed) if settings.signal == "shuffled_labels" else result.pairs
    context.output.discard_parts()
    context.append(pairs)
    return {"prompts": result.prompts, "prompts_without_pair": dict(result.prompts_without_pair), "noise": noise}


def _why_nothing_is_scored(context: StageContext) -> str:
    """The sentence for a user none of whose examples can be compared: which step gave none, and what it said."""
    scores, judge = context.input(0).require().details, context.config.pair.judge
    if scores["scored"] and judge is not None:
        return (
            f"no preference pair: {judge.model} gave none of the {scores['scored']} scored examples a grade from 1 to "
            f"10; read its replies in {context.input(2).url}, then set another pair.judge.model or another pair.signal"
        )
    reasons = Counter(scores["quarantined"])
    said = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"no preference pair: there is no scored example, {reasons.total()} are quarantined ({said or 'none'}): "
        "mend what these reasons name, or raise split.probing where there are none"
    )


def _scored_samples(context: StageContext) -> Iterator[dict[str, Any]]:
    """Every scored example with the prompt and the raw output it was sampled as."""
    scores = {
        row["example_id"]: row
        for row in context.input(0).rows(["example_id", "influence", "influence_se", "example_loss"])
        if row["influence"] is not None
    }
    if len(context.stage.inputs) > 2:
        grades = {row["example_id"]: row["grade"] for row in context.input(2).rows(["example_id", "grade"])}
        scores = {id: row | {"grade": grades[id]} for id, row in scores.items() if grades.get(id) is not None}
    prompt = ""
    for row in context.input(1).rows(["example_id", "prompt_id", "prompt", "raw_output"]):
        prompt = prompt if row["prompt"] == prompt else row["prompt"]  # siblings share one, in memory too
        if row["example_id"] in scores:
            yield row | scores[row["example_id"]] | {"prompt": prompt}
