"""A warmed student that scores examples on request: load once, score for as long as the process lives.

    join_alone()  # or any torch.distributed group
    scorer = Scorer(student, reference, settings, chat_template=None, max_length=1024, worker="me")
    scorer.score({"example_id": "a", "instruction": "Name a prime.", "response": "Seven."}).influence

No Ray here: scoring groups (`groups.score_loop`) put a `Scorer` on their ranks, a service may keep one in an actor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ModelError
from montessori_ray.influence.estimators import Estimator, Exact, Example
from montessori_ray.influence.score import Score
from montessori_ray.influence.update import OPTIMIZER_JSON, AdamW
from montessori_ray.influence.zero_student import ZeroStudent
from montessori_ray.training.chat import ChatFormat


class Scorer:
    """Scores rows of `instruction` and `response` against one warmed student; all ranks of a group call it alike."""

    def __init__(
        self,
        student: Path,
        reference: Sequence[Mapping[str, Any]],
        settings: ScoreSettings,
        *,
        chat_template: str | None,
        max_length: int,
        worker: str,
    ) -> None:
        """Load the student and measure its baselines.

        Args:
            student: directory of the warmed student; without `optimizer.json` its moments are fresh.
            reference: rows with `instruction` and `response`.
            settings: the config's `score` section.
            chat_template: the config's `student.chat_template`.
            max_length: tokens of an example; longer ones are cut at the end.
            worker: written into every score.

        Raises:
            ModelError: the directory is no warmed student.
            DataError: a reference row has no response token.
        """
        self._settings = settings
        self._worker = worker
        self._chat = ChatFormat.load(student, chat_template, max_length)
        backend = ZeroStudent(
            student,
            [self._chat.encode(row["instruction"], row["response"]) for row in reference],
            zero_stage=settings.zero_stage,
            reference_tokens=settings.reference_tokens,
            pad_token_id=self._chat.pad_token_id,
            rule=step_rule(student, settings),
        )
        self._estimator: Estimator = Exact(
            backend, baseline=settings.baseline, verify_every=settings.verify_every, worker=worker
        )

    @property
    def baselines(self) -> dict[str, float]:
        """Reference loss of the warmed student and of the student after a null step."""
        return {"warmed_loss": self._estimator.warmed_loss, "null_step_loss": self._estimator.null_step_loss}

    def score(self, example: Mapping[str, Any]) -> Score:
        """Score one row (example_id, instruction, response)."""
        if not example["response"].strip():
            return Score(
                example_id=example["example_id"],
                estimator=self._settings.estimator,
                worker=self._worker,
                quarantine="empty response",
            )
        encoded = self._chat.encode(example["instruction"], example["response"])
        return self._estimator.score(Example(example["example_id"], encoded))


def step_rule(student: Path, settings: ScoreSettings) -> AdamW:
    """The warm-up's optimizer settings, with `score.learning_rate` where that is given."""
    if (student / OPTIMIZER_JSON).exists():
        return AdamW.load(student, settings.learning_rate)
    if settings.learning_rate is None:
        raise ModelError(
            f"{student} has no {OPTIMIZER_JSON}: it was not warmed up; set score.learning_rate to score it with fresh "
            "moments"
        )
    return AdamW.fresh(settings.learning_rate)


def join_alone() -> None:
    """Make this process a scoring group of one rank."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed refuses to start without
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
