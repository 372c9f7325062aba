"""When another scoring group is worth starting: a table; and how long none need be heard of."""

from __future__ import annotations

import pytest

from montessori_ray.config import Score
from montessori_ray.influence.driver import LOAD_S, patience
from montessori_ray.influence.group_runs import groups_to_start


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
