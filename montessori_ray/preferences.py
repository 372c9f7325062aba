"""Influence -> preference pairs (paper section 3.3).

Among the instructions sampled from one few-shot prompt, those that help the student (influence below zero) are *chosen*
and those that harm it (above zero) *rejected*. What the teacher learns from is the raw text it sampled.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from statistics import fmean
from typing import Any, Literal

from montessori_ray.errors import DataError

Row = Mapping[str, Any]
"""A scored output: `prompt_id`, `prompt` (the rendered few-shot prompt), `example_id` (unique), `raw_output` (as
sampled), `influence` (change of the reference loss, baseline subtracted; negative helps), `influence_se` (its standard
error over the reference examples, None where the estimator does not know it)."""

Pair = dict[str, Any]
"""A preference pair: `prompt_id`, `prompt`, the texts `chosen` and `rejected`, and `chosen_id`, `rejected_id`,
`chosen_influence`, `rejected_influence`."""


class Sign(StrEnum):
    """What all of some scores say."""

    HELPFUL = "helpful"
    """None is above zero."""
    HARMFUL = "harmful"
    """None is below zero."""


class Unpaired(StrEnum):
    """Why a few-shot prompt has no pair."""

    SINGLE_EXAMPLE = "single_example"
    """Fewer than two different outputs were scored."""
    ALL_HELPFUL = "all_helpful"
    """No output is above zero."""
    ALL_HARMFUL = "all_harmful"
    """No output is below zero."""
    WITHIN_NOISE = "within_noise"
    """There are both signs, but not both beyond the margin; or every score is zero."""


@dataclass(frozen=True, slots=True)
class PairResult:
    """The pairs, ordered by their ids, and how many prompts gave none."""

    pairs: list[Pair]
    prompts: int
    """Few-shot prompts with at least one scored output."""
    prompts_without_pair: dict[Unpaired, int]
    """Reason -> prompts, before `max_pairs` cuts; reasons that do not occur are left out."""


def build_pairs(
    rows: Iterable[Row],
    *,
    rule: Literal["all", "best_worst"],
    threshold: Literal["baseline", "siblings"] = "baseline",
    margin_se: float,
    max_pairs: int | None,
    noise: float = 0.0,
) -> PairResult:
    """Preference pairs among outputs of the same few-shot prompt; the order of `rows` does not matter.

    Args:
        rows: scored outputs of any number of prompts.
        rule: `all` pairs every helpful with every harmful output of a prompt (paper), `best_worst` the lowest with the
            highest. Equal texts are never paired.
        threshold: what an influence must be below to be helpful, above to be harmful: 0, the baseline's (paper), or the
            mean over the outputs of its prompt.
        margin_se: standard errors by which an influence must differ from the threshold to count; 0 is the paper's rule.
        max_pairs: pairs kept, widest difference of influence first, ties by their ids; None keeps all.
        noise: what estimator and precision put into a score; one below it does not count, and stands for a standard
            error that is not known.

    Raises:
        DataError: there is no pair at all; says what was seen and which setting fits.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    pairs: list[Pair] = []
    unpaired: Counter[Unpaired] = Counter()
    for outputs in by_prompt.values():
        found = _pairs_of_prompt(outputs, threshold, margin_se, noise)
        if not found:
            unpaired[_why_unpaired(outputs, threshold)] += 1
        pairs.extend(_widest(found, 1) if rule == "best_worst" else found)
    if not pairs:
        raise DataError(_nothing_to_prefer(by_prompt, unpaired, threshold, margin_se, noise))
    if max_pairs is not None:
        pairs = _widest(pairs, max_pairs)
    pairs.sort(key=lambda pair: (pair["prompt_id"], pair["chosen_id"], pair["rejected_id"]))
    return PairResult(pairs, len(by_prompt), dict(unpaired))


Signal = Literal["influence", "training_loss", "llm_judge", "random", "shuffled_labels"]
"""What makes an output preferred; `config.Pair.signal` says what each means."""


def by_signal(rows: Iterable[Row], signal: Signal, seed: int) -> list[Row]:
    """The outputs with `influence` set to what `signal` prefers, below zero is chosen; no standard error is known.

    Args:
        rows: scored outputs; `training_loss` needs `example_loss`, `llm_judge` a `grade` (higher is better).
        signal: `influence` and `shuffled_labels` leave the rows as they are.
        seed: draws `random`.
    """
    outputs = list(rows)
    if signal in ("influence", "shuffled_labels"):
        return outputs
    if signal == "random":
        values = [_chance(seed, output["example_id"]) - 0.5 for output in outputs]
    else:
        column = "example_loss" if signal == "training_loss" else "grade"
        values = _below_siblings(outputs, column)
    return [{**output, "influence": value, "influence_se": None} for output, value in zip(outputs, values, strict=True)]


def _below_siblings(outputs: Sequence[Row], column: str) -> list[float]:
    """How far each output's value lies below the mean of its few-shot prompt's."""
    siblings: dict[str, list[float]] = {}
    for output in outputs:
        siblings.setdefault(output["prompt_id"], []).append(output[column])
    return [fmean(siblings[output["prompt_id"]]) - output[column] for output in outputs]


