"""Grades of examples, from a judge whose replies are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from montessori_ray.evaluation.endpoint import Conversation, Reply
from montessori_ray.evaluation.grading import grade_examples

REPLIES = {
    "good": Reply("Clear.\nRating: 9"),
    "odd": Reply("I like it."),
    "long": Reply("too long", refused=True),
    "rambling": Reply("Rating: 9 would be too much, since", cut=True),
}


def ask(conversations: Iterable[Conversation]) -> Iterator[Reply]:
    for (message,) in conversations:
        (name,) = (name for name in REPLIES if f"Say {name}." in message["content"])
        assert f"\n{name} response\n" in message["content"]
        yield REPLIES[name]


def test_an_example_without_a_readable_grade_has_none() -> None:
    rows = [
        {"example_id": name, "instruction": f"Say {name}.", "response": f"{name} response"} for name in sorted(REPLIES)
    ]
    assert [(row["example_id"], row["grade"]) for row in grade_examples(iter(rows), ask)] == [
        ("good", 9.0), ("long", None), ("odd", None), ("rambling", None),
    ]  # fmt: skip
