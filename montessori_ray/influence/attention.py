"""Attention of scoring passes: transformers' SDPA with fused causal kernels wherever only causality hides anything.

Rows are filled up on the right, so no response token sees what fills: a mask says nothing that causality does not.
transformers leaves it out by reading its values, which waits for the device, and never while a CUDA graph is recorded;
the recorded pass then runs slower kernels than the one launched, and compiled layers are compiled anew in the middle of
the recording, which ends it. So whether there is a mask is decided here by shapes alone.

Without a mask transformers leaves grouped heads to the kernel, and no fused float32 kernel on CUDA takes them: torch
falls back to plain products, which made the evaluation of a 1.1B student in tf32 2.16 s instead of 1.75 s with a mask
(one H100). So in float32 key and value heads are repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

NAME = "sdpa_of_filled_rows"


def use_fused_attention(model: Any) -> None:
    """Switch a model from SDPA to this; one with another attention, or none to choose, stays as it is."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)


def _mask(**settings: Any) -> Tensor | None:
    """The mask of a layer (B, 1, T, T), None where that is causal: it has no window, or one as wide as the rows."""
    length, window = settings["kv_length"], settings.get("local_size")
    plain = settings.get("mask_function") is causal_mask_function if window is None else length < window
    if plain and length == settings["q_length"] and settings.get("allow_is_causal_skip", True):
        return None
    mask: Tensor | None = sdpa_mask(**settings)
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attended values (B, T, heads, dim) of queries (B, heads, T, dim), keys and values (B, groups, T, dim)."""
    repeats = query.shape[1] // key.shape[1]
    if query.dtype != torch.float32 or attention_mask is not None or position_bias is not None or repeats == 1:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, position_bias=position_bias, **settings
        )
        return attended
    values = F.scaled_dot_product_attention(
        query,
        repeat_kv(key, repeats),
        repeat_kv(value, repeats),
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
    )
    return values.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
