"""Compare: differences between arms, with their intervals and the sentence they allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from montessori_ray.errors import DataError
from montessori_ray.evaluation import fresh
from montessori_ray.evaluation.diversity import SAMPLE, describe_data
from montessori_ray.evaluation.fresh import Groups
from montessori_ray.evaluation.statistics import (
    Interval,
    grouped_mean,
    mean_interval,
    paired_difference,
    verdict,
    welch_difference,
)
from montessori_ray.stages.base import StageContext
from montessori_ray.stages.evaluate import SETS, losses_of_students

HELD_OUT = "held_out"

FRESH_INFLUENCE = "compare/fresh_influence"
"""Influences of what the teachers of a loop wrote afresh, in the loop's folder."""

OF = "|"
"""Between a fresh set's place and an example's id, which is unique among the examples of one teacher only."""


@dataclass(frozen=True, slots=True)
class CellOutputs:
    """Where the artifacts of an arm with one tuning seed and one student seed lie."""

    arm: str
    tuning_seed: int
    loop: str
    """Folder of its loop, where there are several."""
    fresh_instructions: str
    fresh_responses: str
    fresh_set: str
    training_set: str
    student: str


def collect_fresh(context: StageContext) -> dict[str, Any]:
    """The fresh examples of a loop's teachers in one set, so that they are scored against one student in one go."""
    context.output.discard_parts()
    for position, name in enumerate(context.stage.inputs):
        context.append(
            row | {"example_id": f"{name}{OF}{row['example_id']}", "prompt_id": f"{name}{OF}{row['prompt_id']}"}
            for row in context.input(position).rows()
        )
    return {"sets": len(context.stage.inputs)}


def measure_students(context: StageContext) -> dict[str, Any]:
    """Losses of the original and every arm's students on the reference and held-out rows."""
    losses_of_students(context, {name: 2 + number for number, name in enumerate(context.stage.inputs[2:])})
    return {"students": len(context.stage.inputs) - 2}


@dataclass(frozen=True, slots=True)
class Probed:
    """A teacher's probing examples whose influence is that of fresh ones: the same student, settings and rows."""

    influence: str
    """Where their influences lie."""
    fresh_set: str
    """Where the fresh examples of the same teacher lie."""


def compare(
    context: StageContext,
    *,
    cells: Sequence[CellOutputs],
    against: str,
    probed: Sequence[Probed] = (),
    independent: bool = False,
) -> dict[str, Any]:
    """One row for each arm and measure; the details hold the same and what the arms' data are like.

    Inputs: losses of the students, reference and held-out rows, then the influences of the fresh examples, what the
    arms' teachers wrote afresh and the training sets, and the influences of `probed`.

    Args:
        context: of the stage.
        cells: all cells of all arms.
        against: the arm that all others are compared with.
        probed: of each loop; counts as fresh, since nothing was chosen by it: the original teacher is compared with
            every tuned one, so what is known of it bounds what is known of any difference. Its prompts show earlier
            generations too, fresh ones seeds alone, so the same is told without it as well.
        independent: whether every tuning seed has a loop of its own: then fresh influences, each measured on the loop's
            own warmed student, are compared loop by loop, and their interval holds for other loops.
    """
    context.output.discard_parts()
    by_arm: dict[str, list[CellOutputs]] = {}
    for cell in cells:
        by_arm.setdefault(cell.arm, []).append(cell)
    losses = {measure: _losses(context, measure) for measure in SETS}
    categories = _categories(context)
    alone = _fresh_influences(context, cells)
    influence = alone | {found.fresh_set: [*alone[found.fresh_set], *_probed(context, found)] for found in probed}
    rows: list[dict[str, Any]] = []
    for arm, own in by_arm.items():
        for measure in SETS:
            rows.append(_loss_row(arm, measure, own, by_arm[against], losses[measure]))
        for category, chosen in categories.items():
            row = _loss_row(arm, HELD_OUT, own, by_arm[against], losses[HELD_OUT], chosen)
            rows.append(row | {"category": category})
        differ = _by_loop if independent else _by_prompt
        rows.append(_fresh_row(arm, "fresh_influence", own, by_arm[against], influence, differ))
        if probed:
            rows.append(_fresh_row(arm, "fresh_influence_alone", own, by_arm[against], alone, differ))
    context.append(rows)
    sample = _sample(context, cells)
    return {
        "against": against,
        "independent": independent,
        "measures": rows,
        "data": {arm: _data(context, own, sample) for arm, own in by_arm.items()},
    }


def _fresh_influences(context: StageContext, cells: Sequence[CellOutputs]) -> dict[str, Groups]:
    """Fresh set -> influences of its examples by prompt, each on the warmed student of its loop."""
    found: dict[str, Groups] = {}
    for loop in dict.fromkeys(cell.loop for cell in cells):
        rows = context.run.artifact(loop + FRESH_INFLUENCE).rows(fresh.COLUMNS)
        found |= fresh.by_teacher(rows, lambda example_id: example_id.split(OF)[0])
    return found


def _probed(context: StageContext, probed: Probed) -> Groups:
    rows = context.run.artifact(probed.influence).rows(fresh.COLUMNS)
    return fresh.by_teacher(rows, lambda _: "probed").get("probed", [])


def _losses(context: StageContext, measure: str) -> dict[str, list[float]]:
    """Row losses of every student, in the same order of rows."""
    losses: dict[str, list[float]] = {}
    for row in context.input(0).rows(["student", "set", "loss"]):
        if row["set"] == measure:
            losses.setdefault(row["student"], []).append(row["loss"])
    return losses


