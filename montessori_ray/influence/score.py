"""What scoring says about one probing example: a row of the table of influences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One row of the influence table. Losses and influence are None where the example is quarantined."""

    example_id: str
    loss_before: float | None = None
    """Reference loss of the baseline: of the warmed student, or of the student after a null step."""
    loss_after: float | None = None
    """Reference loss after one step on the example."""
    influence: float | None = None
    """loss_after - loss_before; negative helps the student."""
    influence_se: float | None = None
    """Standard error of the influence over the reference examples; None where the estimator does not know it."""
    estimator: str | None = None
    example_loss: float | None = None
    """Loss of the warmed student on the example itself."""
    step_seconds: float | None = None
    restore_seconds: float | None = None
    evaluate_seconds: float | None = None
    worker: str | None = None
    """Scoring group and node that computed it."""
    recheck_influence: float | None = None
    """`exact` in float32, for the examples that `score.recheck` picks."""
    recheck_influence_se: float | None = None
    """Its standard error over the reference examples."""
    quarantine: str | None = None
    """Why the example has no influence; None where it has one."""

    def row(self) -> dict[str, Any]:
        """The score as a row of plain values."""
        return asdict(self)
