"""The state of a synthesis: rounds, shots, statuses, and that a resumed one goes on as the undisturbed one does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count, groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from montessori_ray.config import Synthesize
from montessori_ray.errors import DataError
from montessori_ray.stages.schemas import INSTRUCTIONS
from montessori_ray.synthesis.instructions import KEPT, MIN_JUDGED, InstructionWriter
from montessori_ray.synthesis.prompts import FewShotPrompt

Row = dict[str, Any]
SEEDS = [f"seed instruction number {number} about topic {number * 7}" for number in range(30)]
WORDS = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in ("ab", "en", "il", "op", "ur")]


def sentence(seed: int) -> str:
    """Twelve words drawn by `seed`: two seeds have next to nothing in common."""
    return " ".join(random.Random(seed).choices(WORDS, k=12))


def perfect_teacher(seed: int) -> str:
    return f"<instruction>{sentence(seed)}</instruction>"


def clumsy_teacher(seed: int) -> str:
    """Of ten samples about four are kept; the others fail in every way a sample can."""
    outputs = [
        "no tags at all",
        "<instruction>Hi</instruction>",
        f"<instruction>{'long ' * 100}</instruction>",
        f"<instruction>Draw {sentence(seed)}</instruction>",
        f"<instruction>- {sentence(seed)}</instruction>",
        f"<instruction>{sentence(seed % 3)}</instruction>",
    ]
    choice = random.Random(f"choice {seed}").randrange(10)
    return outputs[choice] if choice < len(outputs) else perfect_teacher(seed)


def hopeless_teacher(_: int) -> str:
    return "Sure! Here is a list of ideas."


def make_writer(
    *, target: int, n: int = 4, prompts_per_round: int = 5, seed: int = 0, learn_shots: bool = True, **settings: Any
) -> InstructionWriter:
    return InstructionWriter(
        Synthesize(n=n, prompts_per_round=prompts_per_round, **settings),
        seeds=SEEDS, name="it", stream="stream", target=target, seed=seed, learn_shots=learn_shots,
    )  # fmt: skip


def judge(writer: InstructionWriter, prompt: FewShotPrompt, n: int, teacher: Callable[[int], str]) -> list[Row]:
    samples = [teacher(prompt.seed + number) for number in range(n)]
    return writer.judge(prompt, f"text of {prompt.shots}", samples, "digest")


def write(
    writer: InstructionWriter, teacher: Callable[[int], str], n: int = 4
) -> Iterator[tuple[FewShotPrompt, list[Row]]]:
    """Prompts and their rows until the target is reached."""
    while prompts := writer.next_prompts():
        for prompt in prompts:
            yield prompt, judge(writer, prompt, n, teacher)


# -- rounds and shots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "sizes"),
    [(1, [1]), (4, [1]), (5, [2]), (20, [5]), (21, [5, 1]), (48, [5, 5, 2])],
)
def test_rounds_are_as_large_as_the_target_needs_and_the_setting_allows(target: int, sizes: list[int]) -> None:
    writer, seen = make_writer(target=target), []
    while prompts := writer.next_prompts():
        seen.append(len(prompts))
        for prompt in prompts:
            judge(writer, prompt, 4, perfect_teacher)
    assert seen == sizes
    assert writer.num_kept >= target
    assert writer.next_prompts() == []


def test_later_rounds_are_larger_when_few_samples_are_kept() -> None:
    """After 8 samples of which 2 were kept, 6 more need about 6 prompts of 4."""
    writer = make_writer(target=8, prompts_per_round=99)
    first = writer.next_prompts()
    assert len(first) == 2
    for number, prompt in enumerate(first):
        writer.judge(prompt, "text", [perfect_teacher(number), *["nothing"] * 3], "digest")
    assert len(writer.next_prompts()) == 6


def test_prompts_are_numbered_through_and_drawn_alike_for_equal_streams() -> None:
    one, two = make_writer(target=40), make_writer(target=40)
    prompts = [prompt for prompt, _ in write(one, perfect_teacher)]
    assert [prompt.index for prompt in prompts] == list(range(len(prompts)))
    assert [prompt.prompt_id for prompt in prompts[:2]] == ["it-p000000", "it-p000001"]
    assert [prompt for prompt, _ in write(two, perfect_teacher)] == prompts
    other = make_writer(target=40, seed=1)
    assert [prompt.shots for prompt, _ in write(other, perfect_teacher)] != [prompt.shots for prompt in prompts]


def test_shots_are_seeds_in_the_first_round_and_six_seeds_and_two_kept_ones_afterwards() -> None:
    writer, kept = make_writer(target=60), list[str]()
    for number, prompts in enumerate(iter(writer.next_prompts, [])):
        before_this_round = list(kept)
        for prompt in prompts:
            assert len(set(prompt.shots)) == 8
            generated = [shot for shot in prompt.shots if shot not in SEEDS]
            assert len(generated) == (2 if number else 0)
            assert set(generated) <= set(before_this_round), "a shot of the very round that is being sampled"
            kept += [row["instruction"] for row in judge(writer, prompt, 4, perfect_teacher) if row["status"] == KEPT]
    assert number >= 2


def test_without_learning_all_shots_are_seeds() -> None:
    prompts = [prompt for prompt, _ in write(make_writer(target=60, learn_shots=False), perfect_teacher)]
    assert len(prompts) == 15
    assert all(set(prompt.shots) <= set(SEEDS) for prompt in prompts)


# -- samples --------------------------------------------------------------------------------------------------------


def test_every_sample_is_a_row_with_its_status() -> None:
    writer = make_writer(target=9, n=9, prompts_per_round=1)
    [prompt] = writer.next_prompts()
    samples = [
        "<instruction>  Name the \n largest lake of each continent. </instruction>",
        "no instruction",
        "<instruction>Hi</instruction>",
        f"<instruction>{'a' * 401}</instruction>",
        "<instruction>Describe this image in two sentences.</instruction>",
        "<instruction>* Name three primes</instruction>",
        "<instruction>name the largest lake of each continent!</instruction>",
        f"<instruction>{prompt.shots[3]}</instruction>",
        "<instruction>Explain why bread rises.</instruction>",
    ]
    rows = writer.judge(prompt, "the rendered prompt", samples, "sha")
    duplicates = ["duplicate", "duplicate"]
    statuses = [KEPT, "unparsed", "too_short", "too_long", "forbidden_word", "bad_start", *duplicates, KEPT]
    assert [row["status"] for row in rows] == statuses
    assert writer.statuses == Counter(statuses)
    assert writer.num_kept == 2
    assert [row["example_id"] for row in rows] == [f"it-p000000-{number}" for number in range(9)]
    assert [row["raw_output"] for row in rows] == samples
    assert rows[0]["instruction"] == "Name the largest lake of each continent."
    assert rows[1]["instruction"] is None
    assert {(row["prompt"], row["prompt_id"], row["teacher_digest"], row["round"]) for row in rows} == {
        ("the rendered prompt", "it-p000000", "sha", 0)
    }
    assert set(rows[0]) == set(INSTRUCTIONS.names)


def test_a_prefilled_sample_begins_inside_its_instruction() -> None:
    writer = make_writer(target=1, n=2, prompt_style="prefill")
    [prompt] = writer.next_prompts()
    rows = writer.judge(prompt, "text", ["Name a prime number.</instruction>", "Name a"], "sha")
    assert [(row["instruction"], row["status"]) for row in rows] == [
        ("Name a prime number.", KEPT),
        (None, "unparsed"),
    ]


def test_a_duplicate_of_an_earlier_round_is_not_kept_again() -> None:
    writer = make_writer(target=30)
    rows = [row for _, rows in write(writer, clumsy_teacher) for row in rows]
    first_round: dict[str, int] = {}
    for row in rows:
        if row["status"] == KEPT:
            assert row["instruction"] not in first_round
            first_round[row["instruction"]] = row["round"]
    duplicates = [row for row in rows if row["status"] == "duplicate"]
    assert any(row["round"] > first_round[row["instruction"]] for row in duplicates)
    assert len(first_round) == writer.num_kept >= 30
    assert writer.statuses == Counter(row["status"] for row in rows)


def test_samples_out_of_order_are_a_fault_of_the_program() -> None:
    writer = make_writer(target=20)
    prompts = writer.next_prompts()
    with pytest.raises(AssertionError, match="in prompt order"):
        judge(writer, prompts[1], 4, perfect_teacher)


# -- resume ---------------------------------------------------------------------------------------------------------

TARGETS = {"perfect": 45, "clumsy": 30}
TEACHERS = {"perfect": perfect_teacher, "clumsy": clumsy_teacher}


@cache
def undisturbed(teacher: str) -> tuple[list[FewShotPrompt], list[Row]]:
    written = list(write(make_writer(target=TARGETS[teacher]), TEACHERS[teacher]))
    return [prompt for prompt, _ in written], [row for _, rows in written for row in rows]


def resumed(teacher: str, committed: list[Row]) -> InstructionWriter:
    writer = make_writer(target=TARGETS[teacher])
    for _, rows in groupby(committed, key=lambda row: row["prompt_id"]):
        writer.replay(list(rows))
    return writer


@pytest.mark.parametrize("teacher", TEACHERS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_synthesis_cut_anywhere_goes_on_as_if_it_had_not_been(teacher: str, data: st.DataObject) -> None:
    prompts, rows = undisturbed(teacher)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(prompts)), max_size=3), label="prompts done at each kill"))
    committed: list[Row] = []
    sent: list[FewShotPrompt] = []
    for cut in [*cuts, len(prompts) + 1]:
        writer = resumed(teacher, committed)
        assert writer.num_kept == sum(row["status"] == KEPT for row in committed)
        for prompt, judged in write(writer, TEACHERS[teacher]):
            if len(sent) == cut:
                break  # killed: what was judged last is lost
            sent.append(prompt)
            committed += judged
    assert sent == prompts
    assert committed == rows
    assert writer.statuses == Counter(row["status"] for row in rows)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_finished_synthesis_asks_for_nothing_when_it_is_resumed(teacher: str) -> None:
    assert resumed(teacher, undisturbed(teacher)[1]).next_prompts() == []


def test_rows_that_another_setting_made_are_noticed() -> None:
    writer = make_writer(target=TARGETS["perfect"], prompts_per_round=3)
    prompts = [list(rows) for _, rows in groupby(undisturbed("perfect")[1], key=lambda row: row["prompt_id"])]
    for rows in prompts[:3]:
        writer.replay(rows)
    with pytest.raises(AssertionError, match="was committed in another round"):
        writer.replay(prompts[3])


# -- hopeless teachers ----------------------------------------------------------------------------------------------


def test_a_hopeless_teacher_ends_with_an_error_that_counts_the_reasons() -> None:
    writer = make_writer(target=1000, prompts_per_round=MIN_JUDGED // 4)
    with pytest.raises(
        DataError, match=rf"{MIN_JUDGED} of the last {MIN_JUDGED} samples were rejected \(200 unparsed\)"
    ) as caught:
        list(write(writer, hopeless_teacher))
    assert "synthesize.prompt_style=prefill" in str(caught.value)
    assert "synthesize.max_rejected" in str(caught.value)


def test_a_teacher_that_has_nothing_new_to_say_is_noticed_soon() -> None:
    """Not when its duplicates outnumber all it wrote before."""

    asked = count()

    def exhausted(seed: int) -> str:
        return perfect_teacher(seed) if next(asked) < 600 else hopeless_teacher(seed)

    writer = make_writer(target=1000, prompts_per_round=MIN_JUDGED // 4)
    with pytest.raises(DataError, match=rf"of the last {MIN_JUDGED} samples were rejected"):
        list(write(writer, exhausted))
    assert writer.statuses.total() <= 600 + 2 * MIN_JUDGED


def test_a_few_bad_samples_end_nothing() -> None:
    writer = make_writer(target=1000, prompts_per_round=10)
    with pytest.raises(DataError):
        list(write(writer, hopeless_teacher))
    assert MIN_JUDGED <= writer.statuses.total() < MIN_JUDGED + 40


@pytest.mark.parametrize(("one_kept_in", "hopeless"), [(25, True), (16, False)])
def test_the_share_that_may_be_rejected_is_the_settings(one_kept_in: int, hopeless: bool) -> None:
    """0.95 by default, so one kept sample in 20 is the border."""
    writer = make_writer(target=30, n=one_kept_in, prompts_per_round=10)

    def sample() -> None:
        for prompts in iter(writer.next_prompts, []):
            for prompt in prompts:
                samples = [perfect_teacher(prompt.seed), *["nothing"] * (one_kept_in - 1)]
                writer.judge(prompt, "text", samples, "digest")

    if hopeless:
        with pytest.raises(DataError):
            sample()
    else:
        sample()
        assert writer.num_kept == 30
