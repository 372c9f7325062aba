"""Length control on judges made up for it, and the file that AlpacaEval reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from montessori_ray.evaluation.alpaca_eval import length_controlled_win_rate, write_outputs
from montessori_ray.evaluation.judge import Pair


def made_up(count: int, *, by_length: float, by_quality: float) -> tuple[list[Pair], dict[str, float], np.ndarray]:
    """Pairs in which the candidate is mostly longer, and the scores of a judge with these coefficients."""
    rng = np.random.default_rng(0)
    longer = rng.normal(60, 100, count).astype(int)
    chance = 1 / (1 + np.exp(-by_quality - by_length * np.tanh(longer / longer.std())))
    scores = (rng.random((2, count)) < chance).mean(axis=0)  # two orders
    pairs = [Pair(str(i), "Why?", "c" * (500 + extra), "b" * 500) for i, extra in enumerate(longer)]
    return pairs, {str(i): float(score) for i, score in enumerate(scores)}, longer


def test_a_judge_of_length_alone_gives_half() -> None:
    pairs, scores, _ = made_up(300, by_length=2.0, by_quality=0.0)
    raw = np.mean(list(scores.values()))
    found = length_controlled_win_rate(pairs, scores)
    assert raw > 0.6
    assert abs(found["win_rate"] - 0.5) < 0.5 * abs(raw - 0.5)
    assert abs(found["win_rate"] - 0.5) < 2 * found["standard_error"]
    assert found["length_effect"] > 1


def test_it_is_the_logistic_regression_it_should_be() -> None:
    """Against a plain maximum-likelihood fit; the package's penalty is light for this many pairs."""
    pairs, scores, longer = made_up(600, by_length=1.0, by_quality=0.8)
    preference, feature = np.array(list(scores.values())), np.tanh(longer / longer.std(ddof=1))

    def loss(weights: np.ndarray) -> float:
        logits = weights[0] + weights[1] * feature
        return float(np.mean(np.logaddexp(0, logits) - preference * logits))

    quality, length = optimize.minimize(loss, np.zeros(2)).x
    found = length_controlled_win_rate(pairs, scores)
    assert found["win_rate"] == pytest.approx(1 / (1 + np.exp(-quality)), abs=0.02)
    assert found["length_effect"] == pytest.approx(length, abs=0.15)
    assert 0.005 < found["standard_error"] < 0.03  # about sqrt(p (1 - p) / 1200) and what the length adds


def test_pairs_without_a_verdict_do_not_count() -> None:
    pairs, scores, _ = made_up(60, by_length=0.0, by_quality=0.0)
    del scores["7"]
    assert length_controlled_win_rate(pairs, scores)["pairs"] == 59


def test_what_cannot_be_told_is_none_with_the_reason() -> None:
    pairs, scores, _ = made_up(24, by_length=0.0, by_quality=0.0)
    found = length_controlled_win_rate(pairs, scores)
    assert (found["win_rate"], found["pairs"]) == (None, 24)
    assert "24 judged pairs, 25 are needed" in found["reason"]
    pairs, scores, _ = made_up(30, by_length=0.0, by_quality=0.0)
    lost = length_controlled_win_rate(pairs, dict.fromkeys(scores, 0.0))
    assert (lost["win_rate"], lost["reason"]) == (None, "all 30 pairs ended alike, whatever the length of the answers")
    even = {name: (0.0, 1.0, 0.5)[number % 3] for number, name in enumerate(scores)}
    assert "penalty leaves nothing but a tie: judge more" in length_controlled_win_rate(pairs, even)["reason"]
    alike = [Pair(str(i), "Why?", "same", "size") for i in range(30)]
    assert "same length" in length_controlled_win_rate(alike, dict.fromkeys(map(str, range(30)), 1.0))["reason"]


def test_outputs_are_written_as_alpaca_eval_reads_them(tmp_path: Path) -> None:
    from alpaca_eval.utils import load_or_convert_to_dataframe

    write_outputs(tmp_path / "outputs.json", [("Name a bird.", "Zaunkönig")], generator="student", dataset="held_out")
    row = {"instruction": "Name a bird.", "output": "Zaunkönig", "generator": "student", "dataset": "held_out"}
    assert json.loads((tmp_path / "outputs.json").read_text(encoding="utf-8")) == [row]
    assert load_or_convert_to_dataframe(str(tmp_path / "outputs.json")).to_dict("records") == [row]
