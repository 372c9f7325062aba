"""Estimators of influence (DESIGN section 6) over any student that can step, be measured and be restored."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from montessori_ray.influence.reference import influence_and_se
from montessori_ray.influence.score import Score
from montessori_ray.training.chat import Encoded

Baseline = Literal["null_step", "warmed"]


class NotFiniteError(ArithmeticError):
    """A loss or gradient of an example is not finite; the student has to be restored before it is used again."""


class Student(Protocol):
    """A warmed student on some backend. In a group of several ranks every method is called by all ranks alike."""

    def step(self, example: Encoded) -> float:
        """Take one AdamW step on the mean loss of the example's response tokens and return that loss.

        Returns when the new weights are in place (a device has finished).

        Raises:
            NotFiniteError: the loss or its gradient is not finite.
        """
        ...

    def null_step(self) -> None:
        """Take one AdamW step with a zero gradient."""
        ...

    def restore(self) -> None:
        """Go back to the warmed state, bit for bit."""
        ...

    def digest(self) -> str:
        """A fingerprint of the complete state: any changed bit changes it."""
        ...

    def reference_losses(self) -> Tensor:
        """Mean response loss of every reference row, in their order: float64 on the CPU, equal on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """A probing example as an estimator takes it."""

    example_id: str
    encoded: Encoded


class Estimator(Protocol):
    """Anything that gives an example a score."""

    @property
    def warmed_loss(self) -> float:
        """Reference loss of the warmed student."""
        ...

    @property
    def null_step_loss(self) -> float:
        """Reference loss after a step with a zero gradient."""
        ...

    def score(self, example: Example) -> Score:
        """Score one example; the student is in its warmed state before and after."""
        ...


class Exact:
    """One AdamW step, then the whole reference loss: the paper's definition (section 3.2)."""

    name = "exact"

    def __init__(self, student: Student, *, baseline: Baseline, verify_every: int, worker: str) -> None:
        """Measure both baselines and remember the fingerprint of the warmed state.

        Args:
            student: in its warmed state.
            baseline: state whose reference loss an example's is compared with.
            verify_every: examples between checks that `restore` brought the warmed state back.
            worker: written into every score.
        """
        self._student = student
        self._verify_every = verify_every
        self._worker = worker
        self._scored = 0
        self._warmed_digest = student.digest()
        warmed = student.reference_losses()
        student.null_step()
        null_step = student.reference_losses()
        student.restore()
        self._verify()
        self._before = null_step if baseline == "null_step" else warmed
        self.warmed_loss = float(warmed.mean())
        self.null_step_loss = float(null_step.mean())

    def score(self, example: Example) -> Score:
        if not example.encoded.response_tokens:
            return self._quarantined(example, "no response token within student.max_length")
        start = time.perf_counter()
        try:
            self._student.step(example.encoded)
        except NotFiniteError as error:
            self._restore()
            return self._quarantined(example, str(error))
        stepped = time.perf_counter()
        after = self._student.reference_losses()
        evaluated = time.perf_counter()
        self._restore()
        restored = time.perf_counter()
        if not after.isfinite().all():
            return self._quarantined(example, "reference loss not finite after the step")
        influence, influence_se = influence_and_se(self._before, after)
        return Score(
            example_id=example.example_id,
            loss_before=float(self._before.mean()),
            loss_after=float(after.mean()),
            influence=influence,
            influence_se=influence_se,
            estimator=self.name,
            step_seconds=stepped - start,
            evaluate_seconds=evaluated - stepped,
            restore_seconds=restored - evaluated,
            worker=self._worker,
        )

    def _quarantined(self, example: Example, reason: str) -> Score:
        return Score(example_id=example.example_id, estimator=self.name, worker=self._worker, quarantine=reason)

    def _restore(self) -> None:
        self._student.restore()
        self._scored += 1
        if self._scored % self._verify_every == 0:
            self._verify()

    def _verify(self) -> None:
        digest = self._student.digest()
        if digest != self._warmed_digest:
            raise RuntimeError(
                f"the warmed student was not restored exactly: state {digest} instead of {self._warmed_digest} after "
                f"{self._scored} points; scores of this group since the last check are wrong"
            )
