"""Agreement of scores with their recheck, on a table whose numbers are known."""

import pytest

from montessori_ray.influence.agreement import agreement


def rows(scored: list[float], again: list[float], prompts: str) -> list[dict[str, object]]:
    return [
        {"example_id": str(number), "prompt_id": prompt, "influence": first, "recheck_influence": second}
        for number, (first, second, prompt) in enumerate(zip(scored, again, prompts, strict=True))
    ]


def test_a_table_done_by_hand() -> None:
    found = agreement(rows([-2.0, 1.0, -0.5, 3.0], [-1.0, 2.0, 0.5, 3.0], "aabb"))
    assert found["points"] == 4
    assert found["noise"] == pytest.approx((3 / 4) ** 0.5)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(11.0625 / (13.6875 * 9.1875) ** 0.5)
    assert found["same_sign"] == 0.75
    assert (found["pairs"], found["pairs_changed"]) == (2, 1)  # prompt b: a pair by the first scores alone
    assert found["spread"] == pytest.approx(1.75)


def test_equal_values_share_a_rank() -> None:
    found = agreement(rows([1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], "abcd"))
    assert found["spearman"] == pytest.approx(0.9487, abs=1e-4)  # scipy.stats.spearmanr of the same


def test_scores_that_are_their_own_recheck() -> None:
    found = agreement(rows([-1.0, 2.0], [-1.0, 2.0], "aa"))
    assert (found["noise"], found["same_sign"], found["pairs"], found["pairs_changed"]) == (0, 1, 1, 0)
    assert found["spearman"] is None
