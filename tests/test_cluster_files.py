"""What `cluster/` hands to other programs: checked by their own rules as far as they are installed here."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.metrics import dashboards

from montessori_ray.telemetry import monitor
from tests.cluster.network import NET, Network, can_make_namespaces
from tests.conftest import ROOT, processes_of, wait_for_end, wait_until

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


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces, or this machine's own where this user may make none."""
    if not can_make_namespaces():
        yield [""]
        return
    network = Network()
    yield [network.add_node(), network.add_node()]
    network.close()


@pytest.mark.slow
def test_slurm_runs_a_job_on_a_cluster_of_all_its_nodes(tmp_path: Path, nodes: list[str]) -> None:
    """Script, Ray and job are real, each node with processes and a network of its own; Slurm's commands are doubles."""
    here = [f"ip netns exec {name} unshare --pid --fork --mount-proc --kill-child" if name else "" for name in nodes]
    programs = {
        "srun": "while [[ $1 == --* ]]; do shift; done\n" + "".join(f'{node} "$@" &\n' for node in here) + "wait",
        "getent": f"echo {NET}.2" if nodes[0] else 'exec /usr/bin/getent "$@"',  # of the first node's name
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": str(len(nodes)), "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_ID": "1"}
    settings = slurm | {"RAY_PORT": "7579", "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | settings
    line = [str(CLUSTER / "slurm.sh"), "--config", "configs/quickstart.yaml", f"run={tmp_path}/run"]
    log = tmp_path / "log"
    job = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
                           start_new_session=True)  # fmt: skip
    try:
        wait_until(lambda: "Ray on auto" in log.read_text(), job, log, timeout=180)
        assert f"{len(nodes)} x (2 CPU)" in log.read_text()
    finally:
        os.killpg(job.pid, signal.SIGTERM)
        job.wait()
        for process in processes_of(job.pid):
            process.kill()
        wait_for_end(job.pid)
