"""Warm up and train: the student is fine-tuned on examples (paper sections 3.2 and 3.4)."""

from __future__ import annotations

from typing import Any

from montessori_ray.config import Training
from montessori_ray.stages.base import AnySettings, StageContext


def warm_up(context: StageContext[AnySettings]) -> dict[str, Any]:
    """The warmed student: weights and AdamW moments after one pass over the warm-up set."""
    return _fine_tune(context, context.config.warm_up, keep_optimizer=True)


def train_student(context: StageContext) -> dict[str, Any]:
    """The trained student: the original one after the training set."""
    return _fine_tune(context, context.config.train_student, keep_optimizer=False)


def _fine_tune(context: StageContext[AnySettings], training: Training, *, keep_optimizer: bool) -> dict[str, Any]:
    from montessori_ray.training.sft import fine_tune  # late: see stages/__init__.py

    student = context.config.student
    seed = training.seed if training.seed is not None else context.config.seed
    with context.output.model_writer() as folder:
        return fine_tune(
            model=context.model(0), rows=context.input(1).part_paths(), output=str(folder), training=training,
            chat_template=student.chat_template, max_length=student.max_length, seed=seed,
            keep_optimizer=keep_optimizer, name=context.train_name, storage=context.run.train_storage(),
            progress=context.progress, lora=student.lora,
        )  # fmt: skip
