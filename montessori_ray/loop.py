"""The driver: Montessori-Instruct as a list of stages, run one after the other.

`stages_of` reads like the algorithm (paper section 3, docs/architecture.md). `run_loop` runs what is not finished yet:
the same call starts a run, continues a killed one, and shows a finished one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from montessori_ray.artifacts.run import Artifact, Run
from montessori_ray.cluster import Bundle, memory_of, require_room, unseen
from montessori_ray.config import Config, Score, Training
from montessori_ray.errors import ConfigError, RunError
from montessori_ray.memory import Role, require_memory
from montessori_ray.session import Session
from montessori_ray.stages import evaluate, grade, inputs, pair, score, split, synthesize, train, tune_teacher, win_rate
from montessori_ray.stages import schemas as columns
from montessori_ray.stages.base import AnySettings, Stage, bundles_of, identity_of
from montessori_ray.stages.judging import require_keys

SEEDS, REFERENCE, HELD_OUT = "inputs/seeds", "inputs/reference", "inputs/held_out"
TEACHER, STUDENT = "inputs/teacher", "inputs/student"
STUDENT_KEYS = ("student.chat_template", "student.max_length")
TRAINED_KEYS = (*STUDENT_KEYS, "student.lora")
SET_KEYS = ("synthesize.drop_truncated", "synthesize.duplicate_rouge_l")
"""What decides which responses may come into a set."""

WRITER_KEYS = tuple(
    f"synthesize.{name}"
    for name in (
        "prompt_style", "shots", "generated_shots", "n", "prompts_per_round", "instructions", "min_characters",
        "max_characters", "duplicate_rouge_l",
    )
)  # fmt: skip
"""What decides which instructions a teacher writes and which of them are kept."""

ENGINE_KEYS = ("pool.dtype", "pool.max_model_len")
"""What of the pool decides what a model writes: its rounding, and where an answer is cut for want of room."""

FIRST_WARMED = "iteration_00/warmed_student"
FIRST_PROBING, FIRST_INFLUENCE = "iteration_00/probing_set", "iteration_00/influence"
FIRST_FRESH = "iteration_00/fresh_set"
"""Fresh instructions of all teachers are scored against one student, so that only the teachers differ."""


class Teachers(NamedTuple):
    """The artifacts of the teachers that write instructions and that answer them."""

    writer: str
    answerer: str


def stages_of(config: Config) -> list[Stage]:
    """All stages of a run, in the order they run."""
    stages = _inputs()
    teacher = TEACHER
    fresh_sets: list[str] = []
    both_sets = config.split.warmup + config.split.probing + 2 * config.synthesize.n  # whole prompts overshoot
    for number in range(config.iterations):
        name = f"iteration_{number:02d}"
        teachers = _teachers(config, teacher)
        stages += _synthesize(config, name, teachers, both_sets)
        stages += _fresh(config, name, teachers, fresh_sets)
        stages += _warm_up(config, name)
        if config.tune_teacher.tunes != "nothing":
            stages += _tune(config, name, teacher)
            teacher = f"{name}/teacher"
    teachers = _teachers(config, teacher)
    samples = config.synthesize.n if config.training_select == "most_helpful" else 1
    stages += _synthesize(config, "final", teachers, config.training_set * samples)
    if teacher != TEACHER:
        stages += _fresh(config, "final", teachers, fresh_sets)
    stages += _train(config)
    stages += _evaluate(config, fresh_sets)
    stages += _judge(config)
    return stages


def _teachers(config: Config, teacher: str) -> Teachers:
    """Who writes and who answers, of the latest and the original teacher."""
    return Teachers(
        writer=TEACHER if config.tune_teacher.tunes == "response" else teacher,
        answerer=TEACHER if config.responses_by == "original" else teacher,
    )


def _inputs() -> list[Stage]:
    """What the user brings, checked and copied into the run."""
    rows = columns.INPUT_ROWS
    return [
        Stage(
            name="inputs/seeds", output=SEEDS, body=inputs.import_seeds, schema=rows,
            settings=("data.seeds", "synthesize.shots"),
        ),
        Stage(
            name="inputs/reference", output=REFERENCE, body=inputs.import_reference, schema=rows,
            settings=("data.reference",),
        ),
        Stage(
            name="inputs/held_out", output=HELD_OUT, body=inputs.import_held_out, schema=rows,
            inputs=(REFERENCE, SEEDS), settings=("data.held_out",),
        ),
        Stage(name="inputs/teacher", output=TEACHER, body=inputs.import_teacher, settings=("teacher",)),
        Stage(name="inputs/student", output=STUDENT, body=inputs.import_student, settings=("student",)),
    ]  # fmt: skip


def _synthesize(config: Config, name: str, teachers: Teachers, target: int) -> list[Stage]:
    """1. The teacher writes instructions and answers them."""
    return _write(config, name, teachers, target, prefix="", learn_shots=True)


def _fresh(config: Config, name: str, teachers: Teachers, fresh_sets: list[str]) -> list[Stage]:
    """What the teacher writes to prompts that every teacher is shown and nothing is trained on, to judge it by."""
    if not config.evaluate.fresh:
        return []
    fresh_sets.append(f"{name}/fresh_set")
    return [
        *_write(config, name, teachers, config.evaluate.fresh, prefix="fresh_", learn_shots=False),
        Stage(
            name=f"{name}/fresh_set", output=f"{name}/fresh_set", body=split.make_fresh_set, schema=columns.EXAMPLES,
            inputs=(f"{name}/fresh_responses", REFERENCE), settings=("evaluate.fresh", *SET_KEYS),
            rows=config.evaluate.fresh,
        ),
    ]  # fmt: skip


def _write(
    config: Config, name: str, teachers: Teachers, target: int, *, prefix: str, learn_shots: bool
) -> list[Stage]:
    instructions, responses = f"{name}/{prefix}instructions", f"{name}/{prefix}responses"
    stream = prefix or name  # fresh prompts are the same for every teacher
    sample = partial(
        synthesize.synthesize_instructions, name=f"{name}-{prefix}".replace("_-", "-").rstrip("-_"), stream=stream,
        target=target, learn_shots=learn_shots,
    )  # fmt: skip
    # Another target is other work: rounds follow from it.
    sizes: tuple[str, ...] = ("split.warmup", "split.probing")
    if prefix or name == "final":
        sizes = ("evaluate.fresh",) if prefix else ("training_set", "training_select")
    return [
        Stage(
            name=instructions, output=instructions, body=sample, schema=columns.INSTRUCTIONS, teacher=teachers.writer,
            inputs=(SEEDS, teachers.writer), settings=("seed", *WRITER_KEYS, *ENGINE_KEYS, *sizes), rows=target,
        ),
        Stage(
            name=responses, output=responses, body=synthesize.synthesize_responses, schema=columns.RESPONSES,
            teacher=teachers.answerer, inputs=(instructions, teachers.answerer), rows=target,
            settings=("seed", "synthesize.responses", *ENGINE_KEYS),
        ),
    ]  # fmt: skip


def _warm_up(config: Config, name: str) -> list[Stage]:
    """2. Warm the student up on some of the examples."""
    warmup_set, warmed = f"{name}/warmup_set", f"{name}/warmed_student"
    return [
        Stage(
            name=warmup_set, output=warmup_set, body=split.make_warmup_set, schema=columns.EXAMPLES,
            inputs=(f"{name}/responses", REFERENCE), settings=("split", *SET_KEYS), rows=config.split.warmup,
        ),
        Stage(
            name=f"{name}/warm_up", output=warmed, body=train.warm_up, inputs=(STUDENT, warmup_set),
            settings=("seed", "warm_up", *TRAINED_KEYS), bundles=training_bundles(config.warm_up),
        ),
    ]  # fmt: skip


def _tune(config: Config, name: str, teacher: str) -> list[Stage]:
    """3 to 5. Score the influence of the others, pair them, tune the teacher."""
    probing_set, candidates, influence = f"{name}/probing_set", f"{name}/candidates", f"{name}/influence"
    pairs, instructions = f"{name}/pairs", f"{name}/instructions"
    stages = [
        Stage(
            name=probing_set, output=probing_set, body=split.make_probing_set, schema=columns.EXAMPLES,
            inputs=(f"{name}/responses", REFERENCE), settings=("split", *SET_KEYS), rows=config.split.probing,
        ),
    ]  # fmt: skip
    probed, samples = probing_set, instructions
    if config.tune_teacher.tunes == "response":
        probed = samples = candidates
        stages.append(
            Stage(
                name=candidates, output=candidates, body=synthesize.synthesize_candidates, schema=columns.CANDIDATES,
                inputs=(probing_set, teacher), teacher=teacher, rows=config.split.probing,
                settings=(
                    "seed", "synthesize.responses", "synthesize.drop_truncated", *ENGINE_KEYS,
                    "tune_teacher.candidates", "split.probing",
                ),
            )
        )  # fmt: skip
    grades = _grade(config, name, probed)
    anchor = (TEACHER,) if config.tune_teacher.reference == "original" and teacher != TEACHER else ()
    return [
        *stages,
        Stage(
            name=f"{name}/score", output=influence, body=score.score_probing_set, schema=columns.INFLUENCE,
            inputs=(f"{name}/warmed_student", REFERENCE, probed), settings=("score", *STUDENT_KEYS),
            bundles=score_bundles(config), rows=config.split.probing,
        ),
        *grades,
        Stage(
            name=f"{name}/pair", output=pairs, body=pair.pair, schema=columns.PAIRS,
            inputs=(influence, samples, *(stage.output for stage in grades)), settings=("pair", "seed"),
        ),
        Stage(
            name=f"{name}/tune_teacher", output=f"{name}/teacher", body=tune_teacher.tune_teacher,
            inputs=(teacher, pairs, *anchor), settings=("seed", "tune_teacher", "synthesize.prompt_style"),
            bundles=training_bundles(config.tune_teacher),
        ),
    ]  # fmt: skip


def _grade(config: Config, name: str, probed: str) -> list[Stage]:
    """A judge's grades of the probed examples, where these are what pairs are made by."""
    if config.pair.signal != "llm_judge" or config.pair.judge is None:
        return []
    in_pool = TEACHER if config.pair.judge.model == "pool" else None
    return [
        Stage(
            name=f"{name}/grade", output=f"{name}/grades", body=grade.grade, schema=columns.GRADES,
            inputs=(probed, *([in_pool] if in_pool else [])), teacher=in_pool, settings=("pair.judge",),
            rows=config.split.probing,
        )
    ]  # fmt: skip


