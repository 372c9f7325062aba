"""How well scores agree with the same examples scored again, exactly and in float32: their noise, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare `influence` with `recheck_influence` of rows that have both (and `prompt_id`).

    Returns:
        points; noise: root mean square of the differences; spread: standard deviation of the rechecked influences;
        pearson, spearman (None below 3 points or without spread); same_sign: share of points; pairs: preference pairs
        of the paper's rule by either of both, pairs_changed: those by one alone.
    """
    scored = np.array([row["influence"] for row in rows])
    again = np.array([row["recheck_influence"] for row in rows])
    pairs, pairs_again = (_pairs(rows, column) for column in ("influence", "recheck_influence"))
    return {
        "points": len(rows),
        "noise": float(np.sqrt(np.mean((scored - again) ** 2))),
        "spread": float(again.std(ddof=1)) if len(rows) > 1 else None,
        "pearson": _correlation(scored, again),
        "spearman": _correlation(_ranks(scored), _ranks(again)),
        "same_sign": float(np.mean(np.sign(scored) == np.sign(again))),
        "pairs": len(pairs | pairs_again),
        "pairs_changed": len(pairs ^ pairs_again),
    }


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    if len(first) < 3 or not first.std() or not second.std():
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _pairs(rows: Sequence[Mapping[str, Any]], column: str) -> set[tuple[str, str]]:
    """(helpful, harmful) examples of the same few-shot prompt."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    return {
        (first["example_id"], second["example_id"])
        for outputs in by_prompt.values()
        for first, second in product(outputs, outputs)
        if first[column] < 0 < second[column]
    }
