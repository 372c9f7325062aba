"""Backend `zero`: the warmed student in a DeepSpeed engine, whole on every rank or sharded over a scoring group."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from montessori_ray.influence.estimators import REFERENCE_GRADIENT, NotFiniteError
from montessori_ray.influence.moments import open_moments
from montessori_ray.influence.reference import Precision, ReferenceSet, ResponseLoss, response_inputs
from montessori_ray.influence.update import AdamW
from montessori_ray.influence.zero_state import EngineState
from montessori_ray.training.chat import IGNORED, Encoded
from montessori_ray.training.engine import build_engine, load_model

ANY_TOKENS = Encoded([0, 0], [IGNORED, 0])
"""A passage to run where the loss does not matter."""


class ZeroStudent:
    """A warmed student that steps on one example, is measured on the reference set, and goes back.

    Every rank of the group is given the same example, so the mean of the ranks' gradients is the example's gradient at
    any group size; reference rows are split over the ranks. Dropout is off throughout: an influence belongs to the
    example, not to a mask.
    """

    def __init__(
        self,
        directory: Path,
        *,
        zero_stage: int,
        rule: AdamW,
        moments: Path | None = None,
        offload: bool = False,
    ) -> None:
        """Load the student; torch.distributed must be initialized with the ranks of the group.

        Args:
            directory: a Hugging Face model directory, with `optimizer.safetensors` beside it unless `rule.step` is 0.
            zero_stage: DeepSpeed ZeRO stage.
            rule: settings of the step.
            moments: directory of the moments where it is another one.
            offload: keep masters and moments in host memory (stages 1 to 3).

        Raises:
            ModelError: the moments do not fit the model.
        """
        model = load_model(directory, zero_stage)
        self._module = module = ResponseLoss(model)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._engine = build_engine(module, rule, zero_stage, offload=offload)
        self._engine.eval()
        self._device = torch.device(self._engine.device)
        self._state = EngineState(self._engine)
        if rule.step == 0:
            self._state.set_moments(0, None)
        else:
            with open_moments(moments or directory, names) as read:
                self._state.set_moments(rule.step, read)
        self._state.save()

    @property
    def snapshot(self) -> str:
        return self._state.snapshot

    def set_precision(self, precision: Precision, *, recorded: bool = True) -> None:
        self._module.precision = precision

    def step(self, example: Encoded) -> float:
        loss = self._loss(example)
        value = loss.item()
        if not math.isfinite(value):
            raise NotFiniteError(f"loss of the example is {value}")
        self._apply(loss)
        return value

    def null_step(self) -> None:
        # ZeRO's bookkeeping wants a backward pass before a step; times zero it leaves the momentum alone to act.
        self._apply(self._loss(ANY_TOKENS) * 0)

    def restore(self) -> None:
        self._state.restore()
        self._wait()

    def digest(self) -> str:
        return self._state.digest()

    def reference_losses(self, reference: ReferenceSet) -> Tensor:
        mine = reference.losses(lambda batch: self._engine(**batch.tensors))
        if dist.get_world_size() == 1:
            return mine
        parts = [torch.empty_like(mine, device=self._device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.to(self._device))
        losses = parts[0]
        for part in parts[1:]:
            losses = torch.where(losses.isnan(), part, losses)
        return losses.cpu()

    def reference_gradient(self, reference: ReferenceSet) -> list[Tensor]:
        def backward() -> None:
            losses = reference.weighted_losses(lambda batch: self._engine(**batch.tensors))
            for number, loss in enumerate(losses, 1):
                self._engine.set_gradient_accumulation_boundary(number == len(reference.gradient_batches))
                self._engine.backward(loss)

        skipped = self._engine.skipped_steps
        try:
            gradient = self._state.gradient(backward)
            if self._engine.skipped_steps != skipped:  # sharded, DeepSpeed makes zeros of what is not finite
                raise NotFiniteError(REFERENCE_GRADIENT)
        except BaseException:
            self._state.drop_gradients()
            raise
        finally:
            self.restore()
        return gradient

    def change_along(self, gradient: list[Tensor]) -> float:
        return self._state.change_along(gradient)

    def _loss(self, example: Encoded) -> Tensor:
        loss: Tensor = self._engine(**response_inputs([example], self._device))[0]
        return loss

    def _apply(self, loss: Tensor) -> None:
        """Backward pass and AdamW step."""
        skipped = self._engine.skipped_steps
        try:
            self._engine.backward(loss)
            self._engine.step()
            self._wait()
        except BaseException:
            self._state.drop_gradients()  # or the next example would add to what there is of this one's
            raise
        if self._engine.skipped_steps != skipped:
            raise NotFiniteError("gradient of the example is not finite")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
