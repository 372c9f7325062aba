"""A comparison of arms: the loop several times in one run directory, sharing whatever does not differ.

An arm is the config with a few settings changed (`compare.arms`); a *cell* is an arm with one tuning seed and one
student seed. Every cell is the loop's own list of stages. A stage whose name, settings and inputs are those of another
cell's stage is the same stage: warm-up, scores and the original teacher's data are made once, whatever the number of
arms, and a second student seed adds one training. Of independent seeds each has a loop of its own, which arms share in
the same way. What is measured at the end, of all arms, is in `stages.compare`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from montessori_ray.artifacts.run import Run
from montessori_ray.config import Compare, Config, content_settings, describe, merge, nested
from montessori_ray.errors import ConfigError
from montessori_ray.loop import (
    ENGINE_KEYS,
    FIRST_FRESH,
    FIRST_INFLUENCE,
    FIRST_PROBING,
    FIRST_WARMED,
    HELD_OUT,
    REFERENCE,
    STUDENT,
    STUDENT_KEYS,
    WRITER_KEYS,
    run_stages,
    score_bundles,
    stages_of,
)
from montessori_ray.stages import compare, score
from montessori_ray.stages import schemas as columns
from montessori_ray.stages.base import Stage

MEASURED_TOGETHER = ("score_fresh", "evaluate")
"""Stages of the loop that a comparison has once, for all arms."""

RESULT = "compare/result"


TUNING, TRAINING = "tuning_{cell.tuning_seed}/", "student_{cell.student_seed}/"
SEEDED = {"pair": TUNING, "tune_teacher": TUNING, "train_student": TRAINING}
"""Settings that may have a seed of the cell, and the folder of what is made with it."""

LOOP = "loop_"
"""Begins the folder of an independent loop, which its seed ends; the first one lies where a single one does."""

DRAWN = ("random", "shuffled_labels")
"""Signals that are drawn, for every tuned teacher anew."""


@dataclass(frozen=True, slots=True)
class Cell:
    """An arm with one seed for tuning the teacher and one for training the student."""

    arm: str
    tuning_seed: int
    student_seed: int
    config: Config
    loop: str = ""
    """Folder of its loop, where independent seeds have one each."""


def run_comparison(config: Config) -> Run:
    """Run every stage of every arm that is not finished, and compare; the same call continues.

    Raises:
        UserError: as `run_loop`.
    """
    stages = stages_of_comparison(config)
    return run_stages(config, stages, stages)


def all_stages(config: Config) -> list[Stage]:
    """The stages of a comparison, where the config describes one, else those of the loop."""
    return stages_of(config) if config.compare is None else stages_of_comparison(config)


def stages_of_comparison(config: Config) -> list[Stage]:
    """The stages of all arms, each once, and those that compare them; in an order that changes teachers seldom.

    Raises:
        ConfigError: the config has no arms, or an arm's settings contradict each other.
    """
    shared = _Shared()
    outputs = [_outputs_of(cell, shared.place(cell)) for cell in cells_of(config)]
    outputs.sort(key=lambda cell: cell.arm != _require_arms(config).against)
    stages = _needed(shared.stages.values(), _measured_together(config, outputs))
    made = {stage.output: stage for stage in stages}
    probed = (_probed(config, made, loop) for loop in _loops(outputs))
    return [*_by_teacher(stages), *_measured_together(config, outputs, tuple(filter(None, probed)))]


def _loops(outputs: list[compare.CellOutputs]) -> list[str]:
    return list(dict.fromkeys(cell.loop for cell in outputs))


def _probed(config: Config, made: dict[str, Stage], loop: str) -> compare.Probed | None:
    """The original teacher's probing examples of a loop, if they were written as its fresh ones and are scored as the
    fresh ones of the loop's teachers will be."""
    influence, warmed, probing, fresh = (
        loop + name for name in (FIRST_INFLUENCE, FIRST_WARMED, FIRST_PROBING, FIRST_FRESH)
    )
    scored = made.get(influence)
    if scored is None or fresh not in made or {warmed, probing} - {*scored.inputs}:
        return None  # an arm that tunes responses, for one, scores several answers to one instruction
    alike = content_settings(scored.config or config, scored.settings) == content_settings(config, scored.settings)
    if not alike or _written(probing, made) != _written(fresh, made):
        return None
    return compare.Probed(influence=influence, fresh_set=fresh)


def _written(examples: str, made: dict[str, Stage]) -> list[Any]:
    """By which teachers and with which settings a set's instructions and responses were written."""
    responses = made[made[examples].inputs[0]]
    instructions = made[responses.inputs[0]]
    return [
        [stage.teacher, stage.config and content_settings(stage.config, keys)]
        for stage, keys in ((instructions, ("seed", *WRITER_KEYS, *ENGINE_KEYS)), (responses, responses.settings))
    ]


