"""Which examples go where: whole few-shot prompts, or the paper's plain cut."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_ray.config import Evaluate, Split, Synthesize
from montessori_ray.errors import DataError
from montessori_ray.stages.split import (
    apart,
    make_fresh_set,
    make_probing_set,
    make_training_set,
    make_warmup_set,
    most_helpful,
    split_examples,
    usable,
    within_tokens,
)

Row = dict[str, Any]


def rows_of(sizes: list[int]) -> list[Row]:
    """Prompts with so many examples each, one behind the other."""
    return [
        {"example_id": f"p{prompt}-{number}", "prompt_id": f"p{prompt}"}
        for prompt, size in enumerate(sizes)
        for number in range(size)
    ]


def prompts_in(ids: list[str]) -> set[str]:
    return {example_id.split("-")[0] for example_id in ids}


prompt_sizes = st.lists(st.integers(1, 4), max_size=30)


@settings(deadline=None)
@given(prompt_sizes, st.integers(1, 30), st.integers(1, 30))
def test_by_prompt_no_prompt_is_in_both_sets_or_cut(sizes: list[int], first: int, second: int) -> None:
    rows = rows_of(sizes)
    one, two = split_examples(rows, first=first, second=second, by_prompt=True)
    assert not prompts_in(one) & prompts_in(two)
    taken = prompts_in(one) | prompts_in(two)
    assert one + two == [row["example_id"] for row in rows if row["prompt_id"] in taken]


@settings(deadline=None)
@given(prompt_sizes, st.integers(1, 30), st.integers(1, 30))
def test_by_prompt_a_set_has_its_size_and_less_than_one_prompt_more(sizes: list[int], first: int, second: int) -> None:
    one, two = split_examples(rows_of(sizes), first=first, second=second, by_prompt=True)
    if sum(sizes) >= first + second + 6:  # enough even if a prompt of 4 sticks out of both
        assert first <= len(one) <= first + 3
        assert second <= len(two) <= second + 3
    assert len(one) >= min(first, sum(sizes))


@settings(deadline=None)
@given(prompt_sizes, st.integers(1, 30), st.integers(1, 30))
def test_by_example_the_cut_is_the_papers(sizes: list[int], first: int, second: int) -> None:
    """The first W examples warm the student up, the next P are probed."""
    rows = rows_of(sizes)
    one, two = split_examples(rows, first=first, second=second, by_prompt=False)
    ids = [row["example_id"] for row in rows]
    assert one == ids[:first]
    assert two == ids[first : first + second]


def test_a_prompt_on_the_border() -> None:
    rows = rows_of([3, 3, 3, 3])
    assert [len(ids) for ids in split_examples(rows, first=4, second=3, by_prompt=True)] == [6, 3]
    assert [len(ids) for ids in split_examples(rows, first=4, second=3, by_prompt=False)] == [4, 3]
    assert [len(ids) for ids in split_examples(rows, first=6, second=1, by_prompt=True)] == [6, 3]


def test_too_few_rows_fill_the_first_set_first() -> None:
    assert split_examples(rows_of([2]), first=9, second=9, by_prompt=True) == (["p0-0", "p0-1"], [])
    assert split_examples(rows_of([2]), first=1, second=9, by_prompt=False) == (["p0-0"], ["p0-1"])
    assert split_examples([], first=1, second=1, by_prompt=True) == ([], [])


@pytest.mark.parametrize("by_prompt", [True, False])
def test_rows_are_read_once_and_at_most_a_prompt_too_far(by_prompt: bool) -> None:
    rows = iter(rows_of([2] * 10))
    split_examples(rows, first=4, second=4, by_prompt=by_prompt)
    assert len(list(rows)) >= 20 - (4 + 4 + 2 + 1)


@settings(deadline=None)
@given(prompt_sizes.filter(bool))
def test_both_sets_keep_the_order_of_the_rows(sizes: list[int]) -> None:
    rows = rows_of(sizes)
    for ids in split_examples(rows, first=3, second=3, by_prompt=True):
        prompts = [prompt for prompt, _ in groupby(ids, key=lambda example_id: example_id.split("-")[0])]
        assert len(prompts) == len(set(prompts))


ANSWERS: list[Row] = [
    {"example_id": "whole", "response": "Seven.", "finish_reason": "stop"},
    {"example_id": "cut", "response": "Seven and", "finish_reason": "length"},
    {"example_id": "empty", "response": "", "finish_reason": "stop"},
    {"example_id": "none", "response": None, "finish_reason": "stop"},
]


@pytest.mark.parametrize(("drop_truncated", "kept"), [(False, ["whole", "cut"]), (True, ["whole"])])
def test_usable_rows_have_a_response(drop_truncated: bool, kept: list[str]) -> None:
    assert [row["example_id"] for row in usable(ANSWERS, drop_truncated=drop_truncated)] == kept


def test_best_of_n_takes_the_best_of_each_prompt_before_the_second_best() -> None:
    rows = rows_of([3, 2, 1])
    influence = {"p0-0": -0.1, "p0-1": -0.9, "p0-2": -0.8, "p1-0": 0.3, "p1-1": 0.2}  # p2-0 has no score
    assert [row["example_id"] for row in most_helpful(rows, influence, 2)] == ["p0-1", "p1-1"]
    assert [row["example_id"] for row in most_helpful(rows, influence, 3)] == ["p0-1", "p0-2", "p1-1"]
    assert len(most_helpful(rows, influence, 99)) == 5


@pytest.mark.parametrize(("budget", "kept"), [(None, 4), (100, 4), (60, 3), (59, 2), (9, 0)])
def test_a_token_budget_ends_the_training_set(budget: int | None, kept: int) -> None:
    rows = [{"num_tokens": count} for count in (10, 20, 30, 40)]
    assert list(within_tokens(rows, budget)) == rows[:kept]


def test_one_long_answer_does_not_end_the_training_set() -> None:
    counts = [10, 500, 20, 500, 30, 35, 6, 2]
    chosen = within_tokens([{"num_tokens": count} for count in counts], 100)
    assert [row["num_tokens"] for row in chosen] == [10, 20, 30, 35], "with 95 of 100 one that does not fit ends it"


def test_a_budget_below_every_answer_is_said() -> None:
    rows = [{"example_id": "a", "prompt_id": "p", "instruction": "Name a river.", "response": "The Inn.",
             "finish_reason": "stop", "num_tokens": 30}]  # fmt: skip
    context = context_of([rows, [{"instruction": "Say no."}], [{"instruction": "Say yes."}]], [])
    context.config.training_tokens = 20
    with pytest.raises(DataError, match="training_tokens is 20, and the shortest of 1 responses has 30: raise it"):
        make_training_set(context)


@pytest.mark.parametrize("by", ["prompt", "example"])
@pytest.mark.parametrize(("cut", "sizes"), [(0, [40, 60]), (4, [40, 56]), (50, [20, 30])])
def test_where_many_answers_cannot_be_used_both_sets_shrink(cut: int, sizes: list[int], by: str) -> None:
    rows = [
        {"example_id": str(number), "prompt_id": str(number // 2), "instruction": f"Name {number} rivers.",
         "response": "The Inn.", "finish_reason": "length" if number < cut else "stop", "num_tokens": 3}
        for number in range(100)
    ]  # fmt: skip
    stored = []
    for make in (make_warmup_set, make_probing_set):
        context = context_of([rows, [{"instruction": "Say yes."}]], kept := [])
        context.config.split = Split(warmup=40, probing=60, by=by)
        context.config.synthesize = Synthesize(drop_truncated=True, duplicate_rouge_l=1.0)
        make(context)
        stored.append([row["example_id"] for row in kept])
    assert [len(ids) for ids in stored] == sizes
    assert not set(stored[0]) & set(stored[1])


def test_rows_near_a_reference_row_are_left_out() -> None:
    texts = ("What is the capital of Peru?", "Name a river.", "NAME a  lake!", "?!", "\u5199\u8bd7")
    rows = [{"instruction": text} for text in texts]
    others = ["What is the capital of France?", "name a lake", "\u5199\u8bd7"]
    assert [row["instruction"] for row in apart(rows, others)] == ["Name a river.", "?!"]
    assert list(apart(rows, [])) == rows


@pytest.mark.parametrize("selected", [False, True])
def test_what_students_train_on_is_near_no_reference_or_held_out_row(selected: bool) -> None:
    """Held-out rows bar examples from the training set only: the other sets are made without them."""
    asked = ["Name a river.", "Name a lake.", "Name two rivers.", "Name a hill."]
    responses = [
        {"example_id": str(number), "prompt_id": "p", "instruction": text, "response": "Yes.", "finish_reason": "stop",
         "num_tokens": 2}
        for number, text in enumerate(asked)
    ]  # fmt: skip
    scores = [{"example_id": str(number), "influence": -float(number)} for number in range(len(asked))]
    reference, held_out = ([{"instruction": text}] for text in ("NAME a river", "name a  hill!"))
    inputs = [responses, reference, held_out, *([scores] if selected else [])]
    kept: dict[str, list[Row]] = {}

    def stored(make: Any, name: str) -> list[str]:
        kept[name] = []
        make(context_of(inputs, kept[name]))
        return [row["instruction"] for row in kept[name]]

    assert stored(make_training_set, "training") == ["Name a lake.", "Name two rivers."]
    assert stored(make_fresh_set, "fresh") == ["Name a lake.", "Name two rivers.", "Name a hill."]


def context_of(inputs: list[list[Row]], kept: list[Row]) -> Any:
    """A stage on rows in memory, which are committed to `kept`."""
    artifacts = [
        SimpleNamespace(
            rows=lambda _=None, rows=rows: iter(rows), column=lambda name, rows=rows: [r[name] for r in rows]
        )
        for rows in inputs
    ]
    names = ["example_id", "instruction", "response"]
    return SimpleNamespace(
        config=SimpleNamespace(
            synthesize=Synthesize(), training_set=3, training_tokens=None, evaluate=Evaluate(fresh=3)
        ),
        input=lambda position: artifacts[position],
        output=SimpleNamespace(discard_parts=lambda: None),
        stage=SimpleNamespace(inputs=inputs, schema=SimpleNamespace(names=names), output="final/training_set"),
        append=kept.extend,
        note=lambda *_, **__: None,
    )
