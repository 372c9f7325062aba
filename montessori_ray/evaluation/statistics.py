"""Means, their standard errors, and 95 % intervals of differences: how sure a comparison is.

    change = paired_difference(tuned_SR, original_SR)       # S seeds, R rows, the same ones in both
    print(verdict(change.mean, change.low, change.high, "nats"))

Arrays carry their shape as a suffix: S seeds, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from montessori_ray.errors import DataError

Array = NDArray[np.float64]

CONFIDENCE = 0.95
PERCENTILE_RESAMPLES = 10_000
"""Bootstrap samples for the ends of an interval."""

ERROR_RESAMPLES = 2_000
"""Bootstrap samples for a standard error, which is then right to 1 / sqrt(2 x 2,000) = 1.6 %."""

_CELLS_AT_ONCE = 10_000_000
"""Numbers drawn in one go, which bounds memory to some 200 MB for any number of rows."""


def mean_se(values: Sequence[float]) -> dict[str, float]:
    """`mean` of the values and its standard error `se`, 0 for a single one."""
    return {"mean": fmean(values), "se": stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0}


class Interval(NamedTuple):
    """A mean and where it may lie; `_asdict()` is what details and reports hold."""

    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    se: float
    """Standard error of the mean."""


def paired_difference(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Interval:
    """Mean of `first - second`, both (R,) or (S, R): row r of both is the same row, seed s the same seed.

    One seed, or (R,): BCa bootstrap over the rows. It says what other rows would give, and nothing about other seeds.

    Several seeds: seeds and rows are resampled independently of each other, so that the interval holds for other seeds
    *and* other rows; see `_two_level`.

    Args:
        first: losses, say, of one arm.
        second: those of the arm it is compared with.
        seed: seed of the bootstrap; the same numbers always give the same interval.

    Raises:
        DataError: shapes differ, there are fewer than two rows, or a number is not finite.
    """
    differences_SR = _table(first) - _table(second) if np.shape(first) == np.shape(second) else None  # noqa: N806
    if differences_SR is None:
        raise DataError(
            f"a paired difference needs the same seeds and rows in both arms, got shapes {np.shape(first)} and "
            f"{np.shape(second)}: keep the seeds and rows that both have, or compare means with welch_difference"
        )
    if differences_SR.shape[1] < 2 or not np.isfinite(differences_SR).all():
        raise DataError(
            f"a difference of {differences_SR.shape[1]} rows, {int((~np.isfinite(differences_SR)).sum())} numbers of "
            "them not finite, has no interval: give at least two rows, and leave out rows without a number"
        )
    if len(differences_SR) == 1:
        return _one_level(differences_SR[0], seed)
    return _two_level(differences_SR, seed)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of values taken as independent, by Student's t; a single value has an interval of no width.

    For numbers of one run on its own, of which there may be a handful: with so few the bootstrap is too narrow.
    """
    return grouped_mean([[value] for value in values])


def grouped_mean(groups: Sequence[Sequence[float]]) -> Interval:
    """Mean of all values of groups that are independent of each other, as examples of one few-shot prompt are not.

    The standard error is the cluster-robust one of a mean (Cochran 1977, section 9A): from the groups' sums of
    deviations; with one value a group it is the ordinary one. The interval is Student's t on groups - 1 degrees.
    """
    values = [value for group in groups for value in group]
    mean, num_groups = fmean(values), len(groups)
    sums = [sum(value - mean for value in group) for group in groups]
    if num_groups < 2 or not any(sums):
        return Interval(mean, mean, mean, 0.0)
    se = sqrt(num_groups / (num_groups - 1) * sum(total**2 for total in sums)) / len(values)
    return _t_interval(mean, se, num_groups - 1)


def welch_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Interval:
    """Difference of the means of two independent samples of groups (see `grouped_mean`), by Welch's t interval.

    Raises:
        DataError: a sample has fewer than two groups.
    """
    sizes = len(first), len(second)
    if min(sizes) < 2:
        raise DataError(f"samples of {sizes[0]} and {sizes[1]} groups have no interval: each needs at least two")
    means = [grouped_mean(groups) for groups in (first, second)]
    mean = means[0].mean - means[1].mean
    squares = [found.se**2 for found in means]
    if not sum(squares):
        return Interval(mean, mean, mean, 0.0)
    freedom = sum(squares) ** 2 / sum(square**2 / (size - 1) for square, size in zip(squares, sizes, strict=True))
    return _t_interval(mean, sqrt(sum(squares)), freedom)


