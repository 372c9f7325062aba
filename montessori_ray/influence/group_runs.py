"""The Ray Train runs of a stage's scoring groups: started, joined by further ones, retired, sent home.

A group that dies is started again by Ray Train, up to `score.max_group_failures` times. What is decided here is what
happens after that, and when another group is worth starting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import ray

from montessori_ray.cluster import free_nodes, rooms
from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ResourceError, UserError
from montessori_ray.training.ray_train import NotPlaced, stop_training, training_result

GOODBYE_S = 60.0
"""Seconds groups get to end by themselves when all rows are in; a busy machine takes ten to stop their processes."""

ASK_AGAIN_S = 0.5
"""Seconds after which the ledger is told again that scoring is over: it may have died and forgotten."""

Training = ray.ObjectRef[dict[str, Any]]


def groups_to_start(*, places: int, running: int, placed: int, room: int, leases: int) -> int:
    """How many further groups are worth starting now.

    Args:
        places: groups there may be.
        running: groups that were started and have not ended.
        placed: those of them that are known to have their room. The others may still wait for a part of what is free.
        room: whole groups that fit into what is free.
        leases: leases that wait: a group without one would load a student for nothing.
    """
    return max(0, min(places - running, room - (running - placed), leases))


class GroupRuns:
    """The scoring groups of one stage that have been started."""

    def __init__(
        self, start: Callable[[str], Training], settings: ScoreSettings, note: Callable[[str], None] | None = None
    ) -> None:
        """Start the first `settings.groups` groups.

        Args:
            start: starts the run of the group of this name.
            settings: the config's `score` section.
            note: told one sentence when a group joins or is retired.
        """
        self._start = start
        self._settings = settings
        self._note = note or (lambda _: None)
        self._running: dict[str, Training] = {}
        self._places = settings.max_groups or settings.groups
        self._first_error: UserError | None = None
        self.started = 0
        """Groups started so far."""
        for _ in range(settings.groups):
            self._start_one()

    def __len__(self) -> int:
        """Groups that have not ended."""
        return len(self._running)

    def watch(self, seconds: float, over_one: Collection[str] = ()) -> list[str]:
        """Wait until a group ends, at most so long; retires groups that failed for good and returns their names.

        A group that died `over_one` example and no other is followed by another one: such examples are given up after
        some deaths, so that there are only so many of these groups.

        Raises:
            ResourceError: none is left; names the first cause.
        """
        ended, _ = ray.wait(list(self._running.values()), timeout=seconds)
        retired = []
        for name in [name for name, training in self._running.items() if training in ended]:
            try:
                training_result(self._running.pop(name), name)
            except UserError as error:
                retired.append(name)
                self._retire(name, error, follow=name in over_one)
        if not self._running and self._first_error is not None:
            raise ResourceError(f"all {self.started} scoring groups failed; the first: {self._first_error}")
        return retired

    def grow(self, joined: Collection[str], backlog: int) -> None:
        """Start further groups where there is room and work for them.

        Args:
            joined: groups that have asked for a lease and did not die since.
            backlog: examples that wait for a lease.
        """
        running, leases = len(self._running), backlog // self._settings.lease_size
        wanted = min(self._places - running, leases)
        if wanted <= 0:
            return
        placed = len(self._running.keys() & set(joined))
        bundles = [self._settings.worker.bundle] * self._settings.group_size
        room = rooms(bundles, free_nodes(), at_most=wanted + running - placed)
        for _ in range(groups_to_start(places=self._places, running=running, placed=placed, room=room, leases=leases)):
            self._note(f"{self._start_one()} joins: the cluster has room for it")

    def send_home(self, ledger: Any, up: Collection[str]) -> None:
        """Tell the groups that scoring is over and wait for those that are `up` to end; not for one that waits for a
        node that left, or hangs."""
        deadline = time.monotonic() + GOODBYE_S
        waiting = [training for name, training in self._running.items() if name in up]
        while waiting and time.monotonic() < deadline:
            ledger.close.remote()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=ASK_AGAIN_S)

    def stop(self) -> None:
        """Stop all that still run, and give back what they hold of the cluster."""
        stop_training(*self._running.values())

    def _start_one(self) -> str:
        name = f"group-{self.started}"
        self.started += 1
        self._running[name] = self._start(name)
        return name

    def _retire(self, name: str, error: UserError, *, follow: bool) -> None:
        """Remember the first cause. The place of a group that failed is not filled again, or a mistake in the settings
        would be tried for ever; that of one whose node left is, or that is to be followed."""
        if follow:
            self._note(f"{name}, which died over single examples, is followed by {self._start_one()}: {error}")
            return
        self._first_error = self._first_error or error
        self._places -= not isinstance(error, NotPlaced)
        self._note(f"{name} is retired, {len(self._running)} go on: {error}")