def cells_of(config: Config) -> list[Cell]:
    """All cells, in the order of their arms: what arms share lies with the first of them, so that a run can be compared
    with another arm, or go on with arms added at the end.

    Raises:
        ConfigError: as `stages_of_comparison`.
    """
    settings = _require_arms(config)
    independent = settings.seeds == "independent"
    return [
        Cell(
            name, tuning_seed, student_seed, _arm_config(config, name, tuning_seed, student_seed),
            loop=f"{LOOP}{tuning_seed}/" if independent and tuning_seed != settings.tuning_seeds[0] else "",
        )
        for name in settings.arms
        for tuning_seed, student_seed in settings.seeds_of_cells
    ]  # fmt: skip


def _require_arms(config: Config) -> Compare:
    if config.compare is None:
        raise ConfigError("there is nothing to compare: the config has no `compare` section with arms")
    return config.compare


def _arm_config(config: Config, name: str, tuning_seed: int, student_seed: int) -> Config:
    """The config of one cell."""
    changed = _require_arms(config).arms[name] | {
        "tune_teacher.seed": tuning_seed,
        "train_student.seed": student_seed,
    }
    if _require_arms(config).seeds == "independent":
        changed["seed"] = tuning_seed
    tree = merge(config.model_dump(exclude={"compare"}), nested(changed), Config)
    try:
        cell = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"compare.arms.{name}: {describe(error)}") from None
    if cell.evaluate.fresh <= cell.synthesize.n:
        raise ConfigError(
            f"compare.arms.{name}: evaluate.fresh is {cell.evaluate.fresh}, and a comparison needs fresh instructions "
            f"of at least two few-shot prompts: set it above synthesize.n = {cell.synthesize.n}"
        )
    if cell.pair.signal not in DRAWN:
        return cell
    return cell.model_copy(update={"pair": cell.pair.model_copy(update={"seed": tuning_seed})})


class _Shared:
    """The stages placed so far."""

    def __init__(self) -> None:
        self._by_recipe: dict[str, Stage] = {}
        self._seeds: dict[str, frozenset[str]] = {}
        self.stages: dict[str, Stage] = {}
        """By output."""

    def place(self, cell: Cell) -> dict[str, str]:
        """Add a cell's stages unless they are there; returns where each artifact of its loop lies."""
        lies: dict[str, str] = {}
        recipes: dict[str, str] = {}
        for stage in stages_of(cell.config):
            if stage.kind in MEASURED_TOGETHER:
                continue
            recipe = _recipe(stage, cell.config, [recipes[name] for name in stage.inputs])
            recipes[stage.output] = recipe
            if recipe not in self._by_recipe:
                self._by_recipe[recipe] = self._placed(stage, cell, lies)
            lies[stage.output] = self._by_recipe[recipe].output
        return lies

    def _placed(self, stage: Stage, cell: Cell, lies: dict[str, str]) -> Stage:
        """The stage in a folder that says what sets it apart: nothing or its loop, its arm, or its arm and seeds."""
        inputs = tuple(lies[name] for name in stage.inputs)
        own = {
            folder
            for section, folder in SEEDED.items()
            if section in stage.settings and getattr(cell.config, section).seed is not None
        }
        if cell.loop and "seed" in stage.settings:
            own.add(LOOP)
        seeds = frozenset(own).union(*(self._seeds[name] for name in inputs))
        folder = cell.loop if LOOP in seeds else ""
        if seeds - {LOOP} or folder + stage.output in self.stages:
            own_seeds = (name.format(cell=cell) for name in (TUNING, TRAINING) if name in seeds)
            folder += f"arms/{cell.arm}/" + "".join(own_seeds)
        placed = replace(
            stage,
            name=folder + stage.name,
            output=folder + stage.output,
            inputs=inputs,
            teacher=lies[stage.teacher] if stage.teacher else None,
            config=cell.config,
        )
        self._seeds[placed.output] = seeds
        self.stages[placed.output] = placed
        return placed


def _recipe(stage: Stage, config: Config, inputs: list[str]) -> str:
    """What a stage's output is made from; equal for stages that would make the same."""
    made_from = [stage.name, content_settings(config, stage.settings), inputs]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()


def _needed(stages: Iterable[Stage], last: list[Stage]) -> list[Stage]:
    """Those of the stages whose output the last ones are made from, directly or not, in their order."""
    needed = {name for stage in last for name in stage.inputs}
    kept: list[Stage] = []
    for stage in reversed(list(stages)):
        if stage.output in needed:
            needed.update(stage.inputs)
            kept.append(stage)
    return kept[::-1]