def _categories(context: StageContext) -> dict[str, list[int]]:
    """Category -> positions of its held-out rows, the largest first; of those with two rows, if there are several."""
    of_rows = context.input(2).column("category")
    counts = Counter(filter(None, of_rows)).most_common()
    if len(counts) < 2:
        return {}
    return {name: [at for at, of in enumerate(of_rows) if of == name] for name, count in counts if count > 1}


def _loss_row(
    arm: str,
    measure: str,
    own: list[CellOutputs],
    other: list[CellOutputs],
    losses: dict[str, list[float]],
    chosen: list[int] | None = None,
) -> dict[str, Any]:
    """Loss of an arm's students, and the difference paired by seeds and row; `chosen` positions of rows or all."""
    rows = slice(None) if chosen is None else chosen
    mine, theirs = ([np.array(losses[cell.student])[rows] for cell in cells] for cells in (own, other))
    difference = None if own is other else paired_difference(_by_seeds(own, mine), _by_seeds(other, theirs))
    students = {cell.student: values for cell, values in zip(own, mine, strict=True)}
    models = [float(values.mean()) for values in students.values()]
    of_rows = np.mean(mine, axis=0).tolist()
    return _row(arm, f"{measure}_loss", mean_interval(of_rows), len(of_rows), difference, models)


def _by_seeds(cells: list[CellOutputs], losses: list[Any]) -> Any:
    """Losses of the cells' rows as (tuning seeds, student seeds, rows): students of one teacher are not independent."""
    by_tuning: dict[int, list[Any]] = {}
    for cell, values in zip(cells, losses, strict=True):
        by_tuning.setdefault(cell.tuning_seed, []).append(values)
    return np.array(list(by_tuning.values()))


def _fresh_row(
    arm: str,
    measure: str,
    own: list[CellOutputs],
    other: list[CellOutputs],
    found: dict[str, Groups],
    differ: Callable[[list[Groups], list[Groups]], Interval],
) -> dict[str, Any]:
    """Mean influence of what an arm's teachers write afresh."""
    mine, theirs = (_by_teacher(cells, found) for cells in (own, other))
    difference = None if own is other else differ(mine, theirs)
    together = _together(mine)
    models = [grouped_mean(groups).mean for groups in mine]
    return _row(arm, measure, grouped_mean(together), sum(map(len, together)), difference, models) | {
        "share_helpful": fresh.share_helpful(together)
    }


def _by_teacher(cells: list[CellOutputs], found: dict[str, Groups]) -> list[Groups]:
    """Influences of each teacher of these cells, in their order.

    Raises:
        DataError: none of a teacher's examples has a score.
    """
    names = list(dict.fromkeys(cell.fresh_set for cell in cells))
    for name in names:
        if name not in found:
            raise DataError(
                f"no example of {name} has a score, so its teacher cannot be compared: the report of the run says why "
                "they were quarantined; leave that arm or seed out of `compare`"
            )
    return [found[name] for name in names]


def _together(teachers: list[Groups]) -> Groups:
    return [group for groups in teachers for group in groups]


def _by_prompt(mine: list[Groups], theirs: list[Groups]) -> Interval:
    """For other prompts of these teachers; their texts differ, so nothing is paired."""
    return welch_difference(_together(mine), _together(theirs))


def _by_loop(mine: list[Groups], theirs: list[Groups]) -> Interval:
    """For other loops: the differences of the teachers' means in each are what is averaged."""
    pairs = zip(mine, theirs, strict=True)
    return mean_interval([grouped_mean(own).mean - grouped_mean(other).mean for own, other in pairs])


def _row(
    arm: str, measure: str, value: Interval, count: int, difference: Interval | None, models: list[float]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": arm, "measure": measure, "value": value.mean, "value_se": value.se, "count": count,
        "models": len(models), "value_by_model": models, "category": None,
        "difference": None, "low": None, "high": None, "difference_se": None, "share_helpful": None, "sentence": None,
    }  # fmt: skip
    if difference is not None:
        row |= {
            "difference": difference.mean, "low": difference.low, "high": difference.high,
            "difference_se": difference.se, "sentence": verdict(difference.mean, difference.low, difference.high),
        }  # fmt: skip
    return row


def _sample(context: StageContext, cells: Sequence[CellOutputs]) -> int:
    """Instructions of each teacher that variety is measured on: as many as every teacher of every arm has."""
    written = (context.run.artifact(cell.fresh_instructions).require() for cell in cells)
    return min(SAMPLE, *(int(manifest.details["kept"]) for manifest in written))


def _data(context: StageContext, cells: list[CellOutputs], sample: int) -> dict[str, Any]:
    """What the arm's teachers write afresh (rejections, variety, lengths), and how much its students saw."""

    def rows(names: Iterable[str]) -> list[list[dict[str, Any]]]:
        return [list(context.run.artifact(name).rows()) for name in dict.fromkeys(names)]

    others = {name: context.input(1 + position).column("instruction") for position, name in enumerate(SETS)}
    sets = [context.run.artifact(name).require() for name in dict.fromkeys(cell.training_set for cell in cells)]
    return {
        "fresh": describe_data(
            rows(cell.fresh_instructions for cell in cells),
            chain.from_iterable(rows(cell.fresh_responses for cell in cells)),
            others,
            sample=sample,
        ),
        "training_rows": [manifest.rows for manifest in sets],
        "training_tokens": [manifest.details["tokens"] for manifest in sets],
    }
