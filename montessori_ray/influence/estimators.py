"""Estimators of influence (docs/scoring.md) over any student that can step, be measured and be restored.

Notation: L is the reference loss, g its gradient, d the change of the weights that one AdamW step on an example makes,
from the warmed weights. `exact` measures L(warmed + d) - L(baseline); `first_order` takes g.d for it, where g is the
gradient at the baseline, so the step's own curvature is left out; `corrected` measures a few reference rows k and takes
only the difference to the whole set from gradients: the change of L_k plus (g - g_k).d.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from montessori_ray.errors import ModelError
from montessori_ray.influence.reference import Precision, ReferenceSet, influence_and_se
from montessori_ray.influence.score import Score
from montessori_ray.training.chat import Encoded

Baseline = Literal["null_step", "warmed"]

REFERENCE_GRADIENT = "the gradient of the reference loss is not finite"
"""What a backend says where it is so."""


class NotFiniteError(ArithmeticError):
    """A loss or gradient of an example is not finite; the student has to be restored before it is used again."""


class Student(Protocol):
    """A warmed student on some backend. In a group of several ranks every method is called by all ranks alike."""

    @property
    def snapshot(self) -> str:
        """Where the copy of the warmed state lies that `restore` reads: a device, or `pinned host memory`."""
        ...

    def set_precision(self, precision: Precision, *, recorded: bool = True) -> None:
        """How forward and backward passes compute from now on; weights and moments are float32 always.

        Args:
            precision: of the passes.
            recorded: they may be replayed from CUDA graphs, where the backend has some.
        """
        ...

    def step(self, example: Encoded) -> float:
        """Take one AdamW step on the mean loss of the example's response tokens and return that loss.

        The new weights are in place when something is asked of them.

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

    def reference_losses(self, reference: ReferenceSet) -> Tensor:
        """Mean response loss of every reference row, in their order: float64 on the CPU, equal on all ranks."""
        ...

    def reference_gradient(self, reference: ReferenceSet) -> list[Tensor]:
        """Gradient of the reference loss at the present weights, sharded as the weights' masters; then restores."""
        ...

    def change_along(self, gradient: list[Tensor]) -> float:
        """Inner product of a gradient with what the step since the warmed state changed, equal on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    """A probing example as an estimator takes it."""

    example_id: str
    encoded: Encoded


class Measured(NamedTuple):
    """What a step did: influence, and its standard error over reference rows where the estimator knows it."""

    influence: float
    influence_se: float | None


class NotRestoredError(RuntimeError):
    """The warmed state was not restored: scores since it was last seen are wrong."""


class Estimator:
    """Steps on an example, measures what that did, and goes back; subclasses say how it is measured."""

    name: ClassVar[str]

    def __init__(
        self, student: Student, reference: ReferenceSet, *, baseline: Baseline, verify_every: int, worker: str
    ) -> None:
        """Measure both baselines and remember the fingerprint of the warmed state.

        Args:
            student: in its warmed state.
            reference: rows whose loss the influence is a change of.
            baseline: state whose reference loss an example's is compared with.
            verify_every: examples between checks that `restore` brought the warmed state back.
            worker: written into every score.

        Raises:
            ModelError: the loss of the baseline is not finite.
        """
        self._student = student
        self._reference = reference
        self._verify_every = verify_every
        self._worker = worker
        self._scored = 0
        self._warmed_digest = student.digest()
        warmed = student.reference_losses(reference)
        try:
            student.null_step()
            null_step = student.reference_losses(reference)
        finally:
            student.restore()
        self.verify()
        self._before = null_step if baseline == "null_step" else warmed
        self.warmed_loss = reference.mean(warmed)
        self.null_step_loss = reference.mean(null_step)
        self._loss_before = self.null_step_loss if baseline == "null_step" else self.warmed_loss
        if not math.isfinite(self._loss_before):
            raise ModelError(
                f"the warmed student's reference loss is {self.warmed_loss}, and {self.null_step_loss} after a step "
                "without a gradient, so nothing can be scored with it: its warm-up diverged, or the step is too large; "
                "lower warm_up.optimizer.learning_rate (or score.learning_rate, where it is set) and warm it up again"
            )
        self._prepare(baseline)

    def score(self, example: Example) -> Score:
        """Score one example; the student is in its warmed state before and after."""
        if not example.encoded.response_tokens:
            return self._quarantined(example, "no response token within student.max_length")
        start = time.perf_counter()
        try:
            loss = self._student.step(example.encoded)
            stepped = time.perf_counter()
            measured = self._measure()
            evaluated = time.perf_counter()
        except NotFiniteError as error:
            return self._quarantined(example, str(error))
        finally:
            restoring = time.perf_counter()
            self._restore()
        return Score(
            example_id=example.example_id,
            loss_before=self._loss_before,
            loss_after=self._loss_before + measured.influence,
            influence=measured.influence,
            influence_se=measured.influence_se,
            estimator=self.name,
            example_loss=loss,
            step_seconds=stepped - start,
            evaluate_seconds=evaluated - stepped,
            restore_seconds=time.perf_counter() - restoring,
            worker=self._worker,
        )

    def _prepare(self, baseline: Baseline) -> None:
        """What is measured once; the student is in its warmed state before and after."""

    def _measure(self) -> Measured:
        """What the step that the student has just taken did.

        Raises:
            NotFiniteError: a reference loss is not finite.
        """
        raise NotImplementedError

    def _quarantined(self, example: Example, reason: str) -> Score:
        return Score(example_id=example.example_id, estimator=self.name, worker=self._worker, quarantine=reason)

    def _restore(self) -> None:
        self._student.restore()
        self._scored += 1
        if self._scored % self._verify_every == 0:
            self.verify()

    def verify(self) -> None:
        """Check that the student is in its warmed state, bit for bit.

        Raises:
            NotRestoredError: it is not.
        """
        digest = self._student.digest()
        if digest != self._warmed_digest:
            raise NotRestoredError(
                f"the warmed student was not restored exactly: state {digest} instead of {self._warmed_digest} after "
                f"{self._scored} points; scores of this group since the last check are wrong"
            )


class Exact(Estimator):
    """The whole reference loss after the step: the paper's definition (section 3.2)."""

    name = "exact"

    def _measure(self) -> Measured:
        after = self._student.reference_losses(self._reference)
        return Measured(*influence_and_se(self._before, _finite(after), self._reference.weights))


