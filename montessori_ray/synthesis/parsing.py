"""From the teacher's raw output to an instruction, and the paper's filters on it (section 3.1, the authors' settings).

Unlike the authors' code, an instruction keeps its letters' case.
"""

from __future__ import annotations

import re
import string
from enum import StrEnum

from montessori_ray.synthesis.prompts import CLOSE_TAG, OPEN_TAG

# The innermost pair: an opening tag that the model repeats or abandons is not part of an instruction.
_TAGGED = re.compile(f"{OPEN_TAG}((?:(?!{OPEN_TAG}).)*?){CLOSE_TAG}", re.DOTALL)

# Tasks that a text-only student cannot do.
_FORBIDDEN = re.compile(r"\b(?:images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)


class Rejection(StrEnum):
    """Why a sample does not become an instruction."""

    UNPARSED = "unparsed"
    """The raw output holds no complete instruction."""
    TOO_SHORT = "too_short"
    """Fewer characters than the minimum."""
    TOO_LONG = "too_long"
    """More characters than the maximum."""
    FORBIDDEN_WORD = "forbidden_word"
    """A word for something a text-only student cannot see or do, such as "image" or "draw"."""
    BAD_START = "bad_start"
    """The first character is ASCII punctuation or not ASCII."""
    DUPLICATE = "duplicate"
    """Too similar to a kept instruction or to an example of its own prompt (see `deduplication`)."""


def parse_instruction(raw_output: str, *, prefilled: bool) -> str | None:
    """The instruction in a sample, white space folded to single spaces; None if there is none or it is empty.

    That is the text of the last complete `<instruction>...</instruction>`. When the prompt was `prefilled`, its
    opening tag stands in the prompt, and the text up to the first `</instruction>` counts.
    """
    texts: list[str] = _TAGGED.findall(OPEN_TAG + raw_output if prefilled else raw_output)
    if not texts:
        return None
    return " ".join(texts[0 if prefilled else -1].split()) or None


def rejection(instruction: str, *, min_characters: int = 6, max_characters: int = 400) -> Rejection | None:
    """Why the paper's filters reject a parsed `instruction`, None if they keep it.

    Both limits are inclusive and count characters; forbidden words count as whole words in any case. `UNPARSED` and
    `DUPLICATE` are not decided here.
    """
    if len(instruction) < min_characters:
        return Rejection.TOO_SHORT
    if len(instruction) > max_characters:
        return Rejection.TOO_LONG
    if _FORBIDDEN.search(instruction):
        return Rejection.FORBIDDEN_WORD
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return Rejection.BAD_START
    return None
