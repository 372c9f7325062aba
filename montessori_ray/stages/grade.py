"""Grade: a judge's opinion of every probed example, for the paper's ablation of the preference signal."""

from __future__ import annotations

from typing import Any

from montessori_ray.stages.base import StageContext
from montessori_ray.stages.judging import commit_parts, open_judge


def grade(context: StageContext) -> dict[str, Any]:
    """Grades of the probed examples; continues with those that have none.

    Inputs: the probed examples, and the judge where it is in the pool.
    """
    from montessori_ray.evaluation.grading import grade_examples  # late: see stages/__init__.py

    settings = context.config.pair.judge
    assert settings is not None, "the stage exists where there is a judge"
    ask = open_judge(context, settings, position=1)
    graded = set(context.output.column("example_id"))
    examples = list(context.input(0).rows(["example_id", "instruction", "response"]))
    todo = (row for row in examples if row["example_id"] not in graded)
    commit_parts(context, grade_examples(todo, ask), len(examples), unit="grades")
    grades = context.output.column("grade")
    return {"judge": settings.model, "graded": len(grades) - grades.count(None), "without_grade": grades.count(None)}
