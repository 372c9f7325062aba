"""Both states of a student on one device as modules of one precision, each over one flat buffer of trained weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate.utils.other import compile_regions_deepspeed
from torch import Tensor, nn

from montessori_ray.influence.reference import ResponseLoss

State = Literal["warmed", "stepped"]


class Copies:
    """The warmed and the stepped student; weights that are not trained are shared."""

    def __init__(self, module: ResponseLoss, compiled: bool) -> None:
        """
        Args:
            module: the warmed student, which is kept; with a copy whose weights are the same until they are written.
            compiled: pass each kind of layer through `torch.compile`, whatever the shape of a batch.
        """
        self._compiled = compiled
        self.frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        self.modules = {"warmed": module, "stepped": _copy(module, {frozen: frozen for frozen in self.frozen})}
        self.trained = {
            state: [parameter for parameter in copied.parameters() if parameter.requires_grad]
            for state, copied in self.modules.items()
        }
        """Parameters that a step moves, tied ones once."""
        self.weights = {state: _flatten(parameters) for state, parameters in self.trained.items()}
        self.buffers = list(module.buffers())
        self.gradient = torch.zeros_like(self.weights["warmed"])
        """Where backward passes over the warmed student add to."""
        self._collect("warmed")
        if compiled:
            # By layers: a whole model of 22 took over 100 s (one H100), its kinds of layers a few each. In place, as
            # the function does for an engine: a wrapper would be a module of its own, without this one's parameters.
            for copied in self.modules.values():
                compile_regions_deepspeed(copied.model.get_decoder(), dynamic=True)
                if copied.head is not None:
                    copied.head.compiled = True

    def in_bfloat16(self) -> Copies:
        """These, rounded; buffers, such as the frequencies of rotary embeddings, stay as they are."""
        module = self.modules["warmed"]
        rounded = {
            parameter: nn.Parameter(parameter.detach().bfloat16(), requires_grad=parameter.requires_grad)
            for parameter in module.parameters()
        }
        return Copies(_copy(module, rounded), self._compiled)

    def take_step(self, stepped: Tensor) -> None:
        """Have the stepped student use these weights, flat float32."""
        if self.weights["stepped"].data_ptr() != stepped.data_ptr():
            self.weights["stepped"].copy_(stepped)

    @contextmanager
    def collecting(self, state: State) -> Iterator[Tensor]:
        """The gradient's buffer (zero before and after), to which backward passes over this state add meanwhile."""
        self._collect(state)
        try:
            yield self.gradient
        finally:
            self.gradient.zero_()
            self._collect("warmed")

    def _collect(self, state: State) -> None:
        for each, parameters in self.trained.items():
            for parameter, view in views(parameters, self.gradient):
                parameter.grad = view if each == state else None


def views(parameters: Sequence[nn.Parameter], flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter and its place in a flat buffer."""
    offset = 0
    for parameter in parameters:
        yield parameter, flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()


def _flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Put parameters end to end into one new buffer, which they then look into."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, view in views(parameters, flat):
        parameter.data = view
    return flat


def _copy(module: ResponseLoss, parameters: dict[nn.Parameter, nn.Parameter]) -> ResponseLoss:
    """A copy of a module that has these parameters in place of its own."""
    return copy.deepcopy(module, {id(own): other for own, other in parameters.items()})
