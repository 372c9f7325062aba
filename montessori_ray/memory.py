"""Does a worker's copy of its model fit? What certainly does not is refused before anything starts.

Counted is what a copy takes at least: weights, gradients and AdamW's moments. Activations, the KV cache and libraries
come on top, so a run that is let through may still find its memory too small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from montessori_ray.cluster import Bundle, Memory
from montessori_ray.config import Config, Pool, Score, Training
from montessori_ray.errors import ResourceError
from montessori_ray.stages.base import AnySettings, Stage

Role = Literal["teacher", "student"]

WHOLE, DIVIDED = {0: 16, 1: 8, 2: 4, 3: 0}, {0: 0, 1: 12, 2: 16, 3: 20}
"""Bytes a weight that every rank holds and that the ranks divide, by ZeRO stage: float32 weights and gradients of 4,
moments of 8, and with ZeRO 4 more for the copy that DeepSpeed updates."""

OFFLOADED = {1: 0, 2: 4, 3: 8}
"""What the ranks divide of a GPU's memory where moments and the updated copy lie in the host's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """What each worker of a stage holds of a model."""

    model: Role
    bytes_a_weight: float
    worker: Bundle
    workers: int
    remedy: str
    split: bool = False
    """Whether it is divided over all GPUs of the worker."""


def require_memory(
    stage: Stage, config: AnySettings, weights: Mapping[Role, int | None], nodes: Sequence[Memory]
) -> None:
    """Refuse a stage with a worker that no GPU, or workers that the nodes together, have the memory for.

    Args:
        stage: of the run.
        config: the run's settings; the stage may have its own.
        weights: number of weights of both models, None where it is not known.
        nodes: what the nodes have.

    Raises:
        ResourceError: says what the workers need at least, what there is, and which setting helps.
    """
    held = copy_of(stage, stage.config or config)
    if held is None or (count := weights[held.model]) is None:
        return
    need, gpus = held.bytes_a_weight * count / 1e9, held.worker.get("GPU", 0.0)
    if gpus:
        largest = max((node.gpu for node in nodes if node.gpu is not None), default=float("inf"))
        there = largest * (gpus if held.split else min(gpus, 1.0))
        fits, said = need <= there, f"and gets {there:.0f} GB of GPU memory"
    else:
        there = sum(node.host for node in nodes)
        fits = need * held.workers <= there and need <= max(node.host for node in nodes)
        said = f"and the nodes have {there:.0f} GB of memory"
    if not fits:
        raise ResourceError(
            f"{stage.name}: each of its {held.workers} workers needs {need:.0f} GB at least for a {held.model} of "
            f"{count / 1e9:.2g} billion weights ({held.bytes_a_weight:g} bytes each), {said}: {held.remedy}"
        )


LOCAL = {"exact": 20, "first_order": 24, "corrected": 28}
"""Bytes a weight of `score.backend: local`, see there; of `corrected` while it starts."""


def copy_of(stage: Stage, settings: AnySettings) -> Copy | None:
    """What a worker of the stage holds; None where it trains, scores and measures nothing. Of a student with an adapter
    (LoRA) its frozen weights alone."""
    if isinstance(settings, Config) and stage.teacher is not None:
        return _hosted("student" if stage.teacher.endswith("student") else "teacher", settings.pool)
    if isinstance(settings, Config) and stage.kind == "tune_teacher":
        return _trained("teacher", stage.kind, settings.tune_teacher)
    lora = settings.student.lora is not None
    if stage.kind in ("warm_up", "train_student"):
        return _trained("student", stage.kind, getattr(settings, stage.kind), frozen=lora)
    if stage.kind in ("evaluate", "measure_students"):
        return Copy(
            model="student", bytes_a_weight=4, worker=settings.score.worker.bundle, workers=1,
            remedy="students are measured whole, each by one score.worker: take a smaller one, or more memory",
        )  # fmt: skip
    return _scored(settings.score, frozen=lora) if stage.kind in ("score", "score_fresh") else None


def _hosted(role: Role, pool: Pool) -> Copy | None:
    if pool.engine.keys() & {"quantization", "cpu_offload_gb"}:
        return None  # fewer bytes a weight than its precision says
    return Copy(
        model=role, bytes_a_weight=4 if pool.dtype == "float32" else 2, worker=pool.worker.bundle,
        workers=pool.replicas, split=True,
        remedy="raise pool.worker.gpus, over which a replica is divided, or take a smaller model",
    )  # fmt: skip


def _trained(role: Role, section: str, training: Training, *, frozen: bool = False) -> Copy:
    size = WHOLE[training.zero_stage] + DIVIDED[training.zero_stage] / training.workers
    if frozen:
        size = 4 / training.workers if training.zero_stage == 3 else 4
    return Copy(
        model=role, bytes_a_weight=size,
        worker=training.worker.bundle, workers=training.workers,
        remedy=f"set {section}.zero_stage=3, which divides it among {section}.workers, and raise these",
    )  # fmt: skip


def _scored(score: Score, *, frozen: bool) -> Copy:
    if frozen:
        size: float = 4 / score.group_size if score.zero_stage == 3 else 4
    elif score.backend != "zero" and score.group_size == 1:
        size = LOCAL[score.estimator] + (6 if score.meaning("precision") == "bfloat16" else 0)
    else:
        divided = OFFLOADED if score.offload and score.worker.gpus else DIVIDED
        size = WHOLE[score.zero_stage] + divided[score.zero_stage] / score.group_size
    return Copy(
        model="student", bytes_a_weight=size, worker=score.worker.bundle, workers=score.groups * score.group_size,
        remedy="set score.group_size above 1 and score.zero_stage=3, which divides it among a group's ranks",
    )  # fmt: skip
