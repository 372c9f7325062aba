"""Experiment trackers: what was logged is what TensorBoard shows; what is not installed is said."""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from montessori_ray import session
from montessori_ray.artifacts.run import Run
from montessori_ray.config import Telemetry, load_config
from montessori_ray.errors import ConfigError
from montessori_ray.telemetry.trackers import NoTracker, open_tracker

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard itself reads them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_curves_hold_every_point_under_stage_and_name(tmp_path: Path) -> None:
    tracker = open_tracker(Telemetry(), Run(str(tmp_path)), {})
    for step in range(1, 201):
        tracker.log("iteration_00/warm_up", step, {"loss": 2 / step, "rate": step * 1e-7})
    tracker.log("iteration_00/score", 64, {"influence": -0.25})
    tracker.close()
    curves = read_curves(tmp_path / "tensorboard")
    assert set(curves) == {"iteration_00/warm_up/loss", "iteration_00/warm_up/rate", "iteration_00/score/influence"}
    assert curves["iteration_00/score/influence"] == [(64, -0.25)]
    for name, value in (("loss", lambda step: 2 / step), ("rate", lambda step: step * 1e-7)):
        points = curves[f"iteration_00/warm_up/{name}"]
        assert [step for step, _ in points] == list(range(1, 201))
        assert all(math.isclose(shown, value(step), rel_tol=1e-6) for step, shown in points)


def test_a_later_session_adds_to_the_curves(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = open_tracker(Telemetry(), Run(str(tmp_path)), {})
        tracker.log("score", step, {"influence": float(step)})
        tracker.close()
    assert read_curves(tmp_path / "tensorboard") == {"score/influence": [(1, 1.0), (2, 2.0)]}


def test_none_keeps_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(Telemetry(tracker="none"), Run(str(tmp_path)), {})
    tracker.log("score", 1, {"influence": 0.5})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Literal["wandb", "mlflow"]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find_spec(module, *rest)
    )
    with pytest.raises(ConfigError) as caught:
        open_tracker(Telemetry(tracker=name), Run(str(tmp_path)), {})
    assert str(caught.value) == (
        f"telemetry.tracker is {name}, which is not installed: pip install {name}, or choose tensorboard or none"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_whose_server_is_away_at_the_end_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Away(NoTracker):
        def close(self) -> None:
            raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(session, "open_tracker", lambda *_: Away())
    with session.Session(load_config(QUICKSTART, [f"run={tmp_path / 'run'}"])) as work:
        work.accept_settings()
    said = capsys.readouterr()
    assert "did not take the last of its curves (ConnectionError: no route to host)" in said.out + said.err


class Wandb(types.ModuleType):
    """What of Weights & Biases is called, without the network."""

    def __init__(self) -> None:
        super().__init__("wandb", "")
        self.started: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.logged: list[dict[str, float]] = []
        self.fault: Exception | None = None

    def init(self, **arguments: Any) -> Wandb:
        if self.fault:
            raise self.fault
        self.started.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    module.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_later_session_goes_on_with_the_runs_own_curves_at_wandb(tmp_path: Path, wandb: Wandb) -> None:
    for name in ("one", "one", "two"):
        open_tracker(Telemetry(tracker="wandb"), Run(str(tmp_path / name)), {})
    first, second, other = wandb.started
    assert first["id"] == second["id"] != other["id"]
    assert first["resume"] == "allow"
    assert first["name"] == "one"


def test_curves_at_wandb_stand_over_the_steps_of_their_stage(tmp_path: Path, wandb: Wandb) -> None:
    tracker = open_tracker(Telemetry(tracker="wandb"), Run(str(tmp_path)), {})
    for step in (8, 16):
        tracker.log("score", step, {"influence": -0.25})
    assert wandb.axes == [("score/*", "score/step")]
    assert wandb.logged[-1] == {"score/step": 16, "score/influence": -0.25}


class Mlflow(types.ModuleType):
    """What of MLflow is called; like it, it knows an active run in the thread that started it alone."""

    def __init__(self) -> None:
        super().__init__("mlflow", "")
        self._active = threading.local()
        self.logged: list[tuple[str | None, int, dict[str, float]]] = []

    def set_experiment(self, name: str) -> None: ...

    def start_run(self, *, run_id: str | None, run_name: str) -> types.SimpleNamespace:
        self._active.run = run_id or "first"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self._active.run))

    def log_metrics(self, metrics: dict[str, float], *, step: int, run_id: str | None = None) -> None:
        self.logged.append((run_id or getattr(self._active, "run", None), step, metrics))


def test_curves_go_to_the_runs_own_at_mlflow_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Mlflow()
    mlflow.__spec__ = ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for _ in range(2):
        tracker = open_tracker(Telemetry(tracker="mlflow"), Run(str(tmp_path)), {})
        thread = threading.Thread(target=tracker.log, args=("score", 8, {"influence": -0.25}))
        thread.start()
        thread.join()
    assert mlflow.logged == [("first", 8, {"score/influence": -0.25})] * 2


def test_a_tracker_that_does_not_start_is_said_in_a_sentence(tmp_path: Path, wandb: Wandb) -> None:
    wandb.fault = RuntimeError("api_key not configured\nand more")
    message = r"tracker wandb cannot be started \(RuntimeError: api_key not configured\): mend that, or set .*=none"
    with pytest.raises(ConfigError, match=message):
        open_tracker(Telemetry(tracker="wandb"), Run(str(tmp_path)), {})


def test_a_command_that_is_refused_leaves_no_curves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with session.Session(load_config(QUICKSTART, [f"run={run}"])):
        pass
    assert not (run / "tensorboard").exists()
    with session.Session(load_config(QUICKSTART, [f"run={run}"])) as work:
        work.accept_settings()
    assert len([*(run / "tensorboard").iterdir()]) == 1
