"""What `cluster/` hands to other programs: checked by their own rules as far as they are installed here."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.metrics import dashboards

from montessori_ray.telemetry import monitor
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
METRIC = re.compile(r"\bray_\w+")


def loaded(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def test_ray_up_takes_the_file() -> None:
    config = prepare_config(loaded("ray_up.yaml"))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_kuberay_runs_the_pinned_ray_and_a_job_that_is_in_the_image() -> None:
    spec = loaded("kuberay.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "requirements/cuda.lock").read_text()
    script = spec["entrypoint"].split()[1]
    workdir = re.search(r"^WORKDIR (.+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert workdir is not None
    assert (ROOT / Path(script).relative_to(workdir[1])).exists()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in [group["template"]["spec"] for group in groups]:
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


def test_grafana_asks_for_metrics_that_there_are() -> None:
    panels = json.loads((CLUSTER / "grafana.json").read_text())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    ours = {f"ray_{gauge.info['name']}" for gauge in monitor._gauges().values()}
    of_ray = "".join(file.read_text() for file in Path(inspect.getfile(dashboards)).parent.glob("*.py"))
    assert {name for name in asked if "montessori" in name} == ours
    assert [name for name in asked - ours if name not in of_ray] == []


@pytest.mark.slow
def test_slurm_runs_a_job_on_a_cluster_of_its_nodes(tmp_path: Path) -> None:
    """The script and Ray on this machine as the only node; `srun` and `scontrol` are doubles of Slurm's."""
    programs = {
        "scontrol": "echo localhost",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "2"}
    settings = slurm | {"JOB": "pair", "RAY_PORT": "7479", "RAY_AUTH_MODE": "disabled", "PATH": path}
    line = [str(CLUSTER / "slurm.sh"), "--config", "configs/quickstart.yaml", f"run={tmp_path}/run"]
    ended = subprocess.run(line, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    assert "run the stage iteration_00/score first" in ended.stdout + ended.stderr