def _train(config: Config) -> list[Stage]:
    """6. Train the original student on what the last teacher wrote."""
    selection: tuple[str, ...] = ()
    stages = []
    if config.training_select == "most_helpful":
        selection = ("final/influence",)
        stages.append(
            Stage(
                name="final/score", output="final/influence", body=score.score, schema=columns.INFLUENCE,
                inputs=(FIRST_WARMED, REFERENCE, "final/responses"), settings=("score", *STUDENT_KEYS),
                bundles=score_bundles(config), rows=config.training_set * config.synthesize.n,
            )
        )  # fmt: skip
    return [
        *stages,
        Stage(
            name="final/training_set", output="final/training_set", body=split.make_training_set,
            schema=columns.EXAMPLES, inputs=("final/responses", REFERENCE, HELD_OUT, *selection),
            settings=("training_set", "training_tokens", *SET_KEYS), rows=config.training_set,
        ),
        Stage(
            name="final/train_student", output="final/student", body=train.train_student,
            inputs=(STUDENT, "final/training_set"), settings=("seed", "train_student", *TRAINED_KEYS),
            bundles=training_bundles(config.train_student),
        ),
    ]  # fmt: skip


def _evaluate(config: Config, fresh_sets: list[str]) -> list[Stage]:
    """7. Measure: losses of all students, influence of what each teacher writes afresh."""
    stages = []
    fresh_influence: tuple[str, ...] = ()
    if fresh_sets:
        fresh_influence = ("final/fresh_influence",)
        stages.append(
            Stage(
                name="final/score_fresh", output="final/fresh_influence", body=score.score,
                schema=columns.INFLUENCE, inputs=(FIRST_WARMED, REFERENCE, *fresh_sets),
                settings=("score", *STUDENT_KEYS), bundles=score_bundles(config),
                rows=config.evaluate.fresh * len(fresh_sets),
            )
        )  # fmt: skip
    stages.append(
        Stage(
            name="final/evaluate", output="final/evaluation", body=evaluate.evaluate, schema=columns.LOSSES,
            inputs=(REFERENCE, HELD_OUT, STUDENT, FIRST_WARMED, "final/student", *fresh_influence),
            settings=STUDENT_KEYS, bundles=(config.score.worker.bundle,),
        )
    )  # fmt: skip
    return stages


