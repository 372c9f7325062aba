"""A warmed student that scores examples on request: load once, score for as long as the process lives.

    join_alone()  # or any torch.distributed group
    scorer = Scorer(student, reference, settings, chat_template=None, max_length=1024, worker="me")
    scorer.score({"example_id": "a", "instruction": "Name a prime.", "response": "Seven."}).influence

No Ray here: scoring groups (`groups.score_loop`) put a `Scorer` on their ranks, a service may keep one in an actor.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ModelError
from montessori_ray.influence.estimators import Corrected, Estimator, Exact, Example, FirstOrder, Student
from montessori_ray.influence.fingerprint import generator_states, set_generator_states
from montessori_ray.influence.local_student import LocalStudent
from montessori_ray.influence.reference import Precision, ReferenceSet, require_responses
from montessori_ray.influence.score import Score
from montessori_ray.influence.update import OPTIMIZER_JSON, AdamW
from montessori_ray.influence.zero_student import ZeroStudent
from montessori_ray.models import OPTIMIZER_TENSORS
from montessori_ray.training.chat import ChatFormat, Encoded

SAMPLE_SEED = 0
"""Draws the reference rows of `score.reference_rows` and `score.correction_rows`."""


class Scorer:
    """Scores rows of `instruction` and `response` against one warmed student; all ranks of a group call it alike.

    It leaves the random generators and the matmul precision of its process as it finds them.
    """

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
        rows = [self._encode(row) for row in reference]
        require_responses(reference, rows)
        self._reference = _drawn(rows, settings.reference_rows)
        self._precision: Precision = settings.meaning("precision")
        self._recheck: Estimator | None = None
        with _process_kept():
            self._student = open_student(student, settings)
            self._set_precision(self._precision)
            self._estimator = self._open_estimator(settings.estimator)
            self._generators = generator_states()

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return self._chat.tokenizer

    @property
    def baselines(self) -> dict[str, Any]:
        """Reference loss of the warmed student and of the student after a null step; where its snapshot lies."""
        return {
            "warmed_loss": self._estimator.warmed_loss,
            "null_step_loss": self._estimator.null_step_loss,
            "snapshot": self._student.snapshot,
        }

    def score(self, example: Mapping[str, Any]) -> Score:
        """Score one row (example_id, instruction, response; with a true `recheck`, a second time, exact in float32)."""
        return self._score(example, self._prepared(example))

    def score_each(self, examples: Iterable[Mapping[str, Any]]) -> Iterator[Score]:
        """Scores of rows, one after the other; a row is tokenized while the one before it is scored."""
        with ThreadPoolExecutor(1) as tokenizing:
            ahead: tuple[Mapping[str, Any], Future[Encoded | str]] | None = None
            for example in examples:
                present, ahead = ahead, (example, tokenizing.submit(self._prepared, example))
                if present is not None:
                    yield self._score(present[0], present[1].result())
            if ahead is not None:
                yield self._score(ahead[0], ahead[1].result())

    def _prepared(self, example: Mapping[str, Any]) -> Encoded | str:
        """A row's tokens, or why it is quarantined."""
        if not example["response"].strip():
            return "empty response"
        try:
            return self._encode(example)
        except ModelError as error:  # of this example: the template has rendered all reference rows
            return str(error)

    def verify(self) -> None:
        """Check that the student is in its warmed state now, between the checks every `score.verify_every` points.

        Raises:
            NotRestoredError: it is not.
        """
        with _process_kept():
            set_generator_states(self._generators)  # the fingerprint of the warmed state has them
            self._estimator.verify()

    def _score(self, example: Mapping[str, Any], prepared: Encoded | str) -> Score:
        if isinstance(prepared, str):
            return self._quarantined(example, prepared)
        encoded = Example(example["example_id"], prepared)
        with _process_kept():
            set_generator_states(self._generators)  # the fingerprint of the warmed state has them
            self._set_precision(self._precision)
            score = self._estimator.score(encoded)
            if not example.get("recheck") or score.quarantine is not None:
                return score
            again = self._score_again(encoded)
        return replace(score, recheck_influence=again.influence, recheck_influence_se=again.influence_se)

    def _encode(self, row: Mapping[str, Any]) -> Encoded:
        """Without white space around the texts, as the stages hand them over: templates drop it, or join it with their
        own."""
        return self._chat.encode(row["instruction"].strip(), row["response"].strip())

    def _quarantined(self, example: Mapping[str, Any], reason: str) -> Score:
        return Score(
            example_id=example["example_id"], estimator=self._settings.estimator, worker=self._worker, quarantine=reason
        )

    def _score_again(self, example: Example) -> Score:
        """`exact` in float32, whatever the settings say; launched, so that it checks what was replayed as well."""
        self._set_precision("float32", recorded=False)
        if self._recheck is None:
            same = self._estimator.name == "exact" and self._precision == "float32"
            self._recheck = self._estimator if same else self._open_estimator("exact")
        return self._recheck.score(example)

    def _open_estimator(self, name: str) -> Estimator:
        settings = self._settings
        kwargs: dict[str, Any] = {
            "baseline": settings.baseline, "verify_every": settings.verify_every, "worker": self._worker,
        }  # fmt: skip
        reference = self._reference_set(self._reference)
        if name == "corrected":
            sample = self._reference_set(_drawn(self._reference, settings.correction_rows))
            return Corrected(self._student, reference, sample, **kwargs)
        return {"exact": Exact, "first_order": FirstOrder}[name](self._student, reference, **kwargs)

    def _reference_set(self, rows: Sequence[Encoded]) -> ReferenceSet:
        settings = self._settings
        return ReferenceSet(
            rows, settings.reference_tokens, mean=settings.loss_mean,
            mean_batch=settings.loss_batch, device=device_of(settings), rank=dist.get_rank(),
            world=dist.get_world_size(),
        )  # fmt: skip

    def _set_precision(self, precision: Precision, *, recorded: bool = True) -> None:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        self._student.set_precision(precision, recorded=recorded)


