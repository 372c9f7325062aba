"""What `montessori plan` predicts from a calibration, and that a calibration measures what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from montessori_ray.artifacts.run import Run
from montessori_ray.calibration import Calibration, calibrate, load_calibration, measured_settings, say_scoring
from montessori_ray.cli import app
from montessori_ray.comparison import all_stages
from montessori_ray.config import Config, Score, load_config
from montessori_ray.errors import ConfigError
from montessori_ray.loop import stages_of
from montessori_ray.session import Session
from montessori_ray.stages.base import identity_of

PARTS: dict[str, Any] = {
    "start_s": 20.0, "point_s": 3.0, "recheck_start_s": 5.0, "recheck_s": 2.0, "stop_s": 4.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("points", "settings", "seconds"),
    [
        (64, {"groups": 1, "recheck": 0}, 20 + 64 * 3 + 4),
        (64, {"groups": 2, "recheck": 0, "lease_size": 4}, 20 + 32 * 3 + 4),
        (64, {"groups": 2, "recheck": 4, "lease_size": 4}, 20 + 32 * 3 + 5 + 2 * 2 + 4),
        (9, {"groups": 2, "recheck": 0, "lease_size": 4}, 20 + 8 * 3 + 4),  # three leases, one group has two
        (3, {"groups": 4, "recheck": 16, "lease_size": 8}, 20 + 3 * 3 + 5 + 3 / 4 * 2 + 4),  # all in one lease
    ],
)
def test_predicted_seconds(points: int, settings: dict[str, Any], seconds: float) -> None:
    assert Calibration(settings={}, **PARTS).seconds(points, Score(**settings)) == pytest.approx(seconds)


def quickstart(run: Path, *overrides: str) -> Config:
    return load_config("configs/quickstart.yaml", [f"run={run}", "telemetry.tracker=none", *overrides])


def test_plan_predicts_scoring_with_the_settings_that_were_measured(tmp_path: Path) -> None:
    config = quickstart(tmp_path)
    Calibration(settings=measured_settings(config), **PARTS).save(Run(str(tmp_path)))
    arguments = ["plan", "-c", "configs/quickstart.yaml", f"run={tmp_path}", "cluster.num_cpus=2", "split.probing=64"]
    planned = CliRunner().invoke(app, arguments)
    assert planned.exit_code == 0, planned.output
    lines = {line.split()[0]: line for line in planned.output.splitlines() if line.split()}
    assert "2:09, 0.072 CPU-hours" in lines["iteration_00/score"]  # 20 + 32 x 3 + 5 + 2 x 2 + 4 s of two CPUs
    assert "CPU-hours" not in lines["iteration_00/warm_up"]
    other = CliRunner().invoke(app, [*arguments, "score.estimator=first_order"])
    assert "CPU-hours" not in other.output
    assert "montessori calibrate" in other.output


def test_gpu_hours_count_all_ranks(tmp_path: Path) -> None:
    config = quickstart(tmp_path, "score.groups=3", "score.group_size=2", "score.worker={cpus: 1, gpus: 1}")
    (stage,) = [stage for stage in stages_of(config) if stage.name == "iteration_00/score"]
    settings = measured_settings(config)
    calibration = Calibration(
        settings=settings, **{**PARTS, "start_s": 3600.0, "point_s": 0, "stop_s": 0, "recheck_s": 0}
    )
    assert say_scoring(calibration, stage, config) == "1:00:05, 6 GPU-hours"


def test_an_arm_that_scores_in_another_way_is_promised_nothing(tmp_path: Path) -> None:
    arms = "compare={against: a, arms: {a: {}, fast: {score.estimator: first_order}}}"
    config = quickstart(tmp_path, arms)
    calibration = Calibration(settings=measured_settings(config), **PARTS)
    said = {stage.name: say_scoring(calibration, stage, config) for stage in all_stages(config)}
    assert "CPU-hours" in said["iteration_00/score"]
    assert said["arms/fast/iteration_00/score"] == ""


def test_a_copy_of_the_reference_file_is_measured_alike(tmp_path: Path) -> None:
    config = quickstart(tmp_path)
    copied = shutil.copy(config.data.reference.path, tmp_path)
    data = config.data.model_copy(update={"reference": config.data.reference.model_copy(update={"path": copied})})
    assert measured_settings(config.model_copy(update={"data": data})) == measured_settings(config)


def test_a_comparison_that_has_begun_can_be_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first loop has another seed than the config, and a single loop would find it made with other settings."""

    def interrupted(_: Session) -> None:
        raise ConfigError("no cluster today")

    seeds = ["compare.tuning_seeds=[3,4]", "compare.student_seeds=[3,4]", f"run={tmp_path}", "telemetry.tracker=none"]
    config = load_config("configs/evidence_cpu_independent.yaml", seeds)
    (stage,) = (stage for stage in all_stages(config) if stage.output == "iteration_00/instructions")
    with Session(config) as session:
        for name in ("inputs/seeds", "inputs/teacher"):
            session.execute(next(stage for stage in all_stages(config) if stage.output == name))
        session.run.artifact(stage.output).begin(identity_of(stage, config, session.run))
    monkeypatch.setattr(Session, "connect", interrupted)
    with pytest.raises(ConfigError, match="no cluster today"):
        calibrate(config)


@pytest.mark.slow
def test_a_calibration_measures_all_groups_at_once(tmp_path: Path) -> None:
    overrides = ["data.reference.rows=4", "student.drop_layers=[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18]"]
    arguments = ["-c", "configs/quickstart.yaml", f"run={tmp_path}", "telemetry.tracker=none", *overrides]
    done = CliRunner().invoke(app, ["calibrate", *arguments])
    assert done.exit_code == 0, done.output
    assert "iteration_00/score: " in done.output
    stored = json.loads((tmp_path / "calibration.json").read_text())
    assert 0.01 < stored["point_s"] < 10
    assert 1 < stored["start_s"] < 120
    assert load_calibration(quickstart(tmp_path, *overrides), Run(str(tmp_path))) is not None
    assert "CPU-hours" in CliRunner().invoke(app, ["plan", *arguments]).output
