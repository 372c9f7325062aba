"""The stages around the pairs, on artifacts in memory: what they say where no pair can come of the scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from montessori_ray.config import Pair, Score
from montessori_ray.errors import DataError
from montessori_ray.stages import score as score_stage
from montessori_ray.stages.pair import pair
from montessori_ray.stages.score import score_probing_set, summarise

JUDGE: dict[str, Any] = {"signal": "llm_judge", "judge": {"model": "pool"}}


def scores(*quarantines: str | None) -> list[dict[str, Any]]:
    return [
        {
            "example_id": f"e{number}",
            "prompt_id": "p",
            "influence": None if reason else -0.1,
            "influence_se": None,
            "recheck_influence": None,
            "example_loss": None,
            "quarantine": reason,
        }
        for number, reason in enumerate(quarantines)
    ]


def artifact(rows: list[dict[str, Any]], details: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(rows=lambda _: iter(rows), require=lambda: SimpleNamespace(details=details), url="here")


@pytest.mark.parametrize(
    ("settings", "quarantines", "said"),
    [
        ({}, ("odd", "empty", "odd"), r"no scored example, 3 are quarantined \(2 x odd; 1 x empty\): mend what"),
        (JUDGE, ("odd",), r"no scored example, 1 are quarantined \(1 x odd\)"),
        ({}, (), r"no scored example, 0 are quarantined \(none\): .* raise split\.probing"),
        (JUDGE, (None, None, "odd"), r"pool gave none of the 2 scored examples a grade.*replies in here"),
    ],
)
def test_without_anything_to_compare_the_cause_is_named(
    settings: dict[str, Any], quarantines: tuple[str | None, ...], said: str
) -> None:
    rows = scores(*quarantines)
    samples = [{**row, "prompt": "", "raw_output": row["example_id"]} for row in rows]
    grades = [{"example_id": row["example_id"], "grade": None} for row in rows]
    inputs = [artifact(rows, summarise(rows)), artifact(samples), *([artifact(grades)] if settings else [])]
    context: Any = SimpleNamespace(
        config=SimpleNamespace(pair=Pair(**settings), seed=0),
        input=lambda position: inputs[position],
        stage=SimpleNamespace(inputs=inputs),
    )
    with pytest.raises(DataError, match=said):
        pair(context)


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({}, 1),
        ({"signal": "shuffled_labels"}, 1),
        ({"signal": "random"}, 0),
        ({"signal": "training_loss"}, 0),
        (JUDGE, 0),
        ({"threshold": "siblings"}, 0),
    ],
)
def test_one_sign_is_told_where_pairs_need_both(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], noted: int
) -> None:
    monkeypatch.setattr(score_stage, "score", lambda _: summarise(scores(None, None)))
    notes: list[str] = []
    config = SimpleNamespace(pair=Pair(**settings), score=Score())
    context: Any = SimpleNamespace(config=config, note=notes.append)
    score_probing_set(context)
    assert len(notes) == noted