class FirstOrder(Estimator):
    """The inner product of the step's change with the reference loss's gradient: no pass over the reference set."""

    name = "first_order"

    def _prepare(self, baseline: Baseline) -> None:
        self._gradient = self._reference_gradient(baseline)
        self._origin = 0.0
        if baseline == "null_step":
            self._student.null_step()
            self._origin = self._student.change_along(self._gradient)
            self._student.restore()

    def _measure(self) -> Measured:
        influence = self._student.change_along(self._gradient) - self._origin
        if influence != influence or abs(influence) == float("inf"):
            raise NotFiniteError("reference loss not finite after the step")
        return Measured(influence, None)

    def _reference_gradient(self, baseline: Baseline) -> list[Tensor]:
        return self._gradient_of(self._reference, baseline)

    def _gradient_of(self, reference: ReferenceSet, baseline: Baseline) -> list[Tensor]:
        """Gradient at the baseline: the middle of all steps is nearer to the null step than to the warmed state."""
        if baseline == "null_step":
            self._student.null_step()
        try:
            return self._student.reference_gradient(reference)
        except NotFiniteError as error:
            raise ModelError(f"nothing can be scored by {self.name}: {error}; take score.estimator=exact") from None


class Corrected(FirstOrder):
    """A few reference rows measured, with the gradients' inner product as control variate for all the others."""

    name = "corrected"

    def __init__(self, student: Student, reference: ReferenceSet, sample: ReferenceSet, *, baseline: Baseline,
                 verify_every: int, worker: str) -> None:  # fmt: skip
        """As `Estimator`; `sample` holds the reference rows that are measured for every example."""
        self._sample = sample
        super().__init__(student, reference, baseline=baseline, verify_every=verify_every, worker=worker)

    def _prepare(self, baseline: Baseline) -> None:
        super()._prepare(baseline)
        if baseline == "null_step":
            self._student.null_step()
        self._sample_before = self._student.reference_losses(self._sample)
        self._student.restore()

    def _reference_gradient(self, baseline: Baseline) -> list[Tensor]:
        """The difference of both gradients, all that is needed of them."""
        whole = self._gradient_of(self._reference, baseline)
        for part, sampled in zip(whole, self._gradient_of(self._sample, baseline), strict=True):
            part.sub_(sampled)
        return whole

    def _measure(self) -> Measured:
        after = _finite(self._student.reference_losses(self._sample))
        change, _ = influence_and_se(self._sample_before, after, self._sample.weights)
        return Measured(change + super()._measure().influence, None)


def _finite(losses: Tensor) -> Tensor:
    if not losses.isfinite().all():
        raise NotFiniteError("reference loss not finite after the step")
    return losses
