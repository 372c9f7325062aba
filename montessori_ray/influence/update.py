"""The one AdamW step on a probing example (paper section 3.2; Loshchilov & Hutter 2019): its settings, the clipping
before it, torch's step written into another buffer, and sums over flat buffers that keep their digits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from montessori_ray.errors import ModelError

OPTIMIZER_JSON = "optimizer.json"
"""File of a warmed student that holds the fields of `AdamW`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Settings of the one step and how many steps the moments already hold."""

    step: int
    """Steps taken before this one; 0 with fresh moments."""
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""

    @staticmethod
    def load(student: Path, learning_rate: float | None = None) -> AdamW:
        """What the warm-up wrote into the student's directory, with another learning rate where one is given.

        Raises:
            ModelError: the file is damaged.
        """
        path = student / OPTIMIZER_JSON
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["learning_rate"] = learning_rate or fields["learning_rate"]
            return AdamW(**{**fields, "betas": tuple(fields["betas"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged ({error}): copy it again, or warm up again") from None

    @staticmethod
    def fresh(learning_rate: float) -> AdamW:
        """AdamW before its first step, with the config's defaults."""
        return AdamW(
            step=0, learning_rate=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0
        )


def clip_scale(gradients: Iterable[Tensor], max_grad_norm: float) -> Tensor:
    """Factor (scalar, at most 1) that clips the global norm of `gradients`, as `torch.nn.utils.clip_grad_norm_`."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    return torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0) if max_grad_norm > 0 else torch.ones_like(norm)


NORM_ROW = 4096
"""Squares summed in float32 at once."""


def exact_norm(flat: Tensor) -> Tensor:
    """Euclidean norm (scalar, float32) of a flat buffer, to float32's rounding.

    By rows, these in float64: one float32 sum of 99 million squares was 0.3 % short on a CPU (measured), which clipped
    too little and moved scores of the quickstart's student by 1e-4.
    """
    whole = len(flat) // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)[None]
    norm: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest]).double()).float()
    return norm


CHUNK = {"cpu": 2**19, "cuda": 2**27}
"""Weights worked on at once: what a core's cache, or a corner of a GPU's memory, holds of the temporary tensors."""


def chunks(*buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of flat buffers of one length, one after the other; as large as suits the first one's device."""
    return zip(*(buffer.split(CHUNK[buffers[0].device.type]) for buffer in buffers), strict=True)


@torch.no_grad()
def write_step(
    stepped: Tensor, weights: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: Tensor, rule: AdamW
) -> None:
    """Write the weights after the step on the gradient times `scale`, which is zero then; nothing else changes.

    All flat buffers of one length, float32 (the gradient's may be bfloat16). On CPUs by torch's fused kernel, as the
    student was warmed up with; it works in place, so on copies of a chunk that stays in the cache. On CUDA, where these
    copies move three times the bytes that are needed, by one compiled kernel that reads four buffers and writes one.
    """
    write = _compiled(write_by_formula) if stepped.device.type == "cuda" else _write_by_torch
    for chunk in chunks(stepped, weights, gradient, exp_avg, exp_avg_sq):
        write(chunk, scale, rule)
        chunk[2].zero_()


@torch.no_grad()
def step_along(
    slopes: Tensor, weights: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scale: Tensor, rule: AdamW
) -> Tensor:
    """`change_along` (float64 scalar) of what `write_step` would write; the gradient stays as it is.

    On a GPU one pass over four buffers (five with weight decay), where writing weights and reading them again moves
    eight and a half; and the change as it is, not rounded to what the weights can hold.
    """
    along = _compiled(_along_by_formula) if slopes.device.type == "cuda" else _along_by_torch
    total = torch.zeros((), dtype=torch.float64, device=slopes.device)
    for chunk in chunks(slopes, weights, gradient, exp_avg, exp_avg_sq):
        total += along(chunk, scale, rule)
    return total


def _along_by_torch(chunk: tuple[Tensor, ...], scale: Tensor, rule: AdamW) -> Tensor:
    slopes, weights, *others = chunk
    stepped = torch.empty_like(weights)
    _write_by_torch((stepped, weights, *others), scale, rule)
    return _product_on_cpu(stepped, weights, slopes)


def _along_by_formula(chunk: tuple[Tensor, ...], scale: Tensor, rule: AdamW) -> Tensor:
    slopes, *others = chunk
    return (_change(tuple(others), scale, rule) * slopes).sum(dtype=torch.float64)


def _write_by_torch(chunk: tuple[Tensor, ...], scale: Tensor, rule: AdamW) -> None:
    stepped, weights, gradient, exp_avg, exp_avg_sq = chunk
    count = torch.tensor(float(rule.step), device=stepped.device)
    stepped.copy_(weights)
    adamw(
        [stepped], [gradient.float() * scale], [exp_avg.clone()], [exp_avg_sq.clone()], [], [count], fused=True,
        amsgrad=False, maximize=False, lr=rule.learning_rate, beta1=rule.betas[0], beta2=rule.betas[1], eps=rule.eps,
        weight_decay=rule.weight_decay,
    )  # fmt: skip


def write_by_formula(chunk: tuple[Tensor, ...], scale: Tensor, rule: AdamW) -> None:
    """`write_step` of a chunk, the gradient of which stays as it is; to be compiled."""
    stepped, weights, *others = chunk
    stepped.copy_(weights + _change((weights, *others), scale, rule))


def _change(chunk: tuple[Tensor, ...], scale: Tensor, rule: AdamW) -> Tensor:
    """What the step by Loshchilov & Hutter (2019, algorithm 2) adds, its bias corrections in double precision.

    Without weight decay it reads no weights.
    """
    weights, gradient, exp_avg, exp_avg_sq = chunk
    (beta1, beta2), count = rule.betas, rule.step + 1
    clipped = gradient.float() * scale
    mean = exp_avg + (clipped - exp_avg) * (1 - beta1)
    square = exp_avg_sq * beta2 + clipped * clipped * (1 - beta2)
    denominator = square.sqrt() / (1 - beta2**count) ** 0.5 + rule.eps
    change: Tensor = -rule.learning_rate / (1 - beta1**count) * mean / denominator
    return change - rule.learning_rate * rule.weight_decay * weights if rule.weight_decay else change


def change_along(after: Tensor, before: Tensor, slopes: Tensor) -> Tensor:
    """Inner product (float64 scalar) of a change and slopes, flat float32 buffers; `before` may be in host memory.

    By chunks, whose products are summed in float64: one float32 sum over all weights of a model would lose digits, and
    CUDA's takes no more than 2^31 of them.
    """
    product = _compiled(_product) if after.device.type == "cuda" else _product_on_cpu
    total = torch.zeros((), dtype=torch.float64, device=after.device)
    for new, old, slope in chunks(after, before, slopes):
        total += product(new, old.to(new.device), slope)
    return total


def _product(new: Tensor, old: Tensor, slope: Tensor) -> Tensor:
    return ((new - old) * slope).sum(dtype=torch.float64)


def _product_on_cpu(new: Tensor, old: Tensor, slope: Tensor) -> Tensor:
    return torch.dot(new - old, slope)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fused into one kernel. Not for sizes that vary from the start: settings would be read, and bias corrections be
    raised to their powers, once a weight."""
    return torch.compile(function)
