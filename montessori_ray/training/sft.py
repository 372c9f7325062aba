"""Fine-tuning a student on examples (paper sections 3.2 and 3.4), the driver's side; the ranks run `sft_loop`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from montessori_ray.config import Lora, Training
from montessori_ray.errors import DataError
from montessori_ray.telemetry.progress import ProgressChannel
from montessori_ray.training.ray_train import run_training


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What the ranks are to do; paths are absolute and seen by all nodes."""

    model: str
    rows: tuple[str, ...]
    output: str
    training: Training
    chat_template: str | None
    max_length: int
    seed: int
    keep_optimizer: bool
    progress: ProgressChannel
    lora: Lora | None = None


def fine_tune(
    *,
    model: Path,
    rows: list[str],
    output: str,
    training: Training,
    chat_template: str | None,
    max_length: int,
    seed: int,
    keep_optimizer: bool,
    name: str,
    storage: str,
    progress: ProgressChannel,
    lora: Lora | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` on `rows` and save it, in float32, into the folder `output`.

    Args:
        model: Hugging Face model directory.
        rows: Parquet files with columns `instruction` and `response`.
        output: folder for weights, tokenizer with the chat template, and the optimizer if kept.
        training: the config's section.
        chat_template: the config's `student.chat_template`.
        max_length: tokens of an example; longer ones are cut at the end.
        seed: decides the data order and dropout.
        keep_optimizer: also save AdamW's moments by parameter name (`student_state.save_optimizer`).
        name: of the Ray Train run; the same name and storage continue an interrupted training.
        storage: folder or URL for its checkpoints.
        progress: told every step.
        lora: train a fresh adapter instead of the model's weights.

    Returns:
        loss_first, loss_last (mean over response tokens of the first and last step), steps, tokens (response tokens
        trained on), seconds (in the loop), peak_memory_gb (of rank 0: GPU memory, or resident memory on the CPU),
        rows_skipped (examples whose prompt leaves no room for a response).

    Raises:
        TrainingFailed: it failed more often than Ray Train retries.
        DataError: there are no files.
    """
    if not rows:
        raise DataError(f"training {name} has no files of rows: the set it should be made of is empty")
    job = FineTuning(
        model=str(model), rows=tuple(rows), output=output, training=training, chat_template=chat_template,
        max_length=max_length, seed=seed, keep_optimizer=keep_optimizer, progress=progress,
        lora=lora,
    )  # fmt: skip
    return run_training(
        fine_tune_loop, {"job": job}, name=name, storage=storage, workers=training.workers, worker=training.worker
    )


def fine_tune_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank's whole training; `settings["job"]` is a `FineTuning`."""
    # Imported on the ranks only: DeepSpeed looks for an accelerator when imported, and complains where there is none.
    from montessori_ray.training.sft_loop import train

    job: FineTuning = settings["job"]
    return train(job)
