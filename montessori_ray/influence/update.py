"""The one AdamW step on a probing example (paper section 3.2; Loshchilov & Hutter 2019): its settings, the clipping
before it, and sums over flat buffers that keep their digits. The step itself is torch's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
        """What the warm-up wrote into the student's directory, with another learning rate where one is given."""
        fields = json.loads((student / OPTIMIZER_JSON).read_text(encoding="utf-8"))
        fields["learning_rate"] = learning_rate or fields["learning_rate"]
        return AdamW(**{**fields, "betas": tuple(fields["betas"])})

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
    """Euclidean norm (scalar) of a flat buffer, to float32's rounding.

    By rows, these in float64: one float32 sum of 99 million squares was 0.3 % short on a CPU (measured), which clipped
    too little and moved scores of the quickstart's student by 1e-4.
    """
    whole = len(flat) // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])[None]
    norm: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest]).double()).to(flat.dtype)
    return norm


CHUNK = {"cpu": 2**19, "cuda": 2**26}
"""Weights worked on at once: what a core's cache, or a corner of a GPU's memory, holds of the temporary tensors."""


def chunks(*buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of flat buffers of one length, one after the other; as large as suits the first one's device."""
    return zip(*(buffer.split(CHUNK[buffers[0].device.type]) for buffer in buffers), strict=True)


def change_along(after: Tensor, before: Tensor, slopes: Tensor) -> Tensor:
    """Inner product (float64 scalar) of a change and slopes, flat float32 buffers; `before` may be in host memory.

    By chunks, whose products are summed in float64: one float32 sum over all weights of a model would lose digits, and
    CUDA's takes no more than 2^31 of them.
    """
    total = torch.zeros((), dtype=torch.float64, device=after.device)
    for new, old, slope in chunks(after, before, slopes):
        total += torch.dot(new - old.to(new.device), slope)
    return total
