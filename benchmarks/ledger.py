"""The control path of scoring without models: points a second that one ledger leases and takes back, and its memory.

    python benchmarks/ledger.py --points 1000000 --groups 64 --json ledger.json

Simulated groups lease, answer at once, and commit; the driver's own pump feeds the ledger, drains its rows and commits
them to Parquet, as the stage does. Afterwards: what a continued stage looks up, and its end;
docs/scale.md has the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Artifact, Run
from montessori_ray.config import Score
from montessori_ray.influence.driver import Pump
from montessori_ray.influence.group_runs import GroupRuns
from montessori_ray.influence.ledger import WAIT, Row
from montessori_ray.influence.ledger_actor import LedgerActor
from montessori_ray.influence.score import Score as ScoreRow
from montessori_ray.stages.schemas import INFLUENCE
from montessori_ray.stages.score import SUMMARY_COLUMNS, summarise, without
from montessori_ray.telemetry.progress import ProgressChannel

CHUNK = 256
OF_A_PROMPT = 4
PROCESSES = 4


BASELINES = {"warmed_loss": 1.0, "null_step_loss": 1.0}


@ray.remote(num_cpus=0)
class SimulatedGroups:
    """Scoring groups whose points take no time, many in one process."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    async def run(self, name: str) -> int:
        """One group, until it is sent home; returns its messages to the ledger."""
        messages = 0
        while True:
            lease = await self._ledger.lease.remote(name, BASELINES)
            messages += 1
            if lease is None:
                return messages
            if lease is WAIT:
                await asyncio.sleep(0.02)
                continue
            await self._ledger.commit.remote(lease.id, [scored(example, name) for example in lease.examples])
            messages += 1


def scored(example: Row, worker: str) -> Row:
    """A row as long as a real one."""
    return ScoreRow(
        example_id=example["example_id"], loss_before=1.0, loss_after=0.999, influence=-1e-3, influence_se=1e-4,
        estimator="exact", step_seconds=0.1, restore_seconds=0.1, evaluate_seconds=0.1, worker=worker,
    ).row()  # fmt: skip


def examples(count: int) -> Iterator[list[Row]]:
    """Chunks of rows with texts of ordinary length."""
    for start in range(0, count, CHUNK):
        yield [
            {"example_id": f"e{number:09d}", "instruction": "i" * 120, "response": "r" * 600}
            for number in range(start, min(count, start + CHUNK))
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--lease-size", type=int, default=8)
    parser.add_argument("--json", help="write the numbers here")
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.points, arguments.groups, arguments.lease_size, folder)
    ray.shutdown()
    print(
        f"{result['points']:,} points by {result['groups']} groups in {result['seconds']:.1f} s: "
        f"{result['points_per_s']:,.0f} points/s, {result['messages_per_s']:,.0f} messages/s, {result['parts']} parts"
    )
    print("MB of ledger, driver after points:")
    for count, ledger_mb, driver_mb in result["memory"]:
        print(f"{count:>12,}: {ledger_mb:.0f}, {driver_mb:.0f}")
    print(", ".join(f"{name} {value:,.1f}" for name, value in result["afterwards"].items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def measure(points: int, groups: int, lease_size: int, folder: str) -> dict[str, Any]:
    """Score `points` with simulated groups; rows are committed under `folder`."""
    actor: Any = LedgerActor
    ledger = actor.remote(lease_size, 1800.0)
    processes = [psutil.Process(ray.get(ledger.pid.remote())), psutil.Process()]
    simulated: list[Any] = [
        SimulatedGroups.options(max_concurrency=groups).remote(ledger)  # type: ignore[attr-defined]
        for _ in range(PROCESSES)
    ]
    trainings: list[Any] = []

    def start(name: str) -> Any:
        trainings.append(simulated[len(trainings) % PROCESSES].run.remote(name))
        return trainings[-1]

    influence = Run(folder).artifact("influence")
    influence.begin(Identity(stage="score", settings={}, inputs={}))
    memory: list[tuple[int, float, float]] = []
    done = 0

    def commit(rows: list[Row]) -> None:
        nonlocal done
        done += len(rows)
        prompts = [{"prompt_id": f"p{int(row['example_id'][1:]) // OF_A_PROMPT}"} for row in rows]
        influence.append(
            pa.Table.from_pylist([row | of for row, of in zip(rows, prompts, strict=True)], schema=INFLUENCE)
        )
        if done >= 10_000 and (not memory or done - memory[-1][0] >= points / 10):
            memory.append((done, *(process.memory_info().rss / 1e6 for process in processes)))

    settings = Score(groups=groups, lease_size=lease_size)
    runs = GroupRuns(start, settings)
    pump = Pump(ledger, runs, settings, commit, ProgressChannel(), points, 0)
    start_s = time.perf_counter()
    up = pump.run(examples(points))
    seconds = time.perf_counter() - start_s
    runs.send_home(ledger, up)
    return {
        "machine": f"{os.cpu_count()} cores",
        "points": done,
        "groups": groups,
        "lease_size": lease_size,
        "seconds": seconds,
        "points_per_s": done / seconds,
        "messages_per_s": sum(ray.get(trainings)) / seconds,
        "parts": len(influence.parts()),
        "memory": memory,
        "afterwards": afterwards(influence, points),
    }


def afterwards(influence: Artifact, points: int) -> dict[str, float]:
    """Seconds to see that all rows are there, as a continued stage does, to summarise them, and to commit them."""
    seconds: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = act()
        seconds[f"{name}_s"] = time.perf_counter() - start
        return result

    assert timed("count", influence.count) == points
    ids = (row["example_id"] for row in influence.rows(["example_id"]))
    rows = (row for chunk in examples(points) for row in chunk)
    assert timed("find_unscored", lambda: list(without(rows, ids))) == []
    timed("summarise", lambda: summarise(influence.rows(SUMMARY_COLUMNS)))
    columns = {field.name: str(field.type) for field in INFLUENCE}
    timed("commit", lambda: influence.commit(details={}, seconds=0.0, columns=columns))
    manifest = len(influence.storage.read("influence/manifest.json"))
    return seconds | {"manifest_kb": manifest / 1e3, "driver_mb": psutil.Process().memory_info().rss / 1e6}


if __name__ == "__main__":
    main()