@contextmanager
def _process_kept() -> Iterator[None]:
    """What torch keeps for the whole process, random generators and matmul precision, is as before afterwards."""
    generators, precision = generator_states(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        set_generator_states(generators)
        torch.set_float32_matmul_precision(precision)


def open_student(directory: Path, settings: ScoreSettings) -> Student:
    """The warmed student on the backend that the settings choose, on this rank's device."""
    state = state_of(directory, settings)
    kwargs: dict[str, Any] = {"rule": step_rule(state, settings), "moments": state}
    if settings.backend == "zero" or settings.group_size > 1:
        return ZeroStudent(directory, zero_stage=settings.zero_stage, offload=settings.offload, **kwargs)
    return LocalStudent(directory, device=device_of(settings), compiled=settings.compile, **kwargs)


def device_of(settings: ScoreSettings) -> torch.device:
    """This rank's."""
    return torch.device("cuda", torch.cuda.current_device()) if settings.worker.gpus else torch.device("cpu")


def _drawn(rows: Sequence[Encoded], count: int | None) -> list[Encoded]:
    """`count` of the rows, the same ones in every process, in their order; all if there are no more."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(random.Random(SAMPLE_SEED).sample(range(len(rows)), count))]


def state_of(student: Path, settings: ScoreSettings) -> Path:
    """The folder of a student's optimizer state, its own or the one that the settings name."""
    return settings.named_state or student


def step_rule(optimizer_state: Path, settings: ScoreSettings) -> AdamW:
    """The warm-up's optimizer settings, with `score.learning_rate` where that is given; fresh ones where the settings
    say `none`, or name no state and the student has none.

    Raises:
        ModelError: there is half of an optimizer state, or none where one is named, or no rate to take a step without
            one.
    """
    if settings.optimizer_state == "none":
        assert settings.learning_rate is not None  # the config sees to it
        return AdamW.fresh(settings.learning_rate)
    files = [optimizer_state / name for name in (OPTIMIZER_JSON, OPTIMIZER_TENSORS)]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return AdamW.load(optimizer_state, settings.learning_rate)
    if settings.optimizer_state is not None or len(missing) < len(files):
        raise ModelError(
            f"{optimizer_state} has no {' and no '.join(missing)}, so it is no optimizer state of a warmed student: "
            "name another folder (`--optimizer-state DIR`, score.optimizer_state=DIR), or take fresh moments "
            "(score.optimizer_state=none score.learning_rate=RATE)"
        )
    if settings.learning_rate is None:
        raise ModelError(
            f"{optimizer_state} has no {OPTIMIZER_JSON}, so the student was not warmed up: warm it up first "
            "(`--warm-up FILE`, data.warm_up), name an optimizer state (`--optimizer-state DIR`, "
            "score.optimizer_state=DIR), or set score.learning_rate to step with fresh moments"
        )
    return AdamW.fresh(settings.learning_rate)


def join_alone() -> None:
    """Make this process a scoring group of one rank."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed refuses to start without
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def leave() -> None:
    """Undo `join_alone`. DeepSpeed, where it was used, must let go of the group too, or it takes a later one for it."""
    owner: Any = deepspeed.comm if deepspeed.comm.is_initialized() else dist
    owner.destroy_process_group()
