"""A fine-tuned student on disk: a Hugging Face directory, and AdamW's state beside it, keyed by parameter names.

Nothing in it tells how many ranks or which ZeRO stage made it: `influence` loads it into any.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from montessori_ray.influence.update import OPTIMIZER_JSON, AdamW
from montessori_ray.models import OPTIMIZER_TENSORS
from montessori_ray.training.adapters import on_adapter
from montessori_ray.training.engine import AdamWSettings


def save_weights(engine: Any, model: Any, tokenizer: Any, output: Path) -> None:
    """Save the model in float32 with its tokenizer and chat template. Every rank calls it, rank 0 writes.

    Args:
        engine: the DeepSpeed engine around `model` or a module that holds it.
        model: the transformers model; tied parameters are saved once, and of one with an adapter only the adapter.
        tokenizer: what is saved beside it.
        output: the folder, made if needed.
    """
    whole_here = engine.zero_optimization_stage() < 3

    def weight(parameter: Parameter) -> Tensor:
        return parameter.detach() if whole_here else safe_get_full_fp32_param(parameter)

    state = _gather(model, weight, trained=on_adapter(model))  # at stage 3 frozen weights cannot be read
    if dist.get_rank() == 0:
        parameters = {name for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Parameter)}
        state |= {name: value for name, value in model.state_dict().items() if name not in parameters}
        model.save_pretrained(output, state_dict=state)
        tokenizer.save_pretrained(output)
    dist.barrier()


def keep_processors(model: Path, output: Path) -> None:
    """Copy a model's settings for images and the like, without which models that also see are not served."""
    for file in model.glob("*processor*.json"):
        shutil.copy(file, output)


def save_optimizer(engine: Any, model: Any, settings: AdamWSettings, learning_rate: float, output: Path) -> None:
    """Save AdamW's moments and what else its next step needs. Every rank calls it, rank 0 writes.

    Args:
        engine: the DeepSpeed engine around `model`.
        model: the transformers model, whose parameter names are the keys.
        settings: AdamW's settings.
        learning_rate: rate of the last step.
        output: the student's folder.
    """
    whole_here = engine.zero_optimization_stage() == 0

    def moment(key: str) -> Callable[[Parameter], Tensor]:
        if whole_here:
            return lambda parameter: engine.optimizer.state[parameter][key]
        return lambda parameter: safe_get_full_optimizer_state(parameter, key)

    tensors: dict[str, Tensor] = {}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{key}.{name}": value for name, value in _gather(model, moment(key), trained=True).items()}
    if dist.get_rank() == 0:
        save_file(tensors, output / OPTIMIZER_TENSORS)
        rule = AdamW(
            step=engine.global_steps,
            learning_rate=learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )
        (output / OPTIMIZER_JSON).write_text(json.dumps(asdict(rule), indent=1), encoding="utf-8")
    dist.barrier()


def _gather(model: Any, read: Callable[[Parameter], Tensor], *, trained: bool = False) -> dict[str, Tensor]:
    """`read` of every (or only every trained) parameter by name, on the CPU of rank 0; other ranks take part and keep
    nothing."""
    gathered = {}
    for name, parameter in model.named_parameters():  # the same order everywhere: reading may be collective
        if trained and not parameter.requires_grad:
            continue
        value = read(parameter)
        if dist.get_rank() == 0:
            gathered[name] = value.to("cpu", copy=True).contiguous()
    return gathered
