"""LoRA students: an adapter and the whole model it sits on in one folder, as PEFT and transformers write and read them.

Only the adapter's weights are trained, have moments, and move in a score's step; the model's own never change.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from montessori_ray.config import Lora
from montessori_ray.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
"""File of a folder that tells PEFT what the adapter beside it is."""

NOT_THE_BASE = ("adapter_*", "optimizer.*")
"""Files of a student's folder that belong to its adapter and its moments."""


def has_adapter(folder: Path) -> bool:
    """Whether a model folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def on_adapter(model: Any) -> bool:
    """Whether a loaded model carries an adapter."""
    return bool(getattr(model, "peft_config", None))


def add_adapter(model: Any, lora: Lora, seed: int) -> None:
    """Put a fresh adapter, which changes nothing yet, on a loaded model; only its weights are trained from now on.

    Raises:
        ModelError: the model has an adapter already, or no layers of these names.
    """
    if on_adapter(model):
        raise ModelError("the student is an adapter already, which is what is trained: leave student.lora out")
    torch.manual_seed(seed)
    targets = "all-linear" if lora.targets is None else list(lora.targets)
    try:
        model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))
    except ValueError as error:
        raise ModelError(f"student.lora does not fit the student: {str(error).splitlines()[0]}") from None


def train_adapter(model: Any) -> None:
    """Have a model's loaded adapter trained; transformers loads it for inference."""
    model.set_adapter(model.active_adapters())


def copy_base(source: Path, target: Path) -> None:
    """Copy the model without its adapter and moments from one folder into another."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_THE_BASE), dirs_exist_ok=True)
