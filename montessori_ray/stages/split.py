"""Split: which synthesized examples warm the student up, are probed, or train it at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby, islice
from typing import Any

from montessori_ray.data import normalised
from montessori_ray.errors import DataError
from montessori_ray.stages.base import StageContext
from montessori_ray.synthesis.deduplication import NearDuplicates

Row = dict[str, Any]
ROWS_A_PART = 10_000


def split_examples(rows: Iterable[Row], *, first: int, second: int, by_prompt: bool) -> tuple[list[str], list[str]]:
    """Ids of the first and the second set, in the order of `rows`.

    By prompt, a set takes whole few-shot prompts until it has at least its size, so that no prompt is in both; else the
    first set ends after exactly `first` rows (the paper's split).
    """
    if not by_prompt:
        ids = [row["example_id"] for row in islice(rows, first + second)]
        return ids[:first], ids[first:]
    sets: tuple[list[str], list[str]] = ([], [])
    for _, siblings in groupby(rows, key=lambda row: row["prompt_id"]):
        ids = [row["example_id"] for row in siblings]
        if len(sets[0]) < first:
            sets[0].extend(ids)
        elif len(sets[1]) < second:
            sets[1].extend(ids)
        else:
            break
    return sets


def usable(rows: Iterable[Row], *, drop_truncated: bool) -> Iterator[Row]:
    """Rows with a response that can train a student."""
    return (row for row in rows if row["response"] and not (drop_truncated and row["finish_reason"] == "length"))


def apart(rows: Iterable[Row], others: Iterable[str]) -> Iterator[Row]:
    """Rows whose instruction repeats none of the others, or nearly (ROUGE-L above 0.7), whatever counts as a duplicate
    among instructions (`synthesize.duplicate_rouge_l`)."""
    near, same = NearDuplicates(), set()
    for instruction in others:
        near.add(instruction)
        same.add(normalised(instruction))
    texts = ((row, row["instruction"]) for row in rows)
    return (row for row, text in texts if normalised(text) not in same and not near.is_duplicate(text))


def _candidates(context: StageContext, *, apart_from: tuple[int, ...] = (1,)) -> Iterator[Row]:
    """Rows that may come into a set; the stage's first inputs are the responses and the reference rows.

    A copy of a reference row would help the student with that row and teach the teacher to copy.

    Args:
        context: of the stage that makes the set.
        apart_from: positions of the inputs whose instructions no row may nearly repeat.
    """
    settings = context.config.synthesize
    rows = usable(context.input(0).rows(), drop_truncated=settings.drop_truncated)
    measured = (context.input(position).column("instruction") for position in apart_from)
    return apart(rows, chain.from_iterable(measured))


def make_warmup_set(context: StageContext) -> dict[str, Any]:
    """The examples the student is warmed up on."""
    return _store(context, 0)


def make_probing_set(context: StageContext) -> dict[str, Any]:
    """The examples whose influence is scored."""
    return _store(context, 1)


def make_training_set(context: StageContext) -> dict[str, Any]:
    """The examples the student is trained on at the end, apart from the held-out rows too, which are the third input;
    to select by it, the last input is influence.

    Held-out rows are read nowhere else before the students are measured on them: a copy among what they are trained on
    would flatter that measure, whereas the teacher is tuned without them.
    """
    config = context.config
    rows: Iterable[Row] = _candidates(context, apart_from=(1, 2))
    if len(context.stage.inputs) > 3:
        scores = context.input(3).rows(["example_id", "influence"])
        influence = {row["example_id"]: row["influence"] for row in scores if row["influence"] is not None}
        rows = most_helpful(rows, influence, config.training_set)
    candidates = list(islice(rows, config.training_set))
    chosen = list(within_tokens(candidates, config.training_tokens))
    if candidates and not chosen:
        raise DataError(
            f"{context.stage.output} would be empty: training_tokens is {config.training_tokens}, and the shortest of "
            f"{len(candidates)} responses has {min(row['num_tokens'] for row in candidates)}: raise it"
        )
    details = _append(context, chosen, config.training_set if config.training_tokens is None else 0)
    tokens = sum(row["num_tokens"] for row in chosen)
    if config.training_tokens and tokens < 0.95 * config.training_tokens:
        context.note(
            f"{context.stage.output} has {tokens} of the {config.training_tokens} response tokens asked for: raise "
            "training_set, or lower training_tokens"
        )
    return details | {"tokens": tokens}


def most_helpful(rows: Iterable[Row], influence: Mapping[str, float], count: int) -> list[Row]:
    """Best of n: the most helpful example of each few-shot prompt, then the second best ones, up to `count`; in the
    order of `rows`."""
    scored = [row for row in rows if row["example_id"] in influence]
    siblings: Counter[str] = Counter()
    ranked: list[tuple[int, float, str]] = []
    for row in sorted(scored, key=lambda row: influence[row["example_id"]]):
        ranked.append((siblings[row["prompt_id"]], influence[row["example_id"]], row["example_id"]))
        siblings[row["prompt_id"]] += 1
    chosen = {example_id for _, _, example_id in sorted(ranked)[:count]}
    return [row for row in scored if row["example_id"] in chosen]


NEARLY_SPENT = 0.9
"""Share of a token budget that may be left where a row does not fit."""


def within_tokens(rows: Iterable[Row], budget: int | None) -> Iterator[Row]:
    """The first rows whose response tokens together stay within a budget; all where there is none.

    A row that does not fit ends them where the budget is nearly spent, and else is left out: one long answer must not
    decide how much there is to learn from.
    """
    spent = 0
    for row in rows:
        if budget is not None and spent + row["num_tokens"] > budget:
            if spent >= NEARLY_SPENT * budget:
                return
            continue
        spent += row["num_tokens"]
        yield row


def make_fresh_set(context: StageContext) -> dict[str, Any]:
    """Examples from prompts no stage before has seen, by which a teacher is judged."""
    return _append(context, islice(_candidates(context), context.config.evaluate.fresh), context.config.evaluate.fresh)


ENOUGH = 0.9
"""Share of the probing set below which the warm-up set gives up its part of what is missing."""


def _store(context: StageContext, which: int) -> dict[str, Any]:
    """One of the two sets; where there are much fewer rows than both ask for, each has its share of them."""
    split = context.config.split
    sets = _split(context, split.warmup, split.probing)
    if len(sets[1]) < ENOUGH * split.probing:
        share = split.warmup / (split.warmup + split.probing)
        found = len(sets[0]) + len(sets[1])
        sets = _split(context, round(share * found), found - round(share * found))
    wanted = set(sets[which])
    rows = (row for row in context.input(0).rows() if row["example_id"] in wanted)
    return _append(context, rows, (split.warmup, split.probing)[which])


def _split(context: StageContext, first: int, second: int) -> tuple[list[str], list[str]]:
    by_prompt = context.config.split.by == "prompt"
    return split_examples(_candidates(context), first=first, second=second, by_prompt=by_prompt)


def _append(context: StageContext, rows: Iterable[Row], wanted: int) -> dict[str, Any]:
    context.output.discard_parts()
    names = context.stage.schema.names if context.stage.schema else []
    chosen = ({name: row[name] for name in names} for row in rows)
    count = 0
    while part := list(islice(chosen, ROWS_A_PART)):
        context.append(part)
        count += len(part)
    if count == 0:
        raise DataError(
            f"{context.stage.output} would be empty: every row of {context.stage.inputs[0]} has an empty or cut "
            "response, or asks what a reference or held-out row asks; raise synthesize.responses.max_tokens, set "
            "synthesize.drop_truncated=false, or give other reference and held-out rows"
        )
    if count < wanted:
        context.note(f"{context.stage.output} has {count} of the {wanted} examples asked for", wanted=wanted, got=count)
    return {"wanted": wanted}
