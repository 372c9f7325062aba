"""Scoring files of examples for any student, without the loop: what `montessori score` runs.

    run = score_files(ScoreFiles(run="scores", student=..., data=...))
    run.artifact("influence").rows()

A run directory like any other: the same call continues it, and `montessori_ray.stages.schemas.INFLUENCE` names its
columns.
"""

from __future__ import annotations

from montessori_ray.artifacts.run import Run
from montessori_ray.config import ScoreFiles
from montessori_ray.loop import (
    REFERENCE,
    STUDENT,
    STUDENT_KEYS,
    TRAINED_KEYS,
    run_stages,
    score_bundles,
    training_bundles,
)
from montessori_ray.stages import inputs, score, train
from montessori_ray.stages import schemas as columns
from montessori_ray.stages.base import Stage

EXAMPLES, WARMUP_SET, WARMED, INFLUENCE = "inputs/examples", "inputs/warmup_set", "warmed_student", "influence"


def score_files(job: ScoreFiles) -> Run:
    """Score every example that has no score yet; returns the run, whose artifact `influence` holds the rows.

    Raises:
        UserError: something given does not fit; said before anything expensive starts wherever it can be known.
    """
    stages = stages_of_scoring(job)
    return run_stages(job, stages, stages)


def stages_of_scoring(job: ScoreFiles) -> list[Stage]:
    """Check what the user brings, warm the student up where rows are given for that, score."""
    stages = [
        Stage(
            name=REFERENCE, output=REFERENCE, body=inputs.import_reference, schema=columns.INPUT_ROWS,
            settings=("data.reference",),
        ),
        Stage(
            name=EXAMPLES, output=EXAMPLES, body=inputs.import_examples, schema=columns.EXAMPLES,
            settings=("data.examples",),
        ),
        Stage(name=STUDENT, output=STUDENT, body=inputs.import_student, settings=("student",)),
    ]  # fmt: skip
    student = STUDENT
    if job.data.warm_up is not None:
        student = WARMED
        stages += [
            Stage(
                name=WARMUP_SET, output=WARMUP_SET, body=inputs.import_warmup_set, schema=columns.INPUT_ROWS,
                settings=("data.warm_up",),
            ),
            Stage(
                name="warm_up", output=WARMED, body=train.warm_up, inputs=(STUDENT, WARMUP_SET),
                settings=("seed", "warm_up", *TRAINED_KEYS), bundles=training_bundles(job.warm_up),
            ),
        ]  # fmt: skip
    stages.append(
        Stage(
            name="score",
            output=INFLUENCE,
            body=score.score,
            schema=columns.INFLUENCE,
            inputs=(student, REFERENCE, EXAMPLES),
            settings=("score", *STUDENT_KEYS),
            bundles=score_bundles(job),
        )
    )
    return stages
