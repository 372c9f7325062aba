"""How long scoring will take: `montessori calibrate` measures some points here, `montessori plan` multiplies.

    calibration = calibrate(config)
    calibration.seconds(points=1000, score=config.score)

All scoring groups run at once on workers of the kind they will have, so that cores and memory are shared as they will
be. Examples to score do not exist yet: reference rows stand in, cut to the longest texts the teacher may write.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import ray

from montessori_ray.artifacts.run import Run
from montessori_ray.cluster import require_room
from montessori_ray.comparison import all_stages
from montessori_ray.config import Config, said_content
from montessori_ray.config import Score as ScoreSettings
from montessori_ray.errors import ConfigError
from montessori_ray.loop import FIRST_WARMED, REFERENCE, STUDENT, check_run, require_shared, score_bundles
from montessori_ray.session import Session
from montessori_ray.stages.base import Stage
from montessori_ray.telemetry.console import clock

FILE = "calibration.json"
"""Where a run keeps it."""

MEASURE_S = 20.0
"""Seconds of points, about; at least `FEWEST` points and at most `MOST`."""
FEWEST, MOST = 2, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Seconds of the parts of a score stage, with all groups at work."""

    settings: dict[str, Any]
    """What was measured, as `measured_settings` says it."""
    start_s: float
    """Until a group can score: its processes, the student, the baselines, what a first point compiles and caches."""
    point_s: float
    """One point of one group."""
    recheck_start_s: float
    """Once a group, before the first point it scores again (`score.recheck`)."""
    recheck_s: float
    """A point scored again, beyond `point_s`."""
    stop_s: float
    """From the last point to the end of the groups' processes."""

    def seconds(self, points: int, score: ScoreSettings) -> float:
        """What a score stage of `points` examples will take."""
        leases = math.ceil(points / score.lease_size)
        mine = min(points, math.ceil(leases / score.groups) * score.lease_size)
        again = min(points, score.recheck) / score.groups
        rechecks = self.recheck_start_s + again * self.recheck_s if again else 0.0
        return self.start_s + mine * self.point_s + rechecks + self.stop_s

    def save(self, run: Run) -> None:
        run.storage.write(FILE, json.dumps(asdict(self), indent=1).encode())


def load_calibration(config: Config, run: Run) -> Calibration | None:
    """The run's calibration, if it has one that was made with these settings by this version."""
    found = json.loads(run.storage.read(FILE)) if run.storage.exists(FILE) else {}
    if found.keys() != {field.name for field in fields(Calibration)}:
        return None
    calibration = Calibration(**found)
    return calibration if calibration.settings == measured_settings(config) else None


def say_scoring(calibration: Calibration, stage: Stage, config: Config) -> str:
    """`3:20, 0.11 CPU-hours` of a stage that scores, nothing of another one."""
    if stage.kind not in ("score", "score_fresh") or stage.rows is None:
        return ""
    config = stage.config or config
    if calibration.settings != measured_settings(config):
        return ""  # an arm that scores in another way than was measured
    score = config.score
    seconds = calibration.seconds(stage.rows, score)
    kind, amount = ("GPU", score.worker.gpus) if score.worker.gpus else ("CPU", score.worker.cpus)
    return f"{clock(seconds)}, {seconds / 3600 * amount * score.groups * score.group_size:.2g} {kind}-hours"


def measured_settings(config: Config) -> dict[str, Any]:
    """The settings that decide how long a point takes."""
    return {
        "student": config.student.model_dump(mode="json"),
        "reference": config.data.reference.model_dump(mode="json") | {"path": said_content(config.data.reference.path)},
        "score": config.score.model_dump(mode="json"),
        "max_tokens": [config.synthesize.instructions.max_tokens, config.synthesize.responses.max_tokens],
    }


