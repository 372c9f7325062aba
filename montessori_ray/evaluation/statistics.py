"""Means and their standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev


def mean_se(values: Sequence[float]) -> dict[str, float]:
    """`mean` of the values and its standard error `se`, 0 for a single one."""
    return {"mean": fmean(values), "se": stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0}