def _judge(config: Config) -> list[Stage]:
    """8. Have a judge compare what the original and the trained student answer to the held-out instructions."""
    if config.evaluate.judge is None:
        return []
    answers = {"original": STUDENT, "trained": "final/student"}
    in_pool = TEACHER if config.evaluate.judge.model == "pool" else None
    return [
        *(
            Stage(
                name=f"final/answer_{name}", output=f"final/answers_{name}", body=win_rate.answer_held_out,
                schema=columns.ANSWERS, inputs=(HELD_OUT, student), teacher=student,
                settings=("seed", "synthesize.responses", *ENGINE_KEYS, "student.chat_template"),
            )
            for name, student in answers.items()
        ),
        Stage(
            name="final/win_rate", output="final/win_rate", body=win_rate.judge_answers, schema=columns.VERDICTS,
            inputs=("final/answers_trained", "final/answers_original", *([in_pool] if in_pool else [])),
            teacher=in_pool, settings=("evaluate.judge",),
        ),
    ]  # fmt: skip


def training_bundles(training: Training) -> tuple[Bundle, ...]:
    return (training.worker.bundle,) * training.workers


def score_bundles(config: AnySettings) -> tuple[Bundle, ...]:
    return (config.score.worker.bundle,) * (config.score.groups * config.score.group_size)


