"""Experiment trackers behind one small interface: TensorBoard in the run, Weights & Biases, MLflow, or none."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from typing import Any, Protocol

from montessori_ray.artifacts.run import Run
from montessori_ray.config import Telemetry
from montessori_ray.errors import ConfigError, UserError

TRACKED = "tracker_{name}.txt"
"""File of a run with its id at a tracker, by which later sessions go on with the same curves."""


class Tracker(Protocol):
    """Where metric curves go."""

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a stage at a step."""

    def close(self) -> None:
        """Write out what is pending."""


class NoTracker:
    """Keeps nothing."""

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Drop the metrics."""

    def close(self) -> None:
        """Nothing is pending."""


class TensorBoardTracker:
    """Event files in `RUN/tensorboard`, a tag a stage and metric."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a stage at a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


class WandbTracker:
    """One W&B run; a stage's curves stand over its own steps, not over W&B's count of what was logged."""

    def __init__(self, project: str, run: Run, config: dict[str, Any]) -> None:
        import wandb

        known = _known_as(run, "wandb") or uuid.uuid4().hex
        self._run = wandb.init(project=project, name=Path(run.root).name, config=config, id=known, resume="allow")
        _remember(run, "wandb", known)
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a stage at a step."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Write out what is pending."""
        self._run.finish()


class MlflowTracker:
    """One MLflow run under the experiment `project`."""

    def __init__(self, project: str, run: Run) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        active = mlflow.start_run(run_id=_known_as(run, "mlflow"), run_name=Path(run.root).name)
        self._run_id = active.info.run_id
        _remember(run, "mlflow", self._run_id)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a stage at a step of this run, since MLflow's active one is each thread's own."""
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step, run_id=self._run_id)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def _known_as(run: Run, tracker: str) -> str | None:
    name = TRACKED.format(name=tracker)
    return run.storage.read(name).decode() if run.storage.exists(name) else None


def _remember(run: Run, tracker: str, known_as: str) -> None:
    run.storage.write(TRACKED.format(name=tracker), known_as.encode())


def open_tracker(telemetry: Telemetry, run: Run, config: dict[str, Any]) -> Tracker:
    """The configured tracker, which goes on with the run's curves of earlier sessions.

    Raises:
        ConfigError: its package is not installed, or it cannot be started.
    """
    if telemetry.tracker == "none":
        return NoTracker()
    if telemetry.tracker != "tensorboard" and importlib.util.find_spec(telemetry.tracker) is None:
        raise ConfigError(
            f"telemetry.tracker is {telemetry.tracker}, which is not installed: pip install {telemetry.tracker}, or "
            "choose tensorboard or none"
        )
    try:
        match telemetry.tracker:
            case "tensorboard":
                return TensorBoardTracker(f"{run.root}/tensorboard")
            case "wandb":
                return WandbTracker(telemetry.project, run, config)
            case "mlflow":
                return MlflowTracker(telemetry.project, run)
    except UserError:
        raise
    except Exception as error:  # each has types of its own for a missing key, an unknown server, a full disk
        reason = (str(error).strip() or "-").splitlines()[0]
        raise ConfigError(
            f"telemetry.tracker {telemetry.tracker} cannot be started ({type(error).__name__}: {reason}): mend that, "
            "or set telemetry.tracker=none"
        ) from error
