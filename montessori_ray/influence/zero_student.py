"""Backend `zero`: the warmed student in a DeepSpeed engine, whole on every rank or sharded over a scoring group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from montessori_ray.errors import ModelError
from montessori_ray.influence.estimators import NotFiniteError
from montessori_ray.influence.reference import ReferenceSet, ResponseLoss
from montessori_ray.influence.update import AdamW
from montessori_ray.influence.zero_state import EngineState
from montessori_ray.training.chat import Encoded, collate
from montessori_ray.training.engine import build_engine, load_model
from montessori_ray.training.student_state import OPTIMIZER_TENSORS


class ZeroStudent:
    """A warmed student that steps on one example, is measured on the reference set, and goes back.

    Every rank of the group is given the same example, so the mean of the ranks' gradients is the example's gradient at
    any group size; reference rows are split over the ranks. Dropout is off throughout: an influence belongs to the
    example, not to a mask.
    """

    def __init__(
        self,
        directory: Path,
        reference: Sequence[Encoded],
        *,
        zero_stage: int,
        reference_tokens: int,
        pad_token_id: int,
        rule: AdamW,
    ) -> None:
        """Load the student; torch.distributed must be initialized with the ranks of the group.

        Args:
            directory: a Hugging Face model directory, with `optimizer.safetensors` beside it unless `rule.step` is 0.
            reference: the tokenized reference rows.
            zero_stage: DeepSpeed ZeRO stage.
            reference_tokens: padded tokens in one forward pass over reference rows.
            pad_token_id: fills up short rows.
            rule: settings of the step.

        Raises:
            ModelError: the moments do not fit the model.
        """
        self._pad_token_id = pad_token_id
        rank, world = dist.get_rank(), dist.get_world_size()
        self._reference = ReferenceSet(reference, reference_tokens, pad_token_id, rank, world)
        model = load_model(directory, zero_stage)
        module = ResponseLoss(model)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._engine = build_engine(module, rule, zero_stage)
        self._engine.eval()
        self._device = torch.device(self._engine.device)
        self._state = EngineState(self._engine)
        if rule.step == 0:
            self._state.set_moments(0, None)
        else:
            _load_moments(self._state, rule.step, names, directory)
        self._state.save()

    def step(self, example: Encoded) -> float:
        tensors = collate([example], self._pad_token_id)
        loss = self._loss(tensors)
        value = loss.item()
        if not math.isfinite(value):
            raise NotFiniteError(f"loss of the example is {value}")
        self._apply(loss)
        return value

    def null_step(self) -> None:
        # ZeRO's bookkeeping wants a backward pass before a step; times zero it leaves the momentum alone to act.
        self._apply(self._loss(collate([self._reference.shortest], self._pad_token_id)) * 0)

    def restore(self) -> None:
        self._state.restore()
        self._wait()

    def digest(self) -> str:
        return self._state.digest()

    def reference_losses(self) -> Tensor:
        mine = self._reference.losses(self._engine, self._device)
        if dist.get_world_size() == 1:
            return mine
        parts = [torch.empty_like(mine, device=self._device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.to(self._device))
        losses = parts[0]
        for part in parts[1:]:
            losses = torch.where(losses.isnan(), part, losses)
        return losses.cpu()

    def _loss(self, tensors: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self._engine(**{name: tensor.to(self._device) for name, tensor in tensors.items()})[0]
        return loss

    def _apply(self, loss: Tensor) -> None:
        """Backward pass and AdamW step."""
        skipped = self._engine.skipped_steps
        self._engine.backward(loss)
        self._engine.step()
        self._wait()
        if self._engine.skipped_steps != skipped:
            raise NotFiniteError("gradient of the example is not finite")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _load_moments(state: EngineState, step: int, names: dict[Tensor, str], directory: Path) -> None:
    path = directory / OPTIMIZER_TENSORS
    if not path.exists():
        raise ModelError(f"{directory} says that {step} steps were taken but has no {path.name}: warm up again")
    with safe_open(path, framework="pt") as stored:
        known = set(stored.keys())

        def read(moment: str, parameter: Tensor) -> Tensor:
            key = f"{moment}.{names[parameter]}"
            if key not in known:
                raise ModelError(f"{path} has no {key}: it belongs to another model than {directory}; warm up again")
            tensor: Tensor = stored.get_tensor(key)
            return tensor

        state.set_moments(step, read)
