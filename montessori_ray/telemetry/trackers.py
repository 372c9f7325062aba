"""Experiment trackers behind one small interface: TensorBoard in the run, Weights & Biases, MLflow, or none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

from montessori_ray.config import Telemetry
from montessori_ray.errors import ConfigError


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
    """One W&B run; steps are a metric of each stage, since stages have their own."""

    def __init__(self, project: str, run: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, name=Path(run).name, config=config, resume="allow")

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a stage at a step."""
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Write out what is pending."""
        self._run.finish()


class MlflowTracker:
    """One MLflow run under the experiment `project`."""

    def __init__(self, project: str, run: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=Path(run).name)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a stage at a step."""
        self._mlflow.log_metrics({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def open_tracker(telemetry: Telemetry, run: str, config: dict[str, Any]) -> Tracker:
    """The configured tracker.

    Raises:
        ConfigError: its package is not installed.
    """
    if telemetry.tracker == "none":
        return NoTracker()
    if telemetry.tracker == "tensorboard":
        return TensorBoardTracker(f"{run}/tensorboard")
    if importlib.util.find_spec(telemetry.tracker) is None:
        raise ConfigError(
            f"telemetry.tracker is {telemetry.tracker}, which is not installed: pip install {telemetry.tracker}, or "
            "choose tensorboard or none"
        )
    if telemetry.tracker == "wandb":
        return WandbTracker(telemetry.project, run, config)
    return MlflowTracker(telemetry.project, run)
