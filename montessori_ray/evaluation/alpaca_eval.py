"""AlpacaEval 2.0: its file of model outputs, and its length-controlled win rate on verdicts of one's own judge.

The win rate comes from the package `alpaca-eval` (Dubois et al. 2024): a logistic regression of the preferences on the
difference of the answers' lengths, asked what it would be without one. For its own 805 instructions AlpacaEval adds
their difficulty and answers of models that were told to be brief or verbose, both from tables of its own judge on the
Hub. These mean nothing for other instructions or judges, so this is the package's `length_controlled_minimal`, which
goes without.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from montessori_ray.errors import ConfigError
from montessori_ray.evaluation.judge import Pair

GLM = "length_controlled_minimal"

MIN_PAIRS = 25
"""Pairs below which no length effect can be told from noise (ours): its five cross-validation folds have five each."""

RESAMPLES = 200
"""Bootstrap samples for the standard error, each a fit at the strength of regularisation found on all pairs."""


def write_outputs(path: Path, outputs: Iterable[tuple[str, str]], *, generator: str, dataset: str) -> None:
    """Write `(instruction, output)` pairs as `alpaca_eval --model_outputs` reads them.

    Args:
        path: JSON file.
        outputs: what one model answered.
        generator: the model's name.
        dataset: the instructions' name; the reference outputs must have the same instructions.
    """
    rows = [
        {"instruction": instruction, "output": output, "generator": generator, "dataset": dataset}
        for instruction, output in outputs
    ]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def require_package() -> None:
    """Raise ConfigError without the package `alpaca-eval`: verdicts are dear, and their stage finishes once."""
    if find_spec("alpaca_eval") is None:
        raise ConfigError(
            "a win rate needs the package alpaca-eval for its length control: pip install 'montessori-ray[eval]'"
        )


def length_controlled_win_rate(pairs: Sequence[Pair], scores: Mapping[str, float]) -> dict[str, Any]:
    """The candidate's win rate if all its answers were as long as the baseline's.

    Args:
        pairs: the answers, whose lengths in characters count.
        scores: example_id -> share the candidate won, 0 to 1 (`judge.pair_scores`); pairs without one are left out.

    Returns:
        pairs: how many counted; win_rate, standard_error: shares, 0 to 1; length_effect: the regression's coefficient,
        above 0 where the judge prefers the longer answer; method; reason: why win_rate and the rest are None, which
        they are for fewer than `MIN_PAIRS` pairs, where all answers differ by one length or all pairs ended alike,
        or where the regression's penalty leaves nothing of the differences.
    """
    judged = [pair for pair in pairs if pair.example_id in scores]
    preference_R = np.array([scores[pair.example_id] for pair in judged])  # noqa: N806
    longer_R = np.array([len(pair.candidate) - len(pair.baseline) for pair in judged], dtype=float)  # noqa: N806
    result: dict[str, Any] = {"pairs": len(judged), "method": GLM}
    reason = None
    if len(judged) < MIN_PAIRS:
        reason = f"{len(judged)} judged pairs, {MIN_PAIRS} are needed to tell the effect of length from noise"
    elif not longer_R.std():
        reason = "every answer differs by the same length, so its effect cannot be told"
    elif not preference_R.std():
        reason = f"all {len(judged)} pairs ended alike, whatever the length of the answers"
    fitted = None if reason else _fit(preference_R, longer_R / longer_R.std(ddof=1))
    if fitted is None:
        reason = reason or f"of {len(judged)} pairs the regression's penalty leaves nothing but a tie: judge more"
        return result | {"win_rate": None, "standard_error": None, "length_effect": None, "reason": reason}
    return result | fitted | {"reason": None}


def _fit(preference_R: Any, longer_R: Any) -> dict[str, float] | None:  # noqa: N803
    """The package's regression, and its spread over bootstrap samples of the pairs; None if it has no coefficient."""
    import pandas as pd
    import sklearn
    from alpaca_eval.metrics import glm_winrate  # late: its import takes seconds

    info = glm_winrate.GLM_INFO[GLM]
    # The package's sign: length of the baseline's answer minus the candidate's, in standard deviations.
    table = pd.DataFrame({"preference": preference_R, "std_delta_len": -longer_R, "not_gamed_baseline": True})
    equal_lengths = table[["not_gamed_baseline"]].assign(std_delta_len=0.0)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(), sklearn.config_context():  # the package switches metadata routing on for good
        warnings.simplefilter("ignore")  # on arguments it gives scikit-learn that a later version will not take
        design, test = glm_winrate.make_dmatrix_for_model(table, equal_lengths, formula=info["formula"])
        model = glm_winrate.fit_LogisticRegressionCV(design, "preference", is_ytrue_proba=True, **info["kwargs"])
        if not model.coef_.any():
            return None
        strength = float(np.ravel(model.C_)[0])
        rates = []
        for _ in range(RESAMPLES):
            drawn = design.iloc[rng.integers(len(design), size=len(design))]
            again = glm_winrate.fit_LogisticRegressionCV(
                drawn, "preference", is_ytrue_proba=True, n_splits=0, C=strength
            )
            rates.append(again.predict_proba(test)[0, 1])
    effect = dict(zip(test.columns, model.coef_[0], strict=True))["np.tanh(std_delta_len)"]
    return {
        "win_rate": float(model.predict_proba(test)[0, 1]),
        "standard_error": float(np.std(rates, ddof=1)),
        "length_effect": float(-effect),
    }
