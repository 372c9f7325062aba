"""Fingerprints of tensors and the random generators' states: what "restored bit for bit" is checked with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator_states() -> list[Tensor]:
    """State of the random generators of the CPU and of the current GPU, if there is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_generator_states(states: Sequence[Tensor]) -> None:
    """Go back to states that `generator_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


_CHUNK = {"cpu": 2**18, "cuda": 2**26}
"""Words summed at once: what stays in a core's cache, and what keeps a GPU busy."""
_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, as a signed odd number


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """64-bit sum of a tensor's 32-bit (else 8-bit) words times odd numbers that depend on their places.

    Any single changed word changes it. Runs where the tensor is: hashing on the host would copy all weights of a GPU.
    """
    flat = tensor.detach().reshape(-1)
    words = flat.view(torch.int32 if flat.nbytes % 4 == 0 else torch.uint8)
    chunk_size = _CHUNK[words.device.type]
    places = torch.arange(min(chunk_size, words.numel()), device=words.device) * _MULTIPLIER | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for index, chunk in enumerate(words.split(chunk_size)):
        total += (places[: len(chunk)] * chunk).sum() * (2 * index + 1)
    return int(total) % 2**64
