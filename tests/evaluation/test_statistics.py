"""Intervals of differences, against SciPy, against formulas, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats

from montessori_ray.errors import DataError
from montessori_ray.evaluation.statistics import (
    grouped_mean,
    mean_interval,
    mean_se,
    paired_difference,
    verdict,
    welch_difference,
)


def table(rng: np.random.Generator, seeds: int, rows: int, *, of_seeds: float, of_rows: float) -> np.ndarray:
    """Differences with mean 0: an effect of every seed, one of every row, and noise of 1 in every cell."""
    effects = of_seeds * rng.standard_normal((seeds, 1)) + of_rows * rng.standard_normal((1, rows))
    return effects + rng.standard_normal((seeds, rows))


def test_rows_of_one_seed_are_paired() -> None:
    rng = np.random.default_rng(1)
    before = 5 + 3 * rng.standard_normal(400)  # varies far more than the differences do
    after = before - 0.2 + 0.5 * rng.standard_normal(400)
    change = paired_difference(after, before)
    by_t = stats.ttest_rel(after, before)
    low, high = by_t.confidence_interval(0.95)
    assert change.mean == pytest.approx(after.mean() - before.mean())
    assert change.se == pytest.approx(stats.sem(after - before))
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.004)  # normal data: both must agree
    assert change == paired_difference([after], [before])  # (R,) and (1, R)
    assert change == paired_difference(after, before)  # the bootstrap's seed is fixed


def test_an_interval_of_skewed_rows_leans_as_they_do() -> None:
    values = np.random.default_rng(2).exponential(size=60) - 1
    change = paired_difference(values, np.zeros(60))
    assert change.high - change.mean > 1.05 * (change.mean - change.low)


def test_two_levels_have_the_standard_error_of_the_formula() -> None:
    """Pigeonhole bootstrap of n - 1 draws: variances of the means of seeds and rows, and the noise of cells again."""
    differences = table(np.random.default_rng(3), 6, 80, of_seeds=0.5, of_rows=1.0)
    seeds, rows = differences.shape
    of_seeds = differences.mean(axis=1).var(ddof=1) / seeds
    of_rows = differences.mean(axis=0).var(ddof=1) / rows
    cells = differences - differences.mean(axis=1, keepdims=True) - differences.mean(axis=0) + differences.mean()
    of_cells = (cells**2).sum() / (seeds * rows) / ((seeds - 1) * (rows - 1))
    change = paired_difference(differences, np.zeros_like(differences))
    assert change.se == pytest.approx((of_seeds + of_rows + of_cells) ** 0.5)
    assert change.mean == pytest.approx(differences.mean())


def test_where_only_seeds_differ_it_is_the_t_interval_of_the_seeds() -> None:
    seeds = np.array([-0.05, -0.03, -0.045, -0.06])
    change = paired_difference(np.repeat(seeds[:, None], 50, axis=1), np.zeros((4, 50)))
    low, high = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((low, high), abs=0.001)


def test_the_standard_error_is_what_resampling_gives() -> None:
    """Against the pigeonhole bootstrap itself: n - 1 of n teachers, seeds and rows drawn, each for itself."""
    rng = np.random.default_rng(11)
    differences = table(rng, 12, 30, of_seeds=0.5, of_rows=1.0).reshape(4, 3, 30)
    weights = [rng.multinomial(n - 1, [1 / n] * n, 20_000) / (n - 1) for n in differences.shape]
    means = np.einsum("tsr,bt,bs,br->b", differences, *weights, optimize=True)
    change = paired_difference(differences, np.zeros_like(differences))
    assert change.se == pytest.approx(means.std(), rel=0.02)


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_rows", "of_cells"),
    [(3, 0.5, 0.3, 1.0), (5, 0.2, 1.0, 1.0), (2, 0.0, 1.0, 1.0), (2, 0.7, 1.0, 0.3), (3, 0.5, 0.3, 0.2)],
)
def test_intervals_of_seeds_and_rows_hold_the_truth(
    seeds: int, of_seeds: float, of_rows: float, of_cells: float
) -> None:
    """Never seen seeds and rows: 95 % and, for the noise of cells counts more than once, a little above."""
    rng = np.random.default_rng(4)
    zeros = np.zeros((seeds, 40))
    of = {"of_seeds": of_seeds / of_cells, "of_rows": of_rows / of_cells}
    tables = (of_cells * table(rng, seeds, 40, **of) for _ in range(1_000))
    found = [paired_difference(differences, zeros) for differences in tables]
    covered = np.mean([change.low <= 0 <= change.high for change in found])
    assert 0.935 <= covered <= 0.999


@pytest.mark.parametrize("teachers", [2, 4])
def test_students_of_one_teacher_are_no_teachers_of_their_own(teachers: int) -> None:
    """Effects of teachers, of the student seeds that all teachers share, of students and of rows: all never seen."""
    rng = np.random.default_rng(8)

    def draw() -> np.ndarray:
        of_teachers = 0.5 * rng.standard_normal((teachers, 1, 1))
        of_seeds = 0.2 * rng.standard_normal((1, 3, 1))
        students = 0.2 * rng.standard_normal((teachers, 3, 1))
        return of_teachers + of_seeds + students + table(rng, 1, 40, of_seeds=0, of_rows=1.0)

    tables = [draw() for _ in range(150)]
    found = [paired_difference(differences, np.zeros_like(differences)) for differences in tables]
    as_if = [paired_difference(flat, np.zeros_like(flat)) for flat in (of.reshape(-1, 40) for of in tables)]
    covered, covered_as_if = (np.mean([of.low <= 0 <= of.high for of in some]) for some in (found, as_if))
    assert 0.9 <= covered <= 0.995
    assert covered_as_if < covered - 0.05


def test_three_levels_are_two_where_one_has_a_single_seed() -> None:
    differences = table(np.random.default_rng(9), 3, 30, of_seeds=0.5, of_rows=1.0)
    zeros = np.zeros_like(differences)
    of_both = paired_difference(differences, zeros)
    assert paired_difference(differences[:, None], zeros[:, None]) == of_both
    assert paired_difference(differences[None], zeros[None]) == of_both


def test_seeds_of_one_row_set_alone_are_no_evidence_for_other_seeds() -> None:
    """All rows better in one seed, all worse in the other: certain by row, nothing known about seeds."""
    differences = np.array([[-1.0] * 30, [1.01] * 30]) + 0.1 * np.random.default_rng(5).standard_normal((2, 30))
    assert paired_difference(differences[0], np.zeros(30)).high < -0.9
    change = paired_difference(differences, np.zeros((2, 30)))
    assert change.low < -1
    assert change.high > 1


def test_equal_arms_differ_by_nothing() -> None:
    losses = np.random.default_rng(6).standard_normal((3, 20))
    assert paired_difference(losses, losses) == (0, 0, 0, 0)
    assert paired_difference(losses[0], losses[0]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1.0, 2.0], [1.0], "same seeds and rows"),
        ([[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], "same seeds and rows"),
        ([1.0], [2.0], "at least two rows"),
        ([1.0, float("nan")], [1.0, 1.0], "1 numbers of them not finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(first: list[float], second: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        paired_difference(first, second)


def alone(values: ArrayLike) -> list[list[float]]:
    """Every value a group of its own."""
    return [[float(value)] for value in np.asarray(values)]


def test_independent_means_differ_as_welch_says() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.standard_normal(25) * 3 + 1, rng.standard_normal(60)
    change = welch_difference(alone(first), alone(second))
    reference = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((reference.low, reference.high))
    assert change.mean == pytest.approx(first.mean() - second.mean())
    assert change.se == pytest.approx((first.var(ddof=1) / 25 + second.var(ddof=1) / 60) ** 0.5)
    assert welch_difference(alone([2.0, 2.0]), alone([1.0, 1.0])) == (1, 1, 1, 0)
    with pytest.raises(DataError, match="at least two"):
        welch_difference([[1.0, 3.0]], alone([1.0, 2.0]))


def test_a_mean_of_groups_knows_that_siblings_are_alike() -> None:
    """Groups of equal size are as good as their means; and the error holds what means of such groups really vary."""
    rng = np.random.default_rng(9)
    values = rng.standard_normal((400, 50, 1)) + 0.5 * rng.standard_normal((400, 50, 4))
    found = [grouped_mean(groups) for groups in values.tolist()]
    of_means = mean_interval(values[0].mean(axis=-1).tolist())
    assert found[0] == pytest.approx(of_means)
    assert mean_se(values[0].ravel().tolist())["se"] < 0.7 * of_means.se
    covered = np.mean([low <= 0 <= high for _, low, high, _ in found])
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((-0.044, -0.056, -0.032), "lower: -0.0440 nats (95 % interval -0.0560 to -0.0320)"),
        ((0.01, 0.002, 0.018), "higher: +0.0100 nats (95 % interval +0.0020 to +0.0180)"),
        ((-0.01, -0.03, 0.01), "within noise: -0.0100 nats (95 % interval -0.0300 to +0.0100), which includes 0"),
        ((-3.6e-3, -3.8e-3, -3.4e-3), "lower: -3.60e-03 nats (95 % interval -3.80e-03 to -3.40e-03)"),
        ((0.0, 0.0, 0.0), "within noise: +0.0000 nats (95 % interval +0.0000 to +0.0000), which includes 0"),
    ],
)
def test_a_difference_is_said_plainly(numbers: tuple[float, float, float], sentence: str) -> None:
    assert verdict(*numbers, "nats") == sentence
    assert verdict(*numbers) == sentence.replace(" nats", "")


def test_the_error_of_a_single_value_or_group_is_not_known() -> None:
    assert mean_se([2.0]) == {"mean": 2.0, "se": pytest.approx(math.nan, nan_ok=True)}
    assert grouped_mean([[1.0, 3.0]]) == pytest.approx((2, 2, 2, math.nan), nan_ok=True)


@pytest.mark.parametrize("rows", [2, 4, 8, 19])
def test_intervals_of_a_handful_of_rows_hold_as_often_as_they_say(rows: int) -> None:
    """A category of held-out rows has no more; the bootstrap's hold 52 to 92 % there."""
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 2.0, (2_000, rows))
    found = [paired_difference(sample, np.zeros(rows)) for sample in samples]
    held = np.mean([change.low <= 1.0 <= change.high for change in found])
    assert 0.935 < held < 0.965
