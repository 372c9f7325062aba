"""Tune the teacher: DPO on the preference pairs (paper section 3.3)."""

from __future__ import annotations

from typing import Any

from montessori_ray.stages.base import StageContext


def tune_teacher(context: StageContext) -> dict[str, Any]:
    """The tuned teacher, a directory vLLM loads; inputs are the teacher that wrote the pairs, the pairs, and the
    reference policy where that is another teacher."""
    from montessori_ray.training.dpo import tune_teacher as tune  # late: see stages/__init__.py

    settings = context.config.tune_teacher
    # A response may have been cut, and a prefilled instruction ends with a stop text that is part of it.
    append_eos = settings.tunes == "instruction" and context.config.synthesize.prompt_style == "paper"
    with context.output.model_writer() as folder:
        return tune(
            model=context.model(0), reference=context.model(2) if len(context.stage.inputs) > 2 else None,
            pairs=context.input(1).part_paths(), output=str(folder), settings=settings,
            seed=settings.seed if settings.seed is not None else context.config.seed, name=context.train_name,
            storage=context.run.train_storage(), progress=context.progress, append_eos=append_eos,
        )  # fmt: skip
