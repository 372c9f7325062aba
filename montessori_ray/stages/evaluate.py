"""Evaluate: did the student get better, and did the teacher learn what helps?"""

from __future__ import annotations

from math import hypot, isfinite
from typing import Any

import ray

from montessori_ray.errors import ModelError
from montessori_ray.evaluation import fresh
from montessori_ray.evaluation.statistics import grouped_mean, mean_se
from montessori_ray.stages.base import StageContext

SETS = ("reference", "held_out")


def evaluate(context: StageContext) -> dict[str, Any]:
    """Losses of every student on the reference and held-out rows, and what fresh instructions do.

    Inputs: reference, held-out, original student, warmed student, trained student, and the fresh influence if any.
    """
    losses = losses_of_students(context, {"original": 2, "warmed": 3, "trained": 4})
    details: dict[str, Any] = {"losses": _loss_summary(losses)}
    if len(context.stage.inputs) > 5:
        details["fresh"] = _fresh_summary(context)
    return details


def losses_of_students(context: StageContext, students: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """Commit (schema LOSSES) and return the loss of every row: student -> set -> losses in the order of the rows.

    The first two inputs are the reference and held-out rows; `students` says which input is which student.

    Raises:
        ModelError: a student has a loss that is not finite.
    """
    context.output.discard_parts()
    sets = {name: list(context.input(position).rows()) for position, name in enumerate(SETS)}
    losses: dict[str, dict[str, list[float]]] = {}
    measured = {student: _start_measuring(context, position, sets) for student, position in students.items()}
    waiting = list(measured.values())
    while waiting:
        context.progress.update(len(students) - len(waiting), len(students), unit="students")
        done, waiting = ray.wait(waiting)
        ray.get(done)  # an error is raised when it happens
    for student in students:
        values = ray.get(measured[student])
        if not all(map(isfinite, values)):
            model = context.stage.inputs[students[student]]
            raise ModelError(
                f"{model}, the {student} student, has a loss that is not finite: its training broke it in its last "
                f"step. Remove it (`montessori stages --remove {model}`) and train with a lower learning rate"
            )
        first = len(sets[SETS[0]])
        losses[student] = {SETS[0]: values[:first], SETS[1]: values[first:]}
        for name, rows in sets.items():
            context.append(
                {
                    "student": student,
                    "set": name,
                    "example_id": row["example_id"],
                    "category": row["category"],
                    "loss": loss,
                }
                for row, loss in zip(rows, losses[student][name], strict=True)
            )
    context.progress.update(len(students), len(students), unit="students")
    return losses


def _start_measuring(context: StageContext, position: int, sets: dict[str, list[dict[str, Any]]]) -> Any:
    """Per-row losses of one student on all sets, one after the other, to come from a worker of the scoring kind."""
    from montessori_ray.evaluation.losses import row_losses  # late: see stages/__init__.py

    student, score = context.config.student, context.config.score
    worker = score.worker
    measure: Any = ray.remote(num_cpus=worker.cpus, num_gpus=worker.gpus)(row_losses)  # type: ignore[arg-type]
    rows = [row for name in SETS for row in sets[name]]
    return measure.remote(
        str(context.model(position)), rows, chat_template=student.chat_template, max_length=student.max_length,
        tokens_a_pass=score.reference_tokens, threads=worker.threads, gpu=worker.gpus > 0,
    )  # fmt: skip


def _loss_summary(losses: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Mean loss with standard error over rows; the change from the original student is paired by row."""
    summary: dict[str, Any] = {}
    for student, by_set in losses.items():
        summary[student] = {}
        for name, values in by_set.items():
            entry: dict[str, Any] = mean_se(values)
            if student != "original":
                original = losses["original"][name]
                entry["change"] = mean_se([now - before for now, before in zip(values, original, strict=True)])
            summary[student][name] = entry
    return summary


def _fresh_summary(context: StageContext) -> dict[str, Any]:
    """Influence of each teacher's fresh instructions; the change is from the original teacher's."""
    teachers = list(fresh.by_place(context.input(5).rows(fresh.COLUMNS)).values())
    summary: dict[str, Any] = {}
    for number, groups in enumerate(teachers):
        mean = grouped_mean(groups)
        entry: dict[str, Any] = {
            "mean": mean.mean,
            "se": mean.se,
            "scored": sum(map(len, groups)),
            "share_helpful": fresh.share_helpful(groups),
        }
        if number:
            first = grouped_mean(teachers[0])
            entry["change"] = {"mean": mean.mean - first.mean, "se": hypot(mean.se, first.se)}
        summary[f"tuned {number}x" if number else "original"] = entry
    return summary
