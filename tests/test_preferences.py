"""The pair rule on tables made by hand, and its laws on random ones."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from montessori_ray.errors import DataError
from montessori_ray.preferences import (
    PairResult,
    Row,
    Sign,
    Unpaired,
    build_pairs,
    by_signal,
    exchange_labels,
    one_sign,
    split_by_prompt,
)


def output(prompt: str, number: int, influence: float, *, se: float = 0.1, text: str | None = None) -> Row:
    return {
        "prompt_id": prompt,
        "prompt": f"few-shot prompt {prompt}",
        "example_id": f"{prompt}-{number}",
        "raw_output": text if text is not None else f"output {number} of {prompt}",
        "influence": influence,
        "influence_se": se,
    }


def all_pairs(rows: list[Row], *, margin_se: float = 0.0, max_pairs: int | None = None) -> PairResult:
    return build_pairs(rows, rule="all", margin_se=margin_se, max_pairs=max_pairs)


def ids(result: PairResult) -> list[tuple[str, str]]:
    return [(pair["chosen_id"], pair["rejected_id"]) for pair in result.pairs]


# The two helpful and the two harmful outputs of prompt a pair in four ways; b, c and d have no pair.
TABLE = [
    output("a", 0, -0.3),
    output("a", 1, 0.2),
    output("a", 2, -0.1),
    output("a", 3, 0.4),
    output("b", 0, -1.0),
    output("b", 1, -2.0),
    output("c", 0, 1.0),
    output("c", 1, 2.0),
    output("d", 0, 1.0),
]


def test_all_combinations_of_a_prompt() -> None:
    result = all_pairs(TABLE)
    assert ids(result) == [("a-0", "a-1"), ("a-0", "a-3"), ("a-2", "a-1"), ("a-2", "a-3")]
    assert result.pairs[1] == {
        "prompt_id": "a",
        "prompt": "few-shot prompt a",
        "chosen": "output 0 of a",
        "rejected": "output 3 of a",
        "chosen_id": "a-0",
        "rejected_id": "a-3",
        "chosen_influence": -0.3,
        "rejected_influence": 0.4,
    }
    assert result.prompts == 4
    assert result.prompts_without_pair == {
        Unpaired.ALL_HELPFUL: 1,
        Unpaired.ALL_HARMFUL: 1,
        Unpaired.SINGLE_EXAMPLE: 1,
    }


def test_best_worst_takes_the_lowest_and_the_highest() -> None:
    assert ids(build_pairs(TABLE, rule="best_worst", margin_se=0, max_pairs=None)) == [("a-0", "a-3")]


def test_best_worst_steps_over_equal_texts() -> None:
    rows = [
        output("a", 0, -2.0, text="same"),
        output("a", 1, -1.0),
        output("a", 2, 3.0, text="same"),
    ]
    assert ids(build_pairs(rows, rule="best_worst", margin_se=0, max_pairs=None)) == [("a-1", "a-2")]


def test_siblings_are_compared_with_their_mean() -> None:
    rows = [output("a", number, influence) for number, influence in enumerate((-4.0, -3.0, -2.0, -0.9))]
    rows += [output("b", 0, -1.0), output("b", 1, -1.1)]
    with pytest.raises(DataError, match=r"pair\.threshold=siblings"):
        all_pairs(rows)
    found = build_pairs(rows, rule="all", threshold="siblings", margin_se=0, max_pairs=None, noise=0.4)
    assert ids(found) == [("a-0", "a-2"), ("a-0", "a-3"), ("a-1", "a-2"), ("a-1", "a-3")]
    assert found.pairs[0]["chosen_influence"] == -4.0
    assert found.prompts_without_pair == {Unpaired.WITHIN_NOISE: 1}
    with pytest.raises(DataError, match="beyond the noise"):
        build_pairs(rows, rule="all", threshold="siblings", margin_se=0, max_pairs=None, noise=3.0)


def test_margin_leaves_out_what_is_not_settled() -> None:
    result = all_pairs(TABLE, margin_se=1.5)
    assert ids(result) == [("a-0", "a-1"), ("a-0", "a-3")]
    rows = [*TABLE, output("e", 0, -0.1), output("e", 1, 0.9)]
    assert all_pairs(rows, margin_se=1.5).prompts_without_pair[Unpaired.WITHIN_NOISE] == 1


def test_scores_below_their_noise_make_no_pair() -> None:
    rows = [output("a", 0, -0.3), output("a", 1, -0.1), output("a", 2, 0.15), output("a", 3, 0.4)]
    found = build_pairs(rows, rule="all", margin_se=0, max_pairs=None, noise=0.2)
    assert ids(found) == [("a-0", "a-3")]
    unknown = [{**row, "influence_se": None} for row in rows]
    with pytest.raises(DataError, match=r"beyond 1\.8 standard errors"):
        build_pairs(unknown, rule="all", margin_se=1.8, max_pairs=None, noise=0.2)
    with pytest.raises(DataError, match=r"beyond the noise of a score, 5.0e-01: .* pair.below_noise=keep"):
        build_pairs(rows, rule="all", margin_se=0, max_pairs=None, noise=0.5)


def test_a_zero_influence_is_neither() -> None:
    assert ids(all_pairs([output("a", 0, -1.0), output("a", 1, 0.0), output("a", 2, 1.0)])) == [("a-0", "a-2")]


def test_unknown_standard_error_counts_only_with_a_margin() -> None:
    rows = [output("a", 0, -1.0, se=math.nan), output("a", 1, 1.0, se=math.nan)]
    assert ids(all_pairs(rows)) == [("a-0", "a-1")]
    with pytest.raises(DataError, match=r"pair\.margin_se"):
        all_pairs(rows, margin_se=1.0)


def test_max_pairs_keeps_the_widest() -> None:
    assert ids(all_pairs(TABLE, max_pairs=1)) == [("a-0", "a-3")]
    # Of the two pairs that differ by 0.5, the one with the lower ids comes first.
    assert ids(all_pairs(TABLE, max_pairs=2)) == [("a-0", "a-1"), ("a-0", "a-3")]
    assert ids(all_pairs(TABLE, max_pairs=3)) == [("a-0", "a-1"), ("a-0", "a-3"), ("a-2", "a-3")]


@pytest.mark.parametrize(
    ("rows", "margin_se", "words"),
    [
        ([], 0.0, "split.probing"),
        ([output("a", 0, -1.0), output("a", 1, -2.0)], 0.0, "all 2 scores are helpful: set score.baseline=null_step"),
        ([output("a", 0, 1.0), output("a", 1, 2.0)], 0.0, "all 2 scores are harmful: set score.baseline=null_step"),
        ([output("a", 0, 1.0), output("b", 0, -2.0)], 0.0, "raise synthesize.n"),
        ([output("a", 0, 0.1), output("a", 1, -0.1)], 2.0, "beyond 2 standard errors: lower pair.margin_se"),
        (
            [output("a", 0, 1.0), output("a", 1, 2.0), output("b", 0, -1.0), output("b", 1, -2.0)],
            0.0,
            "2 few-shot prompts (without a pair: all_helpful 1, all_harmful 1); no prompt has both signs: raise",
        ),
    ],
)
def test_no_pair_says_what_was_seen_and_what_to_do(rows: list[Row], margin_se: float, words: str) -> None:
    with pytest.raises(DataError) as caught:
        all_pairs(rows, margin_se=margin_se)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("influences", "sign"),
    [([], None), ([0.0], None), ([-1.0, 0.0], Sign.HELPFUL), ([1.0, 2.0], Sign.HARMFUL), ([-1.0, 1.0], None)],
)
def test_one_sign(influences: list[float], sign: Sign | None) -> None:
    assert one_sign([output("a", number, influence) for number, influence in enumerate(influences)]) is sign


# Few values, so that ties, zeros and equal texts occur; prompt z always has a pair.
scored = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), st.sampled_from("uvwxyz")),
    max_size=25,
)


def table(drawn: list[tuple[str, float, str]]) -> list[Row]:
    rows = [output(prompt, number, influence, text=text) for number, (prompt, influence, text) in enumerate(drawn)]
    return [*rows, output("z", 0, -1.0), output("z", 1, 1.0)]


@given(drawn=scored)
def test_pairs_lie_within_a_prompt_across_zero(drawn: list[tuple[str, float, str]]) -> None:
    rows = {row["example_id"]: row for row in table(drawn)}
    result = all_pairs(list(rows.values()))
    for pair in result.pairs:
        chosen, rejected = rows[pair["chosen_id"]], rows[pair["rejected_id"]]
        assert chosen["prompt_id"] == rejected["prompt_id"] == pair["prompt_id"]
        assert pair["chosen_influence"] == chosen["influence"] < 0 < rejected["influence"] == pair["rejected_influence"]
        assert (pair["chosen"], pair["rejected"]) == (chosen["raw_output"], rejected["raw_output"])
        assert pair["chosen"] != pair["rejected"]
    expected = sum(
        first["prompt_id"] == second["prompt_id"]
        and first["influence"] < 0 < second["influence"]
        and first["raw_output"] != second["raw_output"]
        for first in rows.values()
        for second in rows.values()
    )
    assert len(result.pairs) == expected
    paired = {pair["prompt_id"] for pair in result.pairs}
    assert result.prompts == len(paired) + sum(result.prompts_without_pair.values())


@given(drawn=scored, max_pairs=st.integers(1, 10), rule=st.sampled_from(["all", "best_worst"]), order=st.randoms())
def test_the_order_of_rows_does_not_matter(
    drawn: list[tuple[str, float, str]], max_pairs: int, rule: str, order: random.Random
) -> None:
    rows = table(drawn)
    shuffled = list(rows)
    order.shuffle(shuffled)
    arguments: dict[str, Any] = {"rule": rule, "margin_se": 0.0, "max_pairs": max_pairs}
    assert build_pairs(rows, **arguments) == build_pairs(shuffled, **arguments)


@given(
    drawn=st.lists(st.sampled_from("abcdefgh"), max_size=30),
    eval_fraction=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_split_is_disjoint_and_leaves_both_sides_something(drawn: list[str], eval_fraction: float, seed: int) -> None:
    pairs = [
        pair
        for number, prompt in enumerate(drawn)
        for pair in all_pairs([output(prompt, 2 * number, -1.0), output(prompt, 2 * number + 1, 1.0)]).pairs
    ]
    training, evaluation = split_by_prompt(pairs, eval_fraction, seed)
    assert Counter(pair["chosen_id"] for pair in training + evaluation) == Counter(pair["chosen_id"] for pair in pairs)
    prompts, held = {pair["prompt_id"] for pair in training}, {pair["prompt_id"] for pair in evaluation}
    assert not prompts & held
    assert bool(prompts) == bool(pairs)
    assert bool(held) == (len(set(drawn)) > 1)
    reordered = split_by_prompt(pairs[::-1], eval_fraction, seed)
    assert {pair["prompt_id"] for pair in reordered[1]} == held


def test_split_depends_on_the_seed_and_takes_its_share() -> None:
    rows = [output(f"p{number}", sign, sign - 0.5) for number in range(100) for sign in (0, 1)]
    pairs = all_pairs(rows).pairs
    held = [{pair["prompt_id"] for pair in split_by_prompt(pairs, 0.1, seed)[1]} for seed in (0, 1)]
    assert [len(prompts) for prompts in held] == [10, 10]
    assert held[0] != held[1]


# -- other signals than influence -----------------------------------------------------------------------------------


def told(losses: dict[str, list[float]], column: str) -> list[Row]:
    """Outputs that all help equally, with another value."""
    return [
        {**output(prompt, number, -1.0), column: value}
        for prompt, values in losses.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("signal", "column"), [("training_loss", "example_loss"), ("llm_judge", "grade")])
def test_values_above_the_siblings_mean_are_chosen(signal: Any, column: str) -> None:
    rows = by_signal(told({"a": [1.0, 2.0, 6.0], "b": [5.0, 5.0]}, column), signal, seed=0)
    assert ids(all_pairs(rows)) == [("a-2", "a-0"), ("a-2", "a-1")]
    assert [row["influence"] for row in rows] == [2.0, 1.0, -3.0, 0.0, 0.0]


def test_influence_itself_is_left_as_it_is() -> None:
    assert by_signal(TABLE, "influence", seed=0) == by_signal(TABLE, "shuffled_labels", seed=1) == TABLE


def test_chance_depends_on_the_seed_alone_and_prefers_half() -> None:
    rows = [output(f"p{prompt}", number, -1.0) for prompt in range(300) for number in range(4)]
    drawn = {row["example_id"]: row["influence"] for row in by_signal(rows, "random", seed=1)}
    assert drawn == {row["example_id"]: row["influence"] for row in by_signal(rows[::-1], "random", seed=1)}
    assert drawn != {row["example_id"]: row["influence"] for row in by_signal(rows, "random", seed=2)}
    assert abs(sum(value < 0 for value in drawn.values()) - 600) < 4 * math.sqrt(1200) / 2


def test_exchanged_labels_are_the_same_texts_half_of_them_the_other_way_round() -> None:
    rows = [output(f"p{prompt}", number, (-1) ** number * 0.5) for prompt in range(200) for number in range(4)]
    pairs = all_pairs(rows).pairs
    exchanged = exchange_labels(pairs, seed=0)
    assert [{pair["chosen"], pair["rejected"]} for pair in exchanged] == [
        {pair["chosen"], pair["rejected"]} for pair in pairs
    ]
    text_of = {row["example_id"]: row["raw_output"] for row in rows}
    influence_of = {row["example_id"]: row["influence"] for row in rows}
    for pair in exchanged:
        for side in ("chosen", "rejected"):
            assert pair[side] == text_of[pair[f"{side}_id"]]
            assert pair[f"{side}_influence"] == influence_of[pair[f"{side}_id"]]
    harmful = sum(pair["chosen_influence"] > 0 for pair in exchanged)
    assert abs(harmful - len(pairs) / 2) < 4 * math.sqrt(len(pairs)) / 2
