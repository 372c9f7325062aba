"""Backend `local`: the warmed student on one device, as flat buffers.

Five buffers hold everything: the warmed weights, AdamW's two moments, the gradient of one example, and the stepped
weights. A step reads the first four and writes the last one, so the warmed state is never touched and going back to it
costs nothing. It writes when a pass over the stepped weights is asked for: `first_order` only wants to know how far
they go along a gradient. Two copies of the module look into the two weight buffers (`copies`); no engine hooks are in
their way, so their passes can be compiled, and on a GPU recorded as CUDA graphs. Weights that are not trained (all but
an adapter's) lie in no buffer; both copies share them.

Memory: 20 bytes a trained weight, 4 more with `first_order` and `corrected`, which keep a gradient of the reference
loss (`corrected` takes two, so 8 more while it starts), 6 more for `bfloat16` passes; 4 bytes a weight that is not
trained; and activations.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from torch import Tensor

from montessori_ray.influence.capture import Graphs, can_record
from montessori_ray.influence.copies import Copies, State, views
from montessori_ray.influence.estimators import REFERENCE_GRADIENT, NotFiniteError
from montessori_ray.influence.fingerprint import checksum, generator_states, set_generator_states
from montessori_ray.influence.moments import MOMENTS, open_moments
from montessori_ray.influence.reference import Precision, ReferenceBatch, ReferenceSet, ResponseLoss, response_inputs
from montessori_ray.influence.update import AdamW, change_along, clip_scale, exact_norm, step_along, write_step
from montessori_ray.training.chat import Encoded
from montessori_ray.training.engine import load_model

BUCKET = 64
"""Lengths of recorded passes over one example are multiples of it: a graph each, and few tokens that only fill up."""


class LocalStudent:
    """A warmed student that steps on one example, is measured on reference rows, and goes back; on one device.

    Dropout is off throughout: an influence belongs to the example, not to a mask.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rule: AdamW,
        device: torch.device,
        compiled: bool = False,
        moments: Path | None = None,
    ) -> None:
        """Load the student.

        Args:
            directory: a Hugging Face model directory, with `optimizer.safetensors` beside it unless `rule.step` is 0.
            rule: settings of the step.
            device: where all buffers live.
            compiled: layers pass through `torch.compile`, once for batches of any shape.
            moments: directory of the moments where it is another one.

        Raises:
            ModelError: the moments do not fit the model.
        """
        self._rule = rule
        self._device = device
        loaded = ResponseLoss(load_model(directory, 0).eval().to(device))
        # What a model computes with a head of its own may wait for the device.
        self._can_record = loaded.try_head(device) and can_record(device)
        self._longest: int = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
        self._masters = self._copies = Copies(loaded, compiled)
        self._weights, self._stepped = self._masters.weights.values()
        self._moments = [torch.zeros_like(self._weights) for _ in MOMENTS]
        if rule.step:
            module = self._masters.modules["warmed"]
            names = {parameter: name for name, parameter in module.model.named_parameters()}
            with open_moments(moments or directory, names) as read:
                for moment, flat in zip(MOMENTS, self._moments, strict=True):
                    for parameter, view in views(self._masters.trained["warmed"], flat):
                        view.copy_(read(moment, parameter))
        self._generators = generator_states()
        self._state: State = "warmed"
        self._unwritten: Tensor | None = None
        """Factor on the gradient of a step whose weights are not written yet."""
        self._precision: Precision = "float32"
        self._records = self._can_record
        self._in_bfloat16: Copies | None = None
        self._graphs: dict[Precision, Graphs] = {}
        self._fixed_inputs: dict[int, dict[str, Tensor]] = {}

    @property
    def snapshot(self) -> str:
        return "not needed"  # the warmed weights are never written to

    def set_precision(self, precision: Precision, *, recorded: bool = True) -> None:
        self._precision = precision
        self._records = recorded and self._can_record
        self._copies = self._masters
        if precision == "bfloat16":
            self._copies = self._in_bfloat16 = self._in_bfloat16 or self._masters.in_bfloat16()

    def step(self, example: Encoded) -> float:
        gradient = self._copies.gradient
        try:
            loss, norm = self._gradient_of(example), exact_norm(gradient)
            value, size = torch.stack([loss, norm.double()]).tolist()
            if not (math.isfinite(value) and math.isfinite(size)):
                what = "gradient of the example is not finite"
                raise NotFiniteError(what if math.isfinite(value) else f"loss of the example is {value}")
            self._take(clip_scale([norm], self._rule.max_grad_norm))
        except BaseException:
            gradient.zero_()  # or the next example would add to what there is of this one's
            raise
        return float(value)

    def null_step(self) -> None:
        self._take(torch.ones((), device=self._device))

    def restore(self) -> None:
        if self._unwritten is not None:
            self._copies.gradient.zero_()
        self._unwritten = None
        self._state = "warmed"
        set_generator_states(self._generators)

    def digest(self) -> str:
        self._write()
        tensors = [*self._moments, *generator_states()]
        for copies in (self._masters, self._in_bfloat16):
            if copies is not None:
                tensors += [copies.weights["warmed"], copies.gradient, *copies.frozen, *copies.buffers]
        if self._state == "stepped":
            tensors.append(self._stepped)
        return hashlib.sha256(repr([checksum(tensor) for tensor in tensors]).encode()).hexdigest()

    def reference_losses(self, reference: ReferenceSet) -> Tensor:
        self._write()
        return reference.losses(self._loss)

    def reference_gradient(self, reference: ReferenceSet) -> list[Tensor]:
        self._write()
        total, module = torch.zeros_like(self._weights), self._copies.modules[self._state]
        try:
            with self._copies.collecting(self._state) as gradient:
                for loss in reference.weighted_losses(lambda batch: module(**batch.tensors)):
                    loss.backward()
                    total += gradient.detach()
                    gradient.zero_()
        finally:
            self.restore()
        if not total.isfinite().all():
            raise NotFiniteError(REFERENCE_GRADIENT)
        return [total]

    def change_along(self, gradient: list[Tensor]) -> float:
        if self._unwritten is None:
            return change_along(self._stepped, self._weights, gradient[0]).item()
        exp_avg, exp_avg_sq = self._moments
        step = (self._weights, self._copies.gradient, exp_avg, exp_avg_sq, self._unwritten, self._rule)
        return step_along(gradient[0], *step).item()

    def _loss(self, batch: ReferenceBatch) -> Tensor:
        """Row losses of a batch; recorded in both states, so that nothing but the weights tells them apart."""
        module = self._copies.modules[self._state]

        def work() -> Tensor:
            losses: Tensor = module(**batch.tensors)
            return losses

        return self._recorded((self._state, batch), work, undo=lambda: None) if self._records else work()

    def _gradient_of(self, example: Encoded) -> Tensor:
        """Add the gradient of an example to the buffer and return its loss (scalar)."""
        module = self._copies.modules["warmed"]
        if not self._records:
            return _backward(module, response_inputs([example], self._device))
        tokens = len(example.input_ids)
        length = max(tokens, min(math.ceil(tokens / BUCKET) * BUCKET, self._longest))  # learned positions end there
        inputs = response_inputs([example], self._device, length=length)
        fixed = self._fixed_inputs.setdefault(length, inputs)
        for name, tensor in inputs.items():
            fixed[name].copy_(tensor)
        return self._recorded(length, lambda: _backward(module, fixed), undo=self._copies.gradient.zero_)

    def _recorded(self, key: Hashable, work: Callable[[], Tensor], undo: Callable[[], object]) -> Tensor:
        """Work of the present precision, as `Graphs.run`."""
        if self._precision not in self._graphs:
            self._graphs[self._precision] = Graphs()
        return self._graphs[self._precision].run(key, work, undo)

    def _take(self, scale: Tensor) -> None:
        """Step on the gradient times a factor, for now without writing the new weights."""
        self._unwritten, self._state = scale, "stepped"

    @torch.no_grad()
    def _write(self) -> None:
        """Write the stepped weights, if there are some to write; the gradient is zero then."""
        if self._unwritten is None:
            return
        exp_avg, exp_avg_sq = self._moments
        step = (self._weights, self._copies.gradient, exp_avg, exp_avg_sq, self._unwritten, self._rule)
        write_step(self._stepped, *step)
        self._unwritten = None
        self._copies.take_step(self._stepped)


def _backward(module: ResponseLoss, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = module(**inputs)[0]
    loss.backward()
    return loss.detach()