def calibrate(config: Config) -> Calibration:
    """Measure, and leave the result in the run; takes one to two minutes on two cores, longer for larger students.

    Raises:
        ConfigError: an adapter is to be trained and there is none yet.
        UserError: as `loop.run_loop`.
    """
    stages = all_stages(config)
    with Session(config) as session:
        check_run(stages, config, session.run)
        session.accept_settings()
        for stage in stages:
            if stage.name in (STUDENT, REFERENCE):
                session.execute(stage)
        job = _job(config, session.run)
        nodes = session.connect()
        require_shared(session.run, nodes)
        require_room("calibrate", score_bundles(config), nodes)
        calibration = _measure(job, config, session.run.train_storage())
        calibration.save(session.run)
        session.run.remove_trainings("calibrate")
        return calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every rank is told."""

    student: Path
    reference: tuple[Mapping[str, Any], ...]
    settings: ScoreSettings
    chat_template: str | None
    max_length: int
    max_tokens: tuple[int, int]
    """Of an instruction and of a response."""
    gate: Any = None
    """Handle of the `Gate`."""


def _job(config: Config, run: Run) -> Job:
    """The warmed student where the run has one, else the original one with fresh moments, which takes as long."""
    warmed = run.artifact(FIRST_WARMED)
    settings = config.score
    if warmed.manifest() is not None:
        student = warmed.model_path()
    elif config.student.lora is not None:
        raise ConfigError("student.lora is set and there is no adapter yet: run the stage warm_up, then calibrate")
    else:
        student = run.artifact(STUDENT).model_path()
        rate = settings.learning_rate or config.warm_up.optimizer.learning_rate
        settings = settings.model_copy(update={"learning_rate": rate, "optimizer_state": "none"})
    return Job(
        student=student, reference=tuple(run.artifact(REFERENCE).rows()), settings=settings,
        chat_template=config.student.chat_template, max_length=config.student.max_length,
        max_tokens=(config.synthesize.instructions.max_tokens, config.synthesize.responses.max_tokens),
    )  # fmt: skip


def _measure(job: Job, config: Config, storage: str) -> Calibration:
    """Run all groups at once and put together what they measured."""
    # Late, as in stages/: what only workers and drivers of a cluster need.
    from montessori_ray.training.ray_train import start_training, stop_training, training_result

    settings = job.settings
    job = replace(job, gate=Gate.remote(settings.groups))  # type: ignore[attr-defined]
    began = time.time()
    groups = [
        start_training(
            calibration_loop, {"job": job}, name=f"calibrate-{number}-{began:.0f}", storage=storage,
            workers=settings.group_size, worker=settings.worker, max_failures=0,
        )
        for number in range(settings.groups)
    ]  # fmt: skip
    found: list[dict[str, Any]] = []
    waiting = list(groups)
    try:
        while waiting:  # in the order they end: where one fails, the others wait at the gate for ever
            ended, waiting = ray.wait(waiting, timeout=0.5)
            found += [training_result(group, "calibrate") for group in ended]
    except KeyboardInterrupt:
        raise  # see `influence.driver.score_examples`
    except BaseException:
        for group in groups:
            stop_training(group)
        raise
    over = time.time()

    def mean(name: str) -> float:
        return fmean(group[name] for group in found)

    return Calibration(
        settings=measured_settings(config),
        start_s=mean("ready") - began - mean("point_s"),
        point_s=mean("point_s"),
        recheck_start_s=mean("recheck_start_s"),
        recheck_s=mean("recheck_s"),
        stop_s=over - max(group["end"] for group in found),
    )


@ray.remote(num_cpus=0)
class Gate:
    """Opens when all groups have arrived."""

    def __init__(self, groups: int) -> None:
        self._missing = groups

    def arrive(self) -> None:
        self._missing -= 1

    def is_open(self) -> bool:
        return self._missing <= 0


def calibration_loop(settings: dict[str, Any]) -> dict[str, float]:
    """The Ray Train loop of one rank; `settings["job"]` is a `Job`.

    Returns:
        ready, end (wall clock), point_s, recheck_start_s, recheck_s.
    """
    import torch.distributed as dist

    from montessori_ray.influence.scorer import Scorer

    job: Job = settings["job"]
    scorer = Scorer(
        job.student, job.reference, job.settings, chat_template=job.chat_template, max_length=job.max_length,
        worker="calibration",
    )  # fmt: skip
    examples = cycle(stand_ins(job, scorer.tokenizer))
    first_s = _timed(scorer, [next(examples)])
    ready = time.time()
    count = [min(MOST, max(FEWEST, round(MEASURE_S / first_s)))]
    if dist.get_rank() == 0:
        _wait_for_all(job.gate)
    dist.broadcast_object_list(count, src=0)  # all ranks go on together, and score as many
    point_s = _timed(scorer, list(islice(examples, count[0])))
    recheck_start_s = recheck_s = 0.0
    if job.settings.recheck:
        first_again, again = (_timed(scorer, [{**next(examples), "recheck": True}]) for _ in range(2))
        recheck_start_s, recheck_s = max(0.0, first_again - again), max(0.0, again - point_s)
    return {
        "ready": ready, "point_s": point_s, "recheck_start_s": recheck_start_s, "recheck_s": recheck_s,
        "end": time.time(),
    }  # fmt: skip


def _timed(scorer: Any, examples: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of scoring one of the examples."""
    start = time.perf_counter()
    for example in examples:
        scorer.score(example)
    return (time.perf_counter() - start) / len(examples)


def _wait_for_all(gate: Any) -> None:
    ray.get(gate.arrive.remote())
    while not ray.get(gate.is_open.remote()):
        time.sleep(0.1)


def stand_ins(job: Job, tokenizer: Any) -> list[dict[str, Any]]:
    """Reference rows as examples, instruction and response cut to what the teacher may write."""

    def cut(text: str, tokens: int) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens]))

    instruction, response = job.max_tokens
    return [
        {
            "example_id": str(number),
            "instruction": cut(row["instruction"], instruction),
            "response": cut(row["response"], response),
        }
        for number, row in enumerate(job.reference)
    ]
