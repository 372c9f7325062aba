"""Reading instructions from raw outputs, and the paper's filters."""

from __future__ import annotations

import pytest

from montessori_ray.synthesis.parsing import Rejection, parse_instruction, rejection


@pytest.mark.parametrize(
    ("raw_output", "instruction"),
    [
        ("<instruction>Name a bird.</instruction>", "Name a bird."),
        ("Sure!\n<instruction>Name a bird.</instruction>\nDone.", "Name a bird."),
        ("<instruction>One.</instruction> <instruction>Two.</instruction>", "Two."),
        ("<instruction>One.</instruction> <instruction>Two.", "One."),
        ("<instruction>One. <instruction>Two.</instruction>", "Two."),
        ("<instruction>One.</instruction> Two.</instruction>", "One."),
        ("<instruction>\n  Sort:\n\t3,\u00a01 \r\n</instruction>", "Sort: 3, 1"),
        ("<instruction>if a < b and b > c?</instruction>", "if a < b and b > c?"),
        ("<instruction> \n </instruction>", None),
        ("<instruction>One.</instruction><instruction></instruction>", None),
        ("<instruction>Name a bird.", None),
        ("Name a bird.</instruction>", None),
        ("</instruction>Name a bird.<instruction>", None),
        ("Name a bird.", None),
        ("", None),
    ],
)
def test_last_complete_instruction_is_read(raw_output: str, instruction: str | None) -> None:
    assert parse_instruction(raw_output, prefilled=False) == instruction


@pytest.mark.parametrize(
    ("raw_output", "instruction"),
    [
        ("Name a bird.</instruction>", "Name a bird."),
        (" Name\n a   bird. </instruction>\n<instruction>Two.</instruction>", "Name a bird."),
        ("<instruction>Name a bird.</instruction>", "Name a bird."),
        ("I will.\n<instruction>Name a bird.</instruction>", "Name a bird."),
        ("</instruction>\n<instruction>Two.</instruction>", None),
        ("Name a bird.", None),
        ("Name a bird.</instruc", None),
        ("", None),
    ],
)
def test_prefilled_instruction_ends_at_the_first_closing_tag(raw_output: str, instruction: str | None) -> None:
    assert parse_instruction(raw_output, prefilled=True) == instruction


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Name 1", None),
        ("Add 1", Rejection.TOO_SHORT),
        ("", Rejection.TOO_SHORT),
        ("a" * 400, None),
        ("a" * 401, Rejection.TOO_LONG),
        ("Describe this image.", Rejection.FORBIDDEN_WORD),
        ("Compare two IMAGES", Rejection.FORBIDDEN_WORD),
        ("Explain the graph: it falls", Rejection.FORBIDDEN_WORD),
        ("Which graphs are planar?", Rejection.FORBIDDEN_WORD),
        ("What does the picture show?", Rejection.FORBIDDEN_WORD),
        ("Pictures of what sell best?", Rejection.FORBIDDEN_WORD),
        ("Open the file and sum up", Rejection.FORBIDDEN_WORD),
        ("How many files fit on it?", Rejection.FORBIDDEN_WORD),
        ("Find Rome on a map", Rejection.FORBIDDEN_WORD),
        ("How do maps distort areas?", Rejection.FORBIDDEN_WORD),
        ("Draw a conclusion from it", Rejection.FORBIDDEN_WORD),
        ("Outline the plot of Hamlet", Rejection.FORBIDDEN_WORD),
        ("Go to the shop and report", Rejection.FORBIDDEN_WORD),
        ("Write a paragraph on profiles", None),
        ("Imagine drawing; what did the mapping imply?", None),
        ("Let it go, to be honest", None),
        ('"Be brief": discuss this quote', Rejection.BAD_START),
        ("- Name a bird.", Rejection.BAD_START),
        ("<Name a bird>", Rejection.BAD_START),
        ("_Name_ a bird", Rejection.BAD_START),
        ("\u00c9crire une phrase", Rejection.BAD_START),
        ("\u5199\u4e00\u9996\u5173\u4e8e\u6625\u5929\u7684\u8bd7", Rejection.BAD_START),
        ("\u201cBe brief\u201d: discuss it", Rejection.BAD_START),
        ("Translate 'caf\u00e9 cr\u00e8me' to English", None),
        ("3 plus 4 is what?", None),
    ],
)
def test_filters_give_their_reason(instruction: str, reason: Rejection | None) -> None:
    assert rejection(instruction) is reason


def test_limits_are_inclusive_and_can_be_set() -> None:
    kept = [n for n in range(1, 12) if rejection("x" * n, min_characters=3, max_characters=9) is None]
    assert kept == list(range(3, 10))


def test_reasons_are_strings_for_tables_and_counters() -> None:
    assert [str(reason) for reason in Rejection] == [
        "unparsed",
        "too_short",
        "too_long",
        "forbidden_word",
        "bad_start",
        "duplicate",
    ]
