"""Backend `local`: the warmed student on one device, as flat buffers.

Five buffers hold everything: the warmed weights, AdamW's two moments, the gradient of one example, and the stepped
weights. A step reads the first four and writes the last one, so the warmed state is never touched and going back to it
costs nothing. Two copies of the module look into the two weight buffers; no engine hooks are in their way, so their
passes can be compiled. Weights that are not trained (all but an adapter's) lie in no buffer; both copies share them.

Memory: 20 bytes a trained weight, 4 more with `first_order` and `corrected`, which keep a gradient of the reference
loss (`corrected` takes two, so 8 more while it starts); 4 bytes a weight that is not trained; and activations.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from montessori_ray.influence.estimators import NotFiniteError
from montessori_ray.influence.fingerprint import checksum, generator_states, set_generator_states
from montessori_ray.influence.moments import MOMENTS, open_moments
from montessori_ray.influence.reference import Precision, ReferenceSet, ResponseLoss
from montessori_ray.influence.update import AdamW, change_along, chunks, clip_scale, exact_norm
from montessori_ray.training.chat import Encoded, collate
from montessori_ray.training.engine import load_model


class LocalStudent:
    """A warmed student that steps on one example, is measured on reference rows, and goes back; on one device.

    Dropout is off throughout: an influence belongs to the example, not to a mask.
    """

    def __init__(
        self,
        directory: Path,
        *,
        pad_token_id: int,
        rule: AdamW,
        device: torch.device,
        compiled: bool = False,
        moments: Path | None = None,
    ) -> None:
        """Load the student.

        Args:
            directory: a Hugging Face model directory, with `optimizer.safetensors` beside it unless `rule.step` is 0.
            pad_token_id: fills up short rows.
            rule: settings of the step.
            device: where all buffers live.
            compiled: pass through `torch.compile`, once for batches of any shape.
            moments: directory of the moments where it is another one.

        Raises:
            ModelError: the moments do not fit the model.
        """
        self._rule = rule
        self._device = device
        self._pad_token_id = pad_token_id
        module = ResponseLoss(load_model(directory, 0).eval().to(device))
        self._frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        shared = {id(parameter): parameter for parameter in self._frozen}
        self._modules = {"warmed": module, "stepped": copy.deepcopy(module, shared)}
        self._trained = {state: _trained(copied) for state, copied in self._modules.items()}
        self._weights, self._stepped = (_flatten(parameters) for parameters in self._trained.values())
        self._gradient = torch.zeros_like(self._weights)
        self._moments = [torch.zeros_like(self._weights) for _ in MOMENTS]
        if rule.step:
            names = {parameter: name for name, parameter in module.model.named_parameters()}
            with open_moments(moments or directory, names) as read:
                for moment, flat in zip(MOMENTS, self._moments, strict=True):
                    for parameter, view in _views(self._trained["warmed"], flat):
                        view.copy_(read(moment, parameter))
        _collect_gradients(self._trained["warmed"], self._gradient)
        _collect_gradients(self._trained["stepped"], None)
        self._generators = generator_states()
        self._passes = {
            state: torch.compile(copied, dynamic=True) if compiled else copied
            for state, copied in self._modules.items()
        }
        self._state: Literal["warmed", "stepped"] = "warmed"

    @property
    def snapshot(self) -> str:
        return "not needed"  # the warmed weights are never written to

    def set_precision(self, precision: Precision) -> None:
        for module in self._modules.values():
            module.precision = precision

    def step(self, example: Encoded) -> float:
        tensors = collate([example], self._pad_token_id)
        try:
            loss = self._passes["warmed"](**{name: tensor.to(self._device) for name, tensor in tensors.items()})[0]
            loss.backward()
            value, norm = loss.item(), exact_norm(self._gradient)
            if not (math.isfinite(value) and norm.isfinite()):
                what = "gradient of the example is not finite"
                raise NotFiniteError(what if math.isfinite(value) else f"loss of the example is {value}")
            self._step(clip_scale([norm], self._rule.max_grad_norm))
        except BaseException:
            self._gradient.zero_()  # or the next example would add to what there is of this one's
            raise
        return float(value)

    def null_step(self) -> None:
        self._step(torch.ones((), device=self._device))

    def restore(self) -> None:
        self._state = "warmed"
        set_generator_states(self._generators)

    def digest(self) -> str:
        kept = [*self._frozen, *self._modules["warmed"].buffers()]
        tensors = [self._weights, *self._moments, self._gradient, *kept, *generator_states()]
        if self._state == "stepped":
            tensors.append(self._stepped)
        return hashlib.sha256(repr([checksum(tensor) for tensor in tensors]).encode()).hexdigest()

    def reference_losses(self, reference: ReferenceSet) -> Tensor:
        return reference.losses(self._passes[self._state], self._device)

    def reference_gradient(self, reference: ReferenceSet) -> list[Tensor]:
        gradient = torch.zeros_like(self._weights)
        try:
            _collect_gradients(self._trained[self._state], gradient)
            for loss in reference.weighted_losses(self._modules[self._state], self._device):
                loss.backward()
        finally:
            _collect_gradients(self._trained["warmed"], self._gradient)
            _collect_gradients(self._trained["stepped"], None)
            self.restore()
        return [gradient]

    def change_along(self, gradient: list[Tensor]) -> float:
        return change_along(self._stepped, self._weights, gradient[0]).item()

    @torch.no_grad()
    def _step(self, scale: Tensor) -> None:
        """Write the stepped weights from the warmed state and the gradient times a factor; the gradient is zero then.

        By torch's fused kernel, as the student was warmed up with; it works in place, so on copies of a chunk. All that
        is done to a chunk is done while it is in the cache: the step is bound by memory.
        """
        rule = self._rule
        for stepped, weights, gradient, *moments in chunks(
            self._stepped, self._weights, self._gradient, *self._moments
        ):
            exp_avg, exp_avg_sq = (moment.clone() for moment in moments)
            count = torch.tensor(float(rule.step), device=self._device)
            stepped.copy_(weights)
            adamw(
                [stepped], [gradient.mul_(scale)], [exp_avg], [exp_avg_sq], [], [count], fused=True, amsgrad=False,
                maximize=False, lr=rule.learning_rate, beta1=rule.betas[0], beta2=rule.betas[1], eps=rule.eps,
                weight_decay=rule.weight_decay,
            )  # fmt: skip
            gradient.zero_()
        self._state = "stepped"
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that a step moves, tied ones once."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Put parameters end to end into one new buffer, which they then look into."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, view in _views(parameters, flat):
        parameter.data = view
    return flat


def _collect_gradients(parameters: Sequence[nn.Parameter], buffer: Tensor | None) -> None:
    """Have backward passes add to a flat buffer, or leave these parameters out of them."""
    for parameter, view in _views(parameters, buffer) if buffer is not None else ((p, None) for p in parameters):
        parameter.grad = view
        parameter.requires_grad_(view is not None)


def _views(parameters: Sequence[nn.Parameter], flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter and its place in a flat buffer."""
    offset = 0
    for parameter in parameters:
        yield parameter, flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
