"""Influence of what teachers wrote afresh: by teacher, and within a teacher by few-shot prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Groups = list[list[float]]
"""Influences by few-shot prompt: examples of one prompt are alike, so they count together (`grouped_mean`)."""

COLUMNS = ["example_id", "prompt_id", "influence"]


def by_teacher(rows: Iterable[Mapping[str, Any]], teacher_of: Callable[[str], str]) -> dict[str, Groups]:
    """Teacher -> its examples' influences by prompt, quarantined examples left out; teachers in order of appearance."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["influence"] is not None:
            prompts = found.setdefault(teacher_of(row["example_id"]), {})
            prompts.setdefault(row["prompt_id"], []).append(row["influence"])
    return {teacher: list(prompts.values()) for teacher, prompts in found.items()}


def by_place(rows: Iterable[Mapping[str, Any]]) -> dict[str, Groups]:
    """The teachers of one loop, the original one first: by the place in the loop where each wrote.

    `iteration_00-fresh-p000001-2` -> `iteration_00`; the last teacher's place is `final`.
    """
    found = by_teacher(rows, lambda example_id: example_id.rsplit("-fresh-", 1)[0])
    return {name: found[name] for name in sorted(found, key=lambda name: (name == "final", name))}


def share_helpful(groups: Groups) -> float:
    """Share of examples with an influence below 0."""
    values = [value for group in groups for value in group]
    return sum(value < 0 for value in values) / len(values)
