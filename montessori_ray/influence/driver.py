"""The driver's side of scoring: start the groups, feed the ledger, take rows out of it, end when all are in.

Only a few leases' worth of examples and the rows of the last half second are in memory here or in the ledger, however
many examples there are. The ledger may die: what the driver has handed over it keeps until it has the row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ResourceError
from montessori_ray.influence.group_runs import GroupRuns, Training
from montessori_ray.influence.groups import Group, score_loop
from montessori_ray.influence.ledger import Outstanding, Row
from montessori_ray.influence.ledger_actor import LedgerActor, LedgerState, release_leases
from montessori_ray.telemetry.progress import ProgressChannel
from montessori_ray.training.ray_train import START_TIMEOUT_S, start_training

LOOK_S = 0.5
"""Seconds between looks at the ledger."""

LEASES_AHEAD = 4
"""Leases a group that wait in the ledger after a look, at least."""

MOST_AHEAD = 4096
"""Examples that wait, at most, where groups are faster than that: twice what came in since the last look."""

LOAD_S = 1800.0
"""Seconds a group may take to load a student and measure its baselines, of which nothing is heard meanwhile."""

LEDGER_S = 300.0
"""Seconds the ledger may take to answer, a new process for one that died included."""


class SpoiltRowsError(ResourceError):
    """A group has sent wrong rows, and which of those committed are wrong is not known: none can be kept."""


def score_examples(
    *,
    student: Path,
    examples: Iterable[list[Row]],
    reference: list[Row],
    on_rows: Callable[[list[Row]], None],
    settings: ScoreSettings,
    chat_template: str | None,
    max_length: int,
    name: str,
    storage: str,
    progress: ProgressChannel,
    total: int,
    done: int,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score examples against a warmed student on `settings.groups` scoring groups, up to `settings.max_groups`.

    Args:
        student: directory of the warmed student, on storage all nodes see.
        examples: chunks of rows (example_id, instruction, response) that have no score yet.
        reference: rows (instruction, response) of the reference set.
        on_rows: commits score rows (`Score.row()`); called in this process, each row once.
        settings: the config's `score` section.
        chat_template: the config's `student.chat_template`.
        max_length: the config's `student.max_length`.
        name: prefix of the groups' Ray Train runs.
        storage: folder or URL for these runs, which all nodes see.
        progress: told how many examples have a score.
        total: examples of the probing set.
        done: how many of them have a score already.
        note: told one sentence when a group joins later or is retired.

    Returns:
        warmed_loss and null_step_loss (of the first group that was up), points and quarantined (rows of this call),
        seconds, groups (how many were started).

    Raises:
        ResourceError: every group failed for good, or nothing happened for longer than all timeouts together.
        SpoiltRowsError: see there.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = LedgerActor
    ledger = actor.options(scheduling_strategy=here).remote(settings.lease_size, settings.lease_timeout_s)
    group = Group(
        name="group-0",
        ledger=ledger,
        student=student,
        reference=tuple(reference),
        settings=settings,
        chat_template=chat_template,
        max_length=max_length,
    )
    groups = GroupRuns(partial(_start_group, group, name, storage), settings, note)
    try:
        pump = Pump(ledger, groups, settings, on_rows, progress, total, done)
        up = pump.run(examples)
        groups.send_home(ledger, up)
        require_unspoilt(_ask(ledger.look.remote()))
    except KeyboardInterrupt:
        raise  # the driver ends, and Ray ends with it all that it started; see `stop_training` on cancelling
    except BaseException:
        _stop(groups, ledger)
        raise
    _stop(groups, ledger)
    return pump.summary()


def _stop(groups: GroupRuns, ledger: Any) -> None:
    """Give back what scoring holds of the cluster."""
    groups.stop()
    ray.kill(ledger)


def _start_group(like: Group, prefix: str, storage: str, name: str) -> Training:
    """Start the Ray Train run of the group `name`."""
    group = replace(like, name=name)
    return start_training(
        score_loop,
        {"group": group},
        name=f"{prefix}-{name}",
        storage=storage,
        workers=group.settings.group_size,
        worker=group.settings.worker,
        max_failures=group.settings.max_group_failures,
        # At once: a group that waits for a lost node's replacement must not keep its leases from the others.
        on_failure=partial(release_leases, group.ledger, name),
    )


class Pump:
    """Moves examples into the ledger and rows out of it until all are in."""

    def __init__(
        self,
        ledger: Any,
        groups: GroupRuns,
        settings: ScoreSettings,
        on_rows: Callable[[list[Row]], None],
        progress: ProgressChannel,
        total: int,
        done: int,
    ) -> None:
        self._ledger = ledger
        self._groups = groups
        self._settings = settings
        self._on_rows = on_rows
        self._progress = progress
        self._total = total
        self._done = done
        self._outstanding = Outstanding()
        self._points = self._quarantined = self._helpful = 0
        self._baselines: dict[str, float] = {}
        self._joined: set[str] = set()
        self._start = self._last_news = time.monotonic()

    def run(self, examples: Iterable[list[Row]]) -> set[str]:
        """Until every example has a row and the baselines are known; returns the groups at work then."""
        chunks = iter(examples)
        feeding = True
        while True:
            state, rows = self._look()
            if not feeding and not self._outstanding and self._baselines:
                return state.up
            if lost := self._outstanding.lost(state.open):
                _ask(self._ledger.extend.remote(lost))
            feeding = feeding and self._feed(chunks, state.backlog + len(lost), len(rows))
            self._watch(state)

    def summary(self) -> dict[str, Any]:
        return {
            **self._baselines,
            "points": self._points,
            "quarantined": self._quarantined,
            "seconds": time.monotonic() - self._start,
            "groups": self._groups.started,
        }

    def _look(self) -> tuple[LedgerState, list[Row]]:
        """Ask the ledger how things stand, commit the rows that came in, which are returned, and report progress.

        Raises:
            SpoiltRowsError: before any of these is committed.
        """
        state: LedgerState = _ask(self._ledger.look.remote())
        require_unspoilt(state)
        rows = self._outstanding.take(state.rows)
        if rows or state.baselines.keys() != self._joined:
            self._last_news = time.monotonic()
        self._joined = set(state.baselines)
        self._baselines = self._baselines or next(iter(state.baselines.values()), {})
        if rows:
            self._on_rows(rows)
        self._points += len(rows)
        self._quarantined += sum(row["quarantine"] is not None for row in rows)
        self._helpful += sum(row["quarantine"] is None and row["influence"] < 0 for row in rows)
        scored = self._points - self._quarantined
        metrics = {"helpful": self._helpful / scored} if rows and scored else {}
        up = len(state.up)
        note = f"{up} of {len(self._groups)} groups"
        self._progress.update(self._done + self._points, self._total, unit="points", note=note, groups=up, **metrics)
        return state, rows

    def _feed(self, chunks: Iterator[list[Row]], backlog: int, scored: int) -> bool:
        """Keep a look's worth of leases waiting; False when there are no more examples."""
        enough = max(LEASES_AHEAD * len(self._groups) * self._settings.lease_size, min(2 * scored, MOST_AHEAD))
        while backlog < enough:
            chunk = next(chunks, None)
            if chunk is None:
                return False
            self._outstanding.add(chunk)
            _ask(self._ledger.extend.remote(chunk))
            backlog += len(chunk)
        return True

    def _watch(self, state: LedgerState) -> None:
        """Wait until the next look; hand on the leases of groups that failed for good, start groups where there is
        room.

        Raises:
            ResourceError: nothing happened for longer than leases and the placing of groups may take.
        """
        try:
            retired = self._groups.watch(LOOK_S, state.over_one)
        except ResourceError:
            self._look()
            raise
        for name in retired:
            _ask(self._ledger.release.remote(name))
        self._groups.grow(state.baselines, state.backlog)
        silent = time.monotonic() - self._last_news
        if self._outstanding and silent > patience(self._settings):
            raise ResourceError(
                f"no scoring group joined, died or returned a row for {silent:.0f} s (more than it may take to be "
                "placed and to load the student, or twice score.lease_timeout_s): a worker hangs, see its logs; the "
                "same command continues with the rows that are committed"
            )


def require_unspoilt(state: LedgerState) -> None:
    """Refuse to go on with wrong rows.

    Raises:
        SpoiltRowsError: names the worker and what it said.
    """
    if state.spoilt is not None:
        raise SpoiltRowsError(
            f"rows of {state.spoilt}; it is a defect of this software or of the machine, and the scores of this stage "
            "are removed: score anew with score.verify_every=1, which stops before a wrong row, on other nodes or with "
            "another score.backend"
        )


def patience(settings: ScoreSettings) -> float:
    """Seconds without news after which scoring is given up: all that groups may do in silence, one after the other."""
    placing = (settings.max_group_failures + 1) * START_TIMEOUT_S
    return placing + max(2 * settings.lease_timeout_s, LOAD_S)


def _ask(answer: ray.ObjectRef[Any]) -> Any:
    """Wait for the ledger.

    Raises:
        ResourceError: it cannot be started again.
    """
    try:
        return ray.get(answer, timeout=LEDGER_S)
    except GetTimeoutError:
        raise ResourceError(
            f"the ledger of the scoring groups has not answered for {LEDGER_S:.0f} s: the driver's node has no memory "
            "or no processes left for it; the same command continues with the rows that are committed"
        ) from None
