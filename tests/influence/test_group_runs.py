"""When another scoring group is worth starting: a table; and how long none need be heard of."""

from __future__ import annotations

from typing import Any

import pytest

from montessori_ray.config import Score
from montessori_ray.errors import ResourceError
from montessori_ray.influence.driver import LOAD_S, patience
from montessori_ray.influence.group_runs import GroupRuns, groups_to_start
from montessori_ray.training.ray_train import TrainingFailed


@pytest.mark.parametrize(
    ("places", "running", "placed", "room", "leases", "start"),
    [
        (2, 2, 2, 5, 9, 0),  # as many as there may be
        (8, 2, 2, 0, 9, 0),  # no room
        (8, 2, 2, 3, 9, 3),  # a node joined
        (4, 2, 2, 3, 9, 2),
        (8, 2, 2, 3, 1, 1),  # near the end no group is started for nothing
        (8, 2, 2, 3, 0, 0),
        (8, 4, 2, 3, 9, 1),  # two wait for their places, maybe for these
        (8, 4, 2, 1, 9, 0),
        (1, 2, 2, 3, 9, 0),  # places of groups that failed are not filled again
    ],
)
def test_groups_that_are_worth_starting(
    places: int, running: int, placed: int, room: int, leases: int, start: int
) -> None:
    found = groups_to_start(places=places, running=running, placed=placed, room=room, leases=leases)
    assert found == start


def test_a_short_lease_leaves_time_to_load_the_student() -> None:
    assert patience(Score(lease_timeout_s=1, max_group_failures=0)) > LOAD_S
    assert patience(Score(lease_timeout_s=10_000)) > 20_000


def test_a_group_that_single_examples_killed_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object, name: str) -> None:
        raise TrainingFailed(f"{name} failed")

    monkeypatch.setattr("ray.wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr("montessori_ray.influence.group_runs.training_result", fail)
    notes: list[str] = []
    start: Any = "run of {}".format
    runs = GroupRuns(start, Score(groups=2), notes.append)
    assert runs.watch(0, {"group-1"}) == ["group-0", "group-1"]
    assert (len(runs), runs.started) == (1, 3)
    assert notes == [
        "group-0 is retired, 1 go on: group-0 failed",
        "group-1, which died over single examples, is followed by group-2: group-1 failed",
    ]
    with pytest.raises(ResourceError, match="all 3 scoring groups failed; the first: group-0 failed"):
        runs.watch(0)