def select(stages: Sequence[Stage], kinds: Sequence[str], iteration: int | None) -> list[Stage]:
    """The stages of these kinds, all where there are none, and of one iteration where one is given.

    Raises:
        ConfigError: there are none of one of these kinds.
    """
    place = "" if iteration is None else f"iteration_{iteration:02d}/"
    of_place = [stage for stage in stages if stage.name.startswith(place)]
    chosen = [stage for stage in of_place if not kinds or stage.kind in kinds]
    unknown = [kind for kind in kinds if all(stage.kind != kind for stage in of_place)]
    if unknown or not chosen:
        called = f" is called {' or '.join(unknown)}" if unknown else " is"
        where = "" if iteration is None else f" in iteration {iteration}"
        raise ConfigError(f"no stage{called}{where}; `montessori stages` lists them")
    return chosen


def check_run(stages: Sequence[Stage], config: AnySettings, run: Run) -> None:
    """Compare everything the run already holds with the settings, before anything is started.

    Raises:
        RunError: an artifact was made with other settings or inputs, or a model outside of the run has changed.
    """
    for stage in stages:
        _check(stage, config, run)
        if _is_input(stage):
            inputs.require_unchanged(run.artifact(stage.output))


def _check(stage: Stage, config: AnySettings, run: Run) -> None:
    """As `check_run`, of one stage; an input that is still to be made may become what it was."""
    artifact = run.artifact(stage.output)
    before = artifact.made_from()
    if before is not None:
        artifact.check(identity_of(stage, config, run, to_come=before.inputs))


def _fits(stage: Stage, config: AnySettings, run: Run) -> bool:
    try:
        _check(stage, config, run)
    except RunError:
        return False
    return True


def startable(chosen: Sequence[Stage], stages: Sequence[Stage], run: Run) -> tuple[list[Stage], dict[str, str]]:
    """The unfinished ones of the `chosen` stages that can run now, one after the other, and what those of later
    iterations wait for, by their names.

    Raises:
        RunError: one of the first unfinished iteration cannot run; names the stage that makes what is missing.
    """
    maker = {stage.output: stage.name for stage in stages}
    made = {stage.output for stage in stages if run.artifact(stage.output).manifest() is not None}
    ready: list[Stage] = []
    waiting: dict[str, str] = {}
    for stage in chosen:
        if stage.output in made:
            continue
        if missing := [name for name in stage.inputs if name not in made]:
            waiting[stage.name] = (
                f"{stage.name} needs {run.root}/{missing[0]}, which does not exist: run the stage {maker[missing[0]]} "
                "first (or the whole loop with `montessori run`)"
            )
        else:
            ready.append(stage)
            made.add(stage.output)
    first = next((_place_of(stage.name) for stage in chosen if stage in ready or stage.name in waiting), None)
    for name, sentence in waiting.items():
        if _place_of(name) == first:
            raise RunError(sentence)
    return ready, waiting


def require_shared(run: Run, nodes: Sequence[Bundle], models: Sequence[str] = ()) -> None:
    """Refuse what not all nodes of a cluster see: a bucket, since models are written to and read from ordinary folders,
    a run's folder, or one with a model.

    Raises:
        RunError: see above.
    """
    if len(nodes) < 2:
        return
    if not run.storage.is_local:
        raise RunError(
            f"run={run.root} is a bucket, the cluster has {len(nodes)} nodes, and a model that one of them writes is "
            "missing on the others: choose a folder that all nodes see (NFS, Lustre), or a single node"
        )
    if lacking := unseen([f"{run.root}/config.yaml", *models]):
        address, missing = lacking[0]
        raise RunError(
            f"{len(lacking)} of {len(nodes)} nodes do not see what the run needs, {address} has no {missing[0]}: "
            "run and models must lie in folders that all nodes see under one path (NFS, Lustre)"
        )


def run_loop(config: Config, *, kinds: Sequence[str] = (), iteration: int | None = None) -> Run:
    """Run all stages that are not finished, or those of the given kinds or iteration that can run; returns the run.

    Raises:
        UserError: something given does not fit; said before anything expensive starts wherever it can be known.
    """
    if config.compare is not None:
        raise ConfigError("the config compares arms (section `compare`): run it with `montessori compare`")
    stages = stages_of(config)
    return run_stages(config, stages, select(stages, kinds, iteration))


