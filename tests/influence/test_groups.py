"""What a scoring group tells the ledger, and when: its loop in this process, against a ledger that is written down."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from montessori_ray.config import Score as ScoreSettings
from montessori_ray.influence import groups
from montessori_ray.influence.driver import SpoiltRowsError, require_unspoilt
from montessori_ray.influence.estimators import NotRestoredError
from montessori_ray.influence.groups import Group, _Rows, score_loop
from montessori_ray.influence.ledger import Lease
from montessori_ray.influence.ledger_actor import LedgerState
from montessori_ray.influence.score import Score

LEASES = (
    Lease(0, ({"example_id": "a"}, {"example_id": "b"})),
    Lease(1, ({"example_id": "c"},), alone=True),
    Lease(2, ({"example_id": "d"},), alone=True),
)


class WrittenDown:
    """Answers as a `LedgerActor` handle, at once, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self._leases = iter(LEASES)
        self.release = SimpleNamespace(remote=lambda group: self.calls.append(f"release {group}"))
        self.lease = SimpleNamespace(remote=self._lease)
        self.commit = SimpleNamespace(remote=self._commit)
        self.spoil = SimpleNamespace(remote=lambda sentence: self.calls.append(f"spoilt {sentence}"))

    def _lease(self, group: str, baselines: dict[str, float]) -> Lease | None:
        self.calls.append("lease")
        return next(self._leases, None)

    def _commit(self, lease_id: int, rows: list[dict[str, Any]]) -> None:
        self.calls.append((lease_id, "".join(row["example_id"] for row in rows)))


@pytest.mark.usefixtures("alone")
def test_the_next_lease_is_asked_for_early_but_not_beside_a_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = WrittenDown()

    def scorer(*args: Any, **kwargs: Any) -> Any:
        def score(example: dict[str, Any]) -> Score:
            ledger.calls.append(example["example_id"])
            return Score(example_id=example["example_id"])

        return SimpleNamespace(
            score_each=lambda examples: map(score, examples), baselines={}, verify=lambda: ledger.calls.append("verify")
        )

    run(monkeypatch, ledger, scorer)
    assert ledger.calls == [
        "release g", "lease", "a", "lease", "b", (0, "ab"), "c", (1, "c"), "lease", "d", (2, "d"), "lease", "verify",
    ]  # fmt: skip


@pytest.mark.usefixtures("alone")
def test_rows_found_to_be_wrong_at_the_end_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than `verify_every` points came after the last check."""
    ledger = WrittenDown()

    def scorer(*args: Any, **kwargs: Any) -> Any:
        def verify() -> None:
            raise NotRestoredError("not restored")

        scores = (Score(example_id=row["example_id"]) for lease in LEASES for row in lease.examples)
        return SimpleNamespace(score_each=lambda examples: scores, baselines={}, verify=verify)

    with pytest.raises(NotRestoredError):
        run(monkeypatch, ledger, scorer)
    assert re.fullmatch(r"spoilt g@\S+: not restored", ledger.calls[-1])


def run(monkeypatch: pytest.MonkeyPatch, ledger: WrittenDown, scorer: Any) -> None:
    """A group's loop in this process."""
    monkeypatch.setattr(groups, "Scorer", scorer)
    monkeypatch.setattr(groups.ray, "get", lambda answer: answer)
    group = Group(
        name="g", ledger=ledger, student=Path(), reference=(), settings=ScoreSettings(), chat_template=None,
        max_length=1,
    )  # fmt: skip
    score_loop({"group": group})


def test_scoring_stops_at_the_first_word_of_wrong_rows() -> None:
    state = LedgerState(rows=[], backlog=0, open=0, baselines={}, late=set(), over_one=set(), spoilt=None)
    require_unspoilt(state)
    with pytest.raises(SpoiltRowsError, match=r"rows of g@host: not restored; .* score anew with score\.verify_every"):
        require_unspoilt(replace(state, spoilt="g@host: not restored"))


def test_only_the_leader_keeps_rows() -> None:
    group: Any = SimpleNamespace(ledger=WrittenDown())
    leader, other = (_Rows(group, leader) for leader in (True, False))
    for rows in (leader, other):
        rows.add(LEASES[0], {"example_id": "a"})
    assert (len(leader._rows), len(other._rows)) == (1, 0)
    other.send()
    assert group.ledger.calls == []