def _by_teacher(stages: list[Stage]) -> list[Stage]:
    """An order in which inputs are made first and the pool changes its teacher seldom."""
    ordered: list[Stage] = []
    waiting = list(stages)
    hosted: str | None = None
    while waiting:
        made = {stage.output for stage in ordered}
        ready = [stage for stage in waiting if made.issuperset(stage.inputs)]
        to_come = Counter(stage.teacher for stage in waiting if not _reachable(stage, made, waiting))
        stage = min(ready, key=partial(_cost, hosted=hosted, to_come=to_come))
        hosted = stage.teacher or (None if stage.bundles else hosted)
        waiting.remove(stage)
        ordered.append(stage)
    return ordered


def _reachable(stage: Stage, made: set[str], waiting: list[Stage]) -> bool:
    """Whether all that a stage needs is made, or is made by the teacher it runs with."""
    with_its_teacher = {other.output for other in waiting if other.teacher == stage.teacher}
    return made.union(with_its_teacher).issuperset(stage.inputs)


def _cost(stage: Stage, *, hosted: str | None, to_come: Counter[str | None]) -> tuple[int, int]:
    """Of running a stage next: nothing changes, the pool gives way to workers, or it hosts another teacher - the one
    that has least work still to come first, so that the others are hosted when theirs is there."""
    if stage.teacher is None:
        return (1 if stage.bundles else 0, 0)
    return (0, 0) if stage.teacher == hosted else (2, to_come[stage.teacher])


def _outputs_of(cell: Cell, lies: dict[str, str]) -> compare.CellOutputs:
    """What a comparison reads of a cell."""
    tuned = cell.config.tune_teacher.tunes != "nothing"
    name = "final" if tuned else "iteration_00"
    return compare.CellOutputs(
        arm=cell.arm,
        tuning_seed=cell.tuning_seed,
        loop=cell.loop,
        fresh_instructions=lies[f"{name}/fresh_instructions"],
        fresh_responses=lies[f"{name}/fresh_responses"],
        fresh_set=lies[f"{name}/fresh_set"],
        training_set=lies["final/training_set"],
        student=lies["final/student"],
    )


def _measured_together(
    config: Config, outputs: list[compare.CellOutputs], probed: tuple[compare.Probed, ...] = ()
) -> list[Stage]:
    """Losses of all students, influence of what all teachers write afresh, and the differences between the arms."""

    def distinct(artifacts: Iterator[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(artifacts))

    students = distinct(cell.student for cell in outputs)
    data = distinct(
        artifact for cell in outputs for artifact in (cell.fresh_instructions, cell.fresh_responses, cell.training_set)
    )
    settings = _require_arms(config)
    fresh = [stage for loop in _loops(outputs) for stage in _fresh_of(config, outputs, loop)]
    influences = tuple(stage.output for stage in fresh if stage.kind == "score_fresh")
    compared: Any = partial(
        compare.compare, cells=tuple(outputs), against=settings.against, probed=probed,
        independent=settings.seeds == "independent",
    )  # fmt: skip
    return [
        *fresh,
        Stage(
            name="compare/measure_students", output="compare/losses", body=compare.measure_students,
            schema=columns.LOSSES, inputs=(REFERENCE, HELD_OUT, STUDENT, *students), settings=STUDENT_KEYS,
            bundles=(config.score.worker.bundle,),
        ),
        Stage(
            name=RESULT, output=RESULT, body=compared, schema=columns.COMPARISON, settings=("compare",),
            inputs=(
                "compare/losses", REFERENCE, HELD_OUT, *influences, *data, *(found.influence for found in probed),
            ),
        ),
    ]  # fmt: skip


def _fresh_of(config: Config, outputs: list[compare.CellOutputs], loop: str) -> list[Stage]:
    """Influence of what a loop's teachers write afresh on the loop's warmed student."""
    fresh_sets = tuple(dict.fromkeys(cell.fresh_set for cell in outputs if cell.loop == loop))
    rows = config.evaluate.fresh * len(fresh_sets)
    together = f"{loop}compare/fresh_set"
    return [
        Stage(
            name=together, output=together, body=compare.collect_fresh, schema=columns.EXAMPLES, inputs=fresh_sets,
            rows=rows,
        ),
        Stage(
            name=f"{loop}compare/score_fresh", output=f"{loop}{compare.FRESH_INFLUENCE}", body=score.score,
            schema=columns.INFLUENCE, inputs=(loop + FIRST_WARMED, REFERENCE, together),
            settings=("score", *STUDENT_KEYS), bundles=score_bundles(config), rows=rows,
        ),
    ]  # fmt: skip