def verdict(mean: float, low: float, high: float, unit: str = "") -> str:
    """One plain sentence on a difference: its size, its 95 % interval, and whether it is more than noise."""
    digits = _digits(max(abs(low), abs(high)))
    said = f"{mean:+{digits}}{unit and f' {unit}'} (95 % interval {low:+{digits}} to {high:+{digits}})"
    if low <= 0 <= high:
        return f"within noise: {said}, which includes 0"
    return f"{'higher' if mean > 0 else 'lower'}: {said}"


def _digits(size: float) -> str:
    """Format of numbers of this size: four decimals where that shows something, else powers of ten."""
    return ".4f" if 0.005 <= size < 1000 or not size else ".2e"


def _table(values: ArrayLike) -> Array:
    """Values as (S, R); (R,) is one seed."""
    return np.atleast_2d(np.asarray(values, dtype=np.float64))


def _one_level(differences_R: Array, seed: int) -> Interval:  # noqa: N803
    """BCa bootstrap of the mean over rows (Efron 1987, by SciPy)."""
    from scipy import stats  # late: its import takes seconds, which `montessori plan` need not wait for

    mean, se = mean_se(differences_R.tolist()).values()
    if not np.ptp(differences_R):
        return Interval(mean, mean, mean, 0.0)
    found = stats.bootstrap(
        (differences_R,), np.mean, confidence_level=CONFIDENCE, n_resamples=PERCENTILE_RESAMPLES, method="BCa",
        batch=max(1, _CELLS_AT_ONCE // len(differences_R)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high), se)


def _two_level(differences_SR: Array, seed: int) -> Interval:  # noqa: N803
    """Seeds and rows drawn independently, each with replacement (the pigeonhole bootstrap, Owen 2007).

    S - 1 seeds and R - 1 rows are drawn, which makes the variance right for few of them (Rao and Wu 1988). Percentiles
    of a handful of seeds cannot reach beyond the most extreme seed (3 seeds would be covered in 3 of 4 cases instead of
    95 %), so the interval is the bootstrap's standard error times a quantile of Student's t, with degrees of freedom by
    Satterthwaite's rule. Noise of single (seed, row) cells counts up to three times: it errs on the wide side.
    """
    num_seeds, num_rows = differences_SR.shape
    mean = float(differences_SR.mean())
    rng = np.random.default_rng(seed)
    means: list[Array] = []
    for size in _batches(num_rows):
        counts_S = rng.multinomial(num_seeds - 1, np.full(num_seeds, 1 / num_seeds), size)  # noqa: N806
        counts_R = rng.multinomial(num_rows - 1, np.full(num_rows, 1 / num_rows), size)  # noqa: N806
        sums = ((counts_S @ differences_SR) * counts_R).sum(axis=1)
        means.append(sums / ((num_seeds - 1) * (num_rows - 1)))
    se = float(np.sqrt(np.mean((np.concatenate(means) - mean) ** 2)))
    if not np.ptp(differences_SR):
        return Interval(mean, mean, mean, 0.0)
    of_seeds = float(differences_SR.mean(axis=1).var(ddof=1)) / num_seeds
    of_rows = float(differences_SR.mean(axis=0).var(ddof=1)) / num_rows
    total = of_seeds + of_rows
    if not total:  # every seed and every row has the same mean: the bootstrap sees the cells' noise only
        return _t_interval(mean, se, min(num_seeds, num_rows) - 1)
    freedom = total**2 / (of_seeds**2 / (num_seeds - 1) + of_rows**2 / (num_rows - 1))
    return _t_interval(mean, se, freedom)


def _batches(num_rows: int) -> list[int]:
    """Sizes of batches that make ERROR_RESAMPLES together."""
    at_once = max(1, min(ERROR_RESAMPLES, _CELLS_AT_ONCE // num_rows))
    whole, rest = divmod(ERROR_RESAMPLES, at_once)
    return [at_once] * whole + [rest] * bool(rest)


def _t_interval(mean: float, se: float, freedom: float) -> Interval:
    from scipy.special import stdtrit  # late: see _one_level

    reach = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * se
    return Interval(mean, mean - reach, mean + reach, se)
