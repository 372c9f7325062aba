"""A scoring group of one rank as a long-lived Ray actor: load a student once, score batches on request.

    scoring = start_scoring_actor(student, reference, Score(estimator="corrected"))
    rows = ray.get(scoring.score.remote([{"example_id": "a", "instruction": "Name a prime.", "response": "Seven."}]))

What a service or an online reward stands on; many examples known beforehand are scored faster, and survive deaths, with
`scoring.score_files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from montessori_ray.cluster import cluster_nodes, require_room
from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ConfigError, DataError, ResourceError, UserError
from montessori_ray.influence.estimators import NotRestoredError
from montessori_ray.influence.ledger import Row
from montessori_ray.influence.scorer import Scorer, join_alone
from montessori_ray.training.ray_train import worker_environment

CALL_RETRIES = 3
"""Times a call whose process died is repeated. Not without end: an example may be what kills the process."""

COLUMNS = ("example_id", "instruction", "response")


@ray.remote
class ScoringActor:
    """Holds one student; calls are answered one after the other. Start it with `start_scoring_actor`."""

    def __init__(
        self,
        student: Path,
        reference: Sequence[Row],
        settings: ScoreSettings,
        chat_template: str | None,
        max_length: int,
    ) -> None:
        torch.set_num_threads(settings.worker.threads)
        join_alone()
        worker = f"scoring-actor@{ray.util.get_node_ip_address()}"
        self._scorer: Scorer | UserError
        try:
            self._scorer = Scorer(
                student, reference, settings, chat_template=chat_template, max_length=max_length, worker=worker
            )
        except UserError as error:
            # Kept for the callers, who would otherwise be told that the actor died, and why deep in a traceback.
            self._scorer = error

    def baselines(self) -> dict[str, float]:
        """`Scorer.baselines`; raises what kept the student from loading."""
        return self._loaded().baselines

    def score(self, batch: Sequence[Mapping[str, Any]]) -> list[Row]:
        """One `Score.row()` for each row of the batch, in its order; a bad example is a row with its `quarantine`.

        Args:
            batch: rows with `example_id`, `instruction` and `response`; with a true `recheck`, scored a second time.

        Raises:
            DataError: a row lacks one of these or it is no text; nothing of the batch is scored.
            ResourceError: the student was not in its warmed state after this batch or an earlier one.
        """
        require_rows(batch)
        scorer = self._loaded()
        try:
            rows = [score.row() for score in scorer.score_each(batch)]
            scorer.verify()
        except NotRestoredError as error:
            self._scorer = ResourceError(f"{error}: no row of this batch holds; start another scoring actor")
            raise self._scorer from error
        return rows

    def _loaded(self) -> Scorer:
        if isinstance(self._scorer, UserError):
            raise self._scorer
        return self._scorer


def require_rows(batch: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a batch with a row that cannot be scored.

    Raises:
        DataError: names the row and the column.
    """
    for number, row in enumerate(batch):
        for column in COLUMNS:
            value = row.get(column) if isinstance(row, Mapping) else row
            if not isinstance(value, str):
                raise DataError(
                    f"row {number} of the batch has {column}={value!r}: give every row the texts {', '.join(COLUMNS)}"
                )


def start_scoring_actor(
    student: str | Path,
    reference: Sequence[Row],
    settings: ScoreSettings,
    *,
    chat_template: str | None = None,
    max_length: int = 1024,
) -> Any:
    """Start a `ScoringActor` with the resources of `settings.worker` and wait until it has loaded the student.

    It lives as long as a handle of it does. If its process dies, Ray starts it again, and a call it was at is repeated,
    `CALL_RETRIES` times; then the call raises Ray's `RayActorError`, and the actor answers the next one.

    Args:
        student: directory of the student, at the same path on every node.
        reference: rows with `instruction` and `response`.
        settings: the config's `score` section; what concerns groups and leases is not used.
        chat_template: the config's `student.chat_template`.
        max_length: tokens of an example; longer ones are cut at the end.

    Raises:
        UserError: the student cannot be loaded, a reference row has no response, the settings ask for several ranks, or
            no node has `settings.worker`.
    """
    if settings.group_size > 1:
        raise ConfigError(
            f"group_size is {settings.group_size}, a scoring actor is one process: use group_size=1, or score files "
            "with `montessori score`, whose groups may have several ranks"
        )
    worker = settings.worker
    if not ray.is_initialized():
        ray.init()
    require_room("a scoring actor", [worker.bundle], cluster_nodes())
    actor = ScoringActor.options(  # type: ignore[attr-defined]
        num_cpus=worker.cpus,
        num_gpus=worker.gpus,
        max_restarts=-1,
        max_task_retries=CALL_RETRIES,
        runtime_env={"env_vars": worker_environment(worker)},
    ).remote(Path(student).absolute(), list(reference), settings, chat_template, max_length)
    try:
        ray.get(actor.baselines.remote())
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        cause = str(error).strip().splitlines()[-1]
        raise ResourceError(f"the scoring actor ended while it loaded the student {student}: {cause}") from None
    return actor
