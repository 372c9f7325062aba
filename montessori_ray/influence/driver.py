"""The driver's side of scoring: start the groups, feed the ledger, take rows out of it, end when all are in.

Only a few leases' worth of examples and the rows of the last half second are in memory here or in the ledger, however
many examples there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ResourceError, UserError
from montessori_ray.influence.groups import Group, score_loop
from montessori_ray.influence.ledger import Row
from montessori_ray.influence.ledger_actor import LedgerActor, LedgerState, release_leases
from montessori_ray.telemetry.progress import ProgressChannel
from montessori_ray.training.ray_train import start_training, stop_training, training_result

LOOK_S = 0.5
"""Seconds between looks at the ledger."""

LEASES_AHEAD = 4
"""Leases a group that wait in the ledger after a look: a group scores no more than these until the next one."""

GOODBYE_S = 60.0
"""Seconds groups get to end by themselves when all rows are in; a busy machine takes ten to stop their processes."""


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
) -> dict[str, Any]:
    """Score examples against a warmed student on `settings.groups` scoring groups.

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

    Returns:
        warmed_loss and null_step_loss (of the first group that was up), points and quarantined (rows of this call),
        seconds, groups.

    Raises:
        ResourceError: every group failed for good, or none made progress for `settings.lease_timeout_s`.
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
    groups = _start_groups(group, name, storage)
    try:
        pump = Pump(ledger, groups, settings, on_rows, progress, total, done)
        pump.run(examples)
        ray.wait(list(groups.values()), num_returns=len(groups), timeout=GOODBYE_S)
    except KeyboardInterrupt:
        raise  # the driver ends, and Ray ends with it all that it started; see `stop_training` on cancelling
    except BaseException:
        _stop(groups, ledger)
        raise
    _stop(groups, ledger)
    return pump.summary()


def _stop(groups: dict[str, ray.ObjectRef[dict[str, Any]]], ledger: Any) -> None:
    """Give back what scoring holds of the cluster."""
    for training in groups.values():
        stop_training(training)
    ray.kill(ledger)


def _start_groups(first: Group, name: str, storage: str) -> dict[str, ray.ObjectRef[dict[str, Any]]]:
    """Start `settings.groups` Ray Train runs, each like `first`; by group name."""
    settings = first.settings
    groups = [replace(first, name=f"group-{index}") for index in range(settings.groups)]
    return {
        group.name: start_training(
            score_loop,
            {"group": group},
            name=f"{name}-{group.name}",
            storage=storage,
            workers=settings.group_size,
            worker=settings.worker,
            max_failures=settings.max_group_failures,
            # At once: a group that waits for a lost node's replacement must not keep its leases from the others.
            on_failure=partial(release_leases, group.ledger, group.name),
        )
        for group in groups
    }


class Pump:
    """Moves examples into the ledger and rows out of it until all are in."""

    def __init__(
        self,
        ledger: Any,
        groups: dict[str, ray.ObjectRef[dict[str, Any]]],
        settings: ScoreSettings,
        on_rows: Callable[[list[Row]], None],
        progress: ProgressChannel,
        total: int,
        done: int,
    ) -> None:
        self._ledger = ledger
        self._running = dict(groups)
        self._settings = settings
        self._on_rows = on_rows
        self._progress = progress
        self._total = total
        self._done = done
        self._points = self._quarantined = self._helpful = 0
        self._baselines: dict[str, float] = {}
        self._failures: list[UserError] = []
        self._start = self._last_news = time.monotonic()

    def run(self, examples: Iterable[list[Row]]) -> None:
        """Until every example has a row and the baselines are known."""
        chunks = iter(examples)
        feeding = True
        while True:
            state: LedgerState = ray.get(self._ledger.look.remote())
            self._take(state)
            if not feeding and not state.open and self._baselines:
                return
            feeding = feeding and self._feed(chunks, state.backlog)
            self._watch(state)

    def summary(self) -> dict[str, Any]:
        return {
            **self._baselines,
            "points": self._points,
            "quarantined": self._quarantined,
            "seconds": time.monotonic() - self._start,
            "groups": self._settings.groups,
        }

    def _take(self, state: LedgerState) -> None:
        """Commit the rows that came in and report progress."""
        if state.rows or (state.baselines and not self._baselines):
            self._last_news = time.monotonic()
        self._baselines = self._baselines or next(iter(state.baselines.values()), {})
        if state.rows:
            self._on_rows(state.rows)
        self._points += len(state.rows)
        self._quarantined += sum(row["quarantine"] is not None for row in state.rows)
        self._helpful += sum(row["quarantine"] is None and row["influence"] < 0 for row in state.rows)
        scored = self._points - self._quarantined
        metrics = {"helpful": self._helpful / scored} if state.rows and scored else {}
        note = f"{len(state.baselines)} of {self._settings.groups} groups"
        self._progress.update(self._done + self._points, self._total, unit="points", note=note, **metrics)

    def _feed(self, chunks: Iterator[list[Row]], backlog: int) -> bool:
        """Keep a look's worth of leases waiting; False when there are no more examples."""
        while backlog < LEASES_AHEAD * self._settings.groups * self._settings.lease_size:
            chunk = next(chunks, None)
            if chunk is None:
                ray.get(self._ledger.complete.remote())
                return False
            ray.get(self._ledger.extend.remote(chunk))
            backlog += len(chunk)
        return True

    def _watch(self, state: LedgerState) -> None:
        """Wait until the next look; hand on the leases of groups that failed for good."""
        ended, _ = ray.wait(list(self._running.values()), timeout=LOOK_S) if self._running else ([], [])
        for name in [name for name, training in self._running.items() if training in ended]:
            try:
                training_result(self._running.pop(name))
            except UserError as error:
                self._failures.append(error)
                ray.get(self._ledger.release.remote(name))
        if len(self._failures) == self._settings.groups:
            raise ResourceError(f"all {self._settings.groups} scoring groups failed; the first: {self._failures[0]}")
        silent = time.monotonic() - self._last_news
        if state.open and state.baselines and silent > 2 * self._settings.lease_timeout_s:
            raise ResourceError(
                f"no scoring group returned a row for {silent:.0f} s (twice score.lease_timeout_s): a worker hangs, "
                "see its logs; the same command continues with the rows that are committed"
            )
