"""Split: which synthesized examples warm the student up, are probed, or train it at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from montessori_ray.errors import DataError
from montessori_ray.stages.base import StageContext

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


def make_warmup_set(context: StageContext) -> dict[str, Any]:
    """The examples the student is warmed up on."""
    return _store(context, 0)


def make_probing_set(context: StageContext) -> dict[str, Any]:
    """The examples whose influence is scored."""
    return _store(context, 1)


def make_training_set(context: StageContext) -> dict[str, Any]:
    """The examples the student is trained on at the end."""
    rows = usable(context.input(0).rows(), drop_truncated=context.config.synthesize.drop_truncated)
    return _append(context, islice(rows, context.config.training_set), context.config.training_set)


def make_fresh_set(context: StageContext) -> dict[str, Any]:
    """Examples from prompts no stage before has seen, by which a teacher is judged."""
    rows = usable(context.input(0).rows(), drop_truncated=context.config.synthesize.drop_truncated)
    return _append(context, islice(rows, context.config.evaluate.fresh), context.config.evaluate.fresh)


def _store(context: StageContext, which: int) -> dict[str, Any]:
    split, drop_truncated = context.config.split, context.config.synthesize.drop_truncated
    responses = context.input(0)
    sets = split_examples(
        usable(responses.rows(), drop_truncated=drop_truncated),
        first=split.warmup, second=split.probing, by_prompt=split.by == "prompt",
    )  # fmt: skip
    wanted = set(sets[which])
    rows = (row for row in responses.rows() if row["example_id"] in wanted)
    return _append(context, rows, (split.warmup, split.probing)[which])


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
            f"{context.stage.output} would be empty: no response of {context.stage.inputs[0]} is usable; raise "
            "synthesize.responses.max_tokens or set synthesize.drop_truncated=false"
        )
    if count < wanted:
        context.note(f"{context.stage.output} has {count} of the {wanted} examples asked for", wanted=wanted, got=count)
    return {"wanted": wanted}