def run_stages(config: AnySettings, stages: Sequence[Stage], chosen: Sequence[Stage]) -> Run:
    """Run those of the `chosen` stages that are not finished and have their inputs, and before them all that check the
    user's input.

    Raises:
        UserError: as `run_loop`.
    """
    with Session(config) as session:
        session.console.make_room(chosen)
        check_run(stages, config, session.run)
        require_keys(chosen, config, session.run)
        session.accept_settings()
        for stage in filter(_is_input, stages):
            session.execute(stage)
        ready, waiting = startable(chosen, stages, session.run)
        if ready:
            inputs.require_whole(config, session.run.artifact(STUDENT))
            measured = [session.run.artifact(stage.output) for stage in stages if stage.output in (REFERENCE, HELD_OUT)]
            inputs.require_measurable(config, session.run.artifact(STUDENT), measured)
            _require_state(config, session.run.artifact(STUDENT))
            _connect(session, config, ready)
        for stage in chosen:
            if not _is_input(stage) and stage.name not in waiting:
                session.execute(stage)
        for sentence in waiting.values():
            session.note(sentence)
        session.finish(stages)
        return session.run


def _connect(session: Session, config: AnySettings, ready: Sequence[Stage]) -> None:
    """Connect to a cluster that can run these stages.

    Raises:
        UserError: it cannot.
    """
    nodes = session.connect()
    require_shared(session.run, nodes, _brought(session.run, config.score))
    asked = {stage.name: bundles_of(stage, config) for stage in ready}
    for name, bundles in asked.items():
        require_room(name, bundles, nodes)
    memory, weights = memory_of(nodes), _weights(session.run)
    for stage in ready:
        require_memory(stage, config, weights, memory)
    gpus = sum(node["GPU"] for node in nodes)
    every = [bundle for bundles in asked.values() for bundle in bundles]
    if gpus and every and not any(bundle.get("GPU") for bundle in every):
        session.note(f"the cluster has {gpus:g} GPUs, and no stage asks for one: see `worker.gpus` in its section")


def _require_state(config: AnySettings, student: Artifact) -> None:
    """Refuse an optimizer state that is none, before the student is warmed up for its sake; where nothing warms it up,
    a student without one and without a rate to step at.

    Raises:
        ModelError: names the folder.
    """
    warmed_up = isinstance(config, Config) or config.data.warm_up is not None
    if config.score.named_state is not None or not warmed_up:
        from montessori_ray.influence.scorer import state_of, step_rule  # late: see stages/__init__.py

        step_rule(state_of(student.model_path(), config.score), config.score)


def _brought(run: Run, score: Score) -> list[str]:
    """A file of each model and optimizer state a user brought: where a folder is one of links, what they lead to
    counts."""
    models = (run.artifact(name) for name in (TEACHER, STUDENT))
    files = [str(artifact.model_path() / "config.json") for artifact in models if artifact.manifest() is not None]
    return [*files, *([f"{score.named_state}/optimizer.json"] if score.named_state else [])]


def _weights(run: Run) -> dict[Role, int | None]:
    """Number of weights of both models, as far as it is known."""
    from montessori_ray.models import num_weights  # late: see stages/__init__.py

    brought: dict[Role, Artifact] = {"teacher": run.artifact(TEACHER), "student": run.artifact(STUDENT)}
    return {
        role: num_weights(artifact.model_path()) if artifact.manifest() is not None else None
        for role, artifact in brought.items()
    }


def _place_of(name: str) -> str:
    return name.rpartition("/")[0]


def _is_input(stage: Stage) -> bool:
    return _place_of(stage.name) == "inputs"


def made_from(name: str, stages: Sequence[Stage]) -> list[str]:
    """The artifact `name` and everything made from it, last made first.

    Raises:
        ConfigError: no stage makes an artifact of this name.
    """
    if name not in {stage.output for stage in stages}:
        raise ConfigError(f"no stage makes {name}; `montessori stages` lists the artifacts")
    made = [name]
    for stage in stages:
        if any(source in made for source in stage.inputs):
            made.append(stage.output)
    return made[::-1]


def state_of(stage: Stage, config: AnySettings, run: Run) -> str:
    """`done`, `begun` or `to do`; the first two also `with other settings`, which a run refuses."""
    artifact = run.artifact(stage.output)
    done = artifact.manifest() is not None
    if not done and not artifact.begun():
        return "to do"
    state = "done" if done else "begun"
    return state if _fits(stage, config, run) else f"{state}, with other settings"