def exchange_labels(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The same pairs with chosen and rejected exchanged in each with a chance of one half: a control without signal."""

    def exchanged(pair: Pair) -> Pair:
        if _chance(seed, f"{pair['chosen_id']}/{pair['rejected_id']}") < 0.5:
            return pair
        columns = [(f"chosen{what}", f"rejected{what}") for what in ("", "_id", "_influence")]
        return {**pair, **{one: pair[other] for names in columns for one, other in (names, names[::-1])}}

    return [exchanged(pair) for pair in pairs]


def _chance(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"chance/{seed}/{key}".encode()).digest()[:6], "big") / 2**48


def one_sign(rows: Iterable[Row]) -> Sign | None:
    """The sign that all influences share, None where both occur, or no row, or nothing but zeros."""
    helpful = harmful = False
    for row in rows:
        helpful |= row["influence"] < 0
        harmful |= row["influence"] > 0
    if helpful == harmful:
        return None
    return Sign.HELPFUL if helpful else Sign.HARMFUL


def split_by_prompt(pairs: Sequence[Pair], eval_fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs to evaluate with, no few-shot prompt in both, each in the given order.

    About `eval_fraction` of the prompts are for evaluation: at least one where there are two or more, none where there
    is one, and never all. Which ones depends on `seed` and their ids alone.
    """
    prompts = sorted({pair["prompt_id"] for pair in pairs}, key=lambda prompt_id: _digest(seed, prompt_id))
    num_evaluation = min(max(1, round(eval_fraction * len(prompts))), len(prompts) - 1) if prompts else 0
    held = set(prompts[:num_evaluation])
    training = [pair for pair in pairs if pair["prompt_id"] not in held]
    return training, [pair for pair in pairs if pair["prompt_id"] in held]


def _pairs_of_prompt(outputs: Sequence[Row], threshold: str, margin_se: float, noise: float) -> list[Pair]:
    middle = 0.0 if threshold == "baseline" else fmean(output["influence"] for output in outputs)
    helpful = [output for output in outputs if output["influence"] - middle < -_margin(output, margin_se, noise)]
    harmful = [output for output in outputs if output["influence"] - middle > _margin(output, margin_se, noise)]
    return [
        {
            "prompt_id": chosen["prompt_id"],
            "prompt": chosen["prompt"],
            "chosen": chosen["raw_output"],
            "rejected": rejected["raw_output"],
            "chosen_id": chosen["example_id"],
            "rejected_id": rejected["example_id"],
            "chosen_influence": chosen["influence"],
            "rejected_influence": rejected["influence"],
        }
        for chosen, rejected in product(helpful, harmful)
        if chosen["raw_output"] != rejected["raw_output"]
    ]


def _margin(output: Row, margin_se: float, noise: float) -> float:
    # Without a margin an unknown (NaN) standard error, as one reference row gives, must not hide the sign.
    error = noise if output["influence_se"] is None else output["influence_se"]
    margin = margin_se * error if margin_se else 0.0
    return noise if margin <= noise else margin


def _widest(pairs: Sequence[Pair], count: int) -> list[Pair]:
    def narrowness(pair: Pair) -> tuple[float, str, str]:
        return pair["chosen_influence"] - pair["rejected_influence"], pair["chosen_id"], pair["rejected_id"]

    return sorted(pairs, key=narrowness)[:count]


def _why_unpaired(outputs: Sequence[Row], threshold: str) -> Unpaired:
    if len({output["raw_output"] for output in outputs}) < 2:
        return Unpaired.SINGLE_EXAMPLE
    sign = one_sign(outputs) if threshold == "baseline" else None
    if sign is None:
        return Unpaired.WITHIN_NOISE
    return Unpaired.ALL_HELPFUL if sign is Sign.HELPFUL else Unpaired.ALL_HARMFUL


def _nothing_to_prefer(
    by_prompt: Mapping[str, Sequence[Row]],
    unpaired: Mapping[Unpaired, int],
    threshold: str,
    margin_se: float,
    noise: float,
) -> str:
    """The sentence for a user whose scores give no pair: what was seen, and the setting that fits it best."""
    outputs = [output for group in by_prompt.values() for output in group]
    if not outputs:
        return "no preference pair: there is no scored example; raise split.probing"
    counts = ", ".join(f"{reason.value} {unpaired[reason]}" for reason in Unpaired if unpaired.get(reason))
    seen = f"no preference pair: {len(outputs)} scores of {len(by_prompt)} few-shot prompts (without a pair: {counts})"
    sign = one_sign(outputs) if threshold == "baseline" else None
    if unpaired.get(Unpaired.SINGLE_EXAMPLE, 0) * 2 > len(by_prompt):
        return (
            f"{seen}; most prompts have fewer than two different scored outputs: raise synthesize.n or split.probing, "
            "and keep split.by=prompt"
        )
    if sign is not None:
        return (
            f"{seen}; all {len(outputs)} scores are {sign.value}: set score.baseline=null_step, which takes the "
            "optimizer's own drift out of every score, or, if it is set, compare siblings with each other "
            "(pair.threshold=siblings) or raise synthesize.n or split.probing; a student that anything helps needs a "
            "longer warm-up (split.warmup) or fewer of student.drop_layers"
        )
    if unpaired.get(Unpaired.WITHIN_NOISE) and margin_se:
        return f"{seen}; no prompt has both signs beyond {margin_se:g} standard errors: lower pair.margin_se"
    if unpaired.get(Unpaired.WITHIN_NOISE) and noise:
        return (
            f"{seen}; no prompt has both signs beyond the noise of a score, {noise:.1e}: score with estimator exact "
            "and precision float32, or set pair.below_noise=keep"
        )
    return f"{seen}; no prompt has both signs: raise synthesize.n or split.probing"


def _digest(seed: int, prompt_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()
