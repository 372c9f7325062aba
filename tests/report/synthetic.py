"""A run directory as the stages write it, with made-up rows: nothing is sampled, scored or trained."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from montessori_ray.artifacts.run import Run
from montessori_ray.comparison import all_stages
from montessori_ray.config import Config, ScoreFiles, load_config, score_settings
from montessori_ray.loop import stages_of
from montessori_ray.scoring import stages_of_scoring
from montessori_ray.stages.base import AnySettings, Stage, identity_of
from montessori_ray.stages.score import summarise
from montessori_ray.telemetry.events import EventLog

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
CATEGORIES = ("explain", "arithmetic", "rewrite", "list")
Rows = list[dict[str, Any]]

HOSTILE = '<script>console.error("instructions are text")</script> & "quotes"'
"""An instruction that must be shown, not run."""


class RunWriter:
    """Writes the artifacts of the stages of a run, in order, up to where it is told."""

    def __init__(self, config: AnySettings, stages: list[Stage], tuned_helps: float) -> None:
        self.config = config
        self.stages = stages
        self.run = Run(config.run)
        self.tuned_helps = tuned_helps
        """How much further below zero the influence of a tuned teacher's fresh instructions lies, in spreads."""
        self.score_se = 2e-4
        """Standard error of every score."""
        self._rng = np.random.default_rng(7)
        self._rows: dict[str, Rows] = {}
        self._clock = 1_800_000_000.0

    def write(self, until: str | None = None) -> Run:
        """All stages before the one called `until`."""
        tree = yaml.safe_dump(self.config.model_dump(mode="json"))
        self.run.storage.write("config.yaml", tree.encode())
        events = EventLog(self.run.storage)
        events.write("session_started", run=self.run.root, pid=1)
        for stage in self.stages:
            if stage.name == until:
                events.write("stage_started", stage=stage.name)
                break
            self._finish(stage, events)
        else:
            events.write("session_ended", error=None)
        return self.run

    def _finish(self, stage: Stage, events: EventLog) -> None:
        rows, details = self._content(stage)
        self._rows[stage.output] = rows
        artifact = self.run.artifact(stage.output)
        artifact.begin(identity_of(stage, self.config, self.run))
        events.write("stage_started", stage=stage.name)
        for points in self._curves(stage):
            events.write("metrics", stage=stage.name, points=points)
        if stage.schema is None:
            with artifact.model_writer() as folder:
                (folder / "config.json").write_text('{"model_type": "llama"}')
                (folder / "model.safetensors").write_bytes(stage.name.encode())
        elif rows:
            artifact.append(pa.Table.from_pylist(rows[: len(rows) // 2], schema=stage.schema))
            artifact.append(pa.Table.from_pylist(rows[len(rows) // 2 :], schema=stage.schema))
        columns = {field.name: str(field.type) for field in stage.schema} if stage.schema else None
        seconds = float(self._rng.gamma(2, 30))
        artifact.commit(details=details, seconds=seconds, columns=columns, peak_memory_gb=4.0)
        events.write("stage_finished", stage=stage.name, rows=len(rows), seconds=seconds, details=details)

    def _content(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        kind = stage.kind.removeprefix("fresh_")
        make: Callable[[Stage], tuple[Rows, dict[str, Any]]] | None = getattr(self, f"_{kind}", None)
        return make(stage) if make else ([], {})

    # -- inputs -----------------------------------------------------------------------------------------------------

    def _input_rows(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        rows = [
            {
                "example_id": f"{stage.name}-{index}",
                "instruction": f"Say {stage.name} {index}.",
                "response": f"{index}",
                "category": CATEGORIES[index % len(CATEGORIES)],
            }
            for index in range(24)
        ]
        return rows, {"categories": len(CATEGORIES)}

    _seeds = _reference = _held_out = _input_rows

    def _examples(self, _: Stage) -> tuple[Rows, dict[str, Any]]:
        return self._written("mine", 60), {"categories": 0}

    # -- synthesis --------------------------------------------------------------------------------------------------

    def _written(self, name: str, amount: int) -> Rows:
        rows = [
            {
                "example_id": f"{name}-p{index // 4:06d}-{index % 4}",
                "prompt_id": f"{name}-p{index // 4:06d}",
                "instruction": f"Write about topic {index} of {name}.",
                "response": f"Topic {index} is a topic of {name}, and there is more to say about it.",
            }
            for index in range(amount)
        ]
        rows[0]["instruction"] = HOSTILE
        return rows

    def _instructions(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        place, _, kind = stage.output.partition("/")
        name = f"{place}-fresh" if kind.startswith("fresh_") else place
        statuses = ["kept"] * 6 + ["duplicate", "unparsed"]
        rows = [
            {
                **row,
                "prompt": "A few-shot prompt.",
                "raw_output": f"{row['instruction']}</instruction>",
                "teacher_digest": "0" * 64,
                "status": statuses[index % len(statuses)],
                "round": 0,
            }
            for index, row in enumerate(self._written(name, 128))
        ]
        counts = {status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(statuses)}
        return rows, {"samples": len(rows), "kept": counts["kept"], "statuses": counts}

    def _responses(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        kept = [row for row in self._rows[stage.inputs[0]] if row["status"] == "kept"]
        rows = [{**row, "finish_reason": "stop", "num_tokens": 20} for row in kept]
        rows[-1]["finish_reason"] = "length"
        return rows, {"responses": len(rows), "truncated": 1, "tokens": 20 * len(rows)}

    def _set(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        return self._rows[stage.inputs[0]][:40], {"wanted": 40}

    _warmup_set = _probing_set = _training_set = _set

    # -- scores -----------------------------------------------------------------------------------------------------

    def _score(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        rows: Rows = []
        for number, name in enumerate(stage.inputs[2:]):
            shift = -self.tuned_helps if number and stage.kind == "score_fresh" else 0.0
            rows += [self._score_row(row, shift, index) for index, row in enumerate(self._rows[name])]
        rows[-1] |= {"influence": None, "loss_after": None, "quarantine": "empty response"}
        summary = {"warmed_loss": 4.1, "null_step_loss": 4.095, "points": len(rows), "seconds": 40.0, "groups": 2}
        return rows, summary | summarise(rows)

    def _score_row(self, row: dict[str, Any], shift: float, index: int) -> dict[str, Any]:
        influence = 1e-3 * (self._rng.normal() + shift)
        return {
            "example_id": row["example_id"],
            "prompt_id": row["prompt_id"],
            "loss_before": 4.1,
            "loss_after": 4.1 + influence,
            "influence": influence,
            "influence_se": self.score_se,
            "estimator": "corrected",
            "step_seconds": 0.2,
            "restore_seconds": 0.01,
            "evaluate_seconds": 0.7,
            "worker": "group-0",
            "recheck_influence": influence + 1e-4 * self._rng.normal() if index % 4 == 0 else None,
            "recheck_influence_se": 2e-4,
            "quarantine": None,
        }

    _score_fresh = _score

    def _pair(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        scored = [row for row in self._rows[stage.inputs[0]] if row["influence"] is not None]
        texts = {row["example_id"]: row for row in self._rows[stage.inputs[1]]}
        rows = [
            {
                "prompt_id": chosen["prompt_id"],
                "prompt": texts[chosen["example_id"]]["prompt"],
                "chosen": texts[chosen["example_id"]]["raw_output"],
                "rejected": texts[rejected["example_id"]]["raw_output"],
                "chosen_id": chosen["example_id"],
                "rejected_id": rejected["example_id"],
                "chosen_influence": chosen["influence"],
                "rejected_influence": rejected["influence"],
            }
            for chosen, rejected in product(scored, scored)
            if chosen["prompt_id"] == rejected["prompt_id"] and chosen["influence"] < 0 < rejected["influence"]
        ]
        return rows, {"prompts": 10, "prompts_without_pair": {"all_helpful": 2, "single_example": 1}, "noise": 1e-4}

    def _candidates(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        rows = [
            {
                **row,
                "example_id": f"{row['example_id']}-{number}",
                "prompt_id": row["example_id"],
                "prompt": "A request.",
                "raw_output": f"Answer {number} to {row['instruction']}",
            }
            for row in self._rows[stage.inputs[0]]
            for number in range(2)
        ]
        return rows, {"responses": len(rows)}

    # -- training and evaluation ------------------------------------------------------------------------------------

    def _fine_tuned(self, _: Stage) -> tuple[Rows, dict[str, Any]]:
        return [], {
            "loss_first": 6.5, "loss_last": 4.2, "steps": 12, "tokens": 4000, "seconds": 60.0, "peak_memory_gb": 2.0,
            "rows_skipped": 0,
        }  # fmt: skip

    _warm_up = _train_student = _fine_tuned

    def _tune_teacher(self, _: Stage) -> tuple[Rows, dict[str, Any]]:
        before = {"loss": 0.693, "reward_margin": 0.0, "reward_accuracy": 0.5}
        before |= {"logp_chosen": -34.0, "logp_rejected": -36.0}
        after = {"loss": 0.61, "reward_margin": 0.2, "reward_accuracy": 0.75}
        after |= {"logp_chosen": -33.0, "logp_rejected": -37.0}
        return [], {"pairs": {"train": 16, "evaluation": 2, "dropped": 0}, "eval_before": before, "eval_after": after}

    def _evaluate(self, stage: Stage) -> tuple[Rows, dict[str, Any]]:
        changes = {"original": 0.0, "warmed": -1.5, "trained": -2.0}
        rows = []
        for of_set, name in (("reference", stage.inputs[0]), ("held_out", stage.inputs[1])):
            base = [6.5 + float(self._rng.normal()) for _ in self._rows[name]]
            for student, change in changes.items():
                for row, loss in zip(self._rows[name], base, strict=True):
                    noise = 0.4 * float(self._rng.normal()) if change else 0.0
                    rows.append({**row, "student": student, "set": of_set, "loss": loss + change + noise})
        return rows, {"losses": {}}

    def _curves(self, stage: Stage) -> list[list[dict[str, float]]]:
        if stage.kind in ("warm_up", "train_student"):
            return [[{"step": step, "loss": 6.5 / step**0.2, "learning_rate": 1e-4}] for step in range(1, 13)]
        if stage.kind != "tune_teacher":
            return []
        return [
            [{"step": step, "loss": 0.69 - 0.01 * step}, {"step": step, "reward_margin": 0.02 * step},
             {"step": step, "reward_accuracy": 0.5 + 0.02 * step}]
            for step in range(1, 9)
        ]  # fmt: skip


def loop_writer(folder: Path, *overrides: str, tuned_helps: float = 2.0) -> RunWriter:
    """A writer of a run of two iterations under `folder`."""
    config: Config = load_config(QUICKSTART, [f"run={folder / 'run'}", "iterations=2", *overrides])
    return RunWriter(config, stages_of(config), tuned_helps)


def comparison_writer(folder: Path) -> RunWriter:
    """A writer of a comparison of four arms with two tuning seeds, but for what is made of its measures."""
    arms = {
        "self_instruct": {"tune_teacher.tunes": "nothing"},
        "montessori": {},
        "shuffled_labels": {"pair.signal": "shuffled_labels"},
        "responses": {"tune_teacher.tunes": "response"},
    }
    tree = load_config(QUICKSTART, [f"run={folder / 'arms'}"]).model_dump()
    compare = {"arms": arms, "against": "self_instruct", "tuning_seeds": (0, 1)}
    config = Config.model_validate(tree | {"compare": compare})
    return RunWriter(config, all_stages(config), 0.0)


def scores_writer(folder: Path) -> RunWriter:
    """A writer of a run of `montessori score` under `folder`."""
    file = {"path": "rows.jsonl", "response": "response"}
    config: ScoreFiles = score_settings(
        {
            "run": str(folder / "scores"),
            "student": {"model": "some/student"},
            "data": {"examples": file, "reference": file},
        }
    )
    return RunWriter(config, stages_of_scoring(config), 0.0)
