"""The control path of scoring without models: points a second that one ledger leases and takes back, and its memory.

    python benchmarks/ledger.py --points 1000000 --groups 64 --json ledger.json

Simulated groups lease, answer at once, and commit; the driver's own pump feeds the ledger and drains its rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from montessori_ray.config import Score
from montessori_ray.influence.driver import Pump
from montessori_ray.influence.ledger import WAIT, Row
from montessori_ray.influence.ledger_actor import LedgerActor
from montessori_ray.influence.score import Score as ScoreRow
from montessori_ray.telemetry.progress import ProgressChannel

CHUNK = 256
PROCESSES = 4


@ray.remote(num_cpus=0)
class SimulatedGroups:
    """Scoring groups whose points take no time, many in one process."""

    async def run(self, ledger: Any, names: list[str]) -> None:
        await asyncio.gather(*(self._score(ledger, name) for name in names))

    async def _score(self, ledger: Any, name: str) -> None:
        await ledger.join.remote(name, {"warmed_loss": 1.0, "null_step_loss": 1.0})
        while (lease := await ledger.lease.remote(name)) is not None:
            if lease is WAIT:
                await asyncio.sleep(0.02)
                continue
            rows = [
                ScoreRow(example_id=example["example_id"], influence=-1e-3, influence_se=1e-4, worker=name).row()
                for example in lease.examples
            ]
            await ledger.commit.remote(lease.id, rows)


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
    actor: Any = LedgerActor
    ledger = actor.remote(arguments.lease_size, 1800.0)
    process = psutil.Process(ray.get(ledger.pid.remote()))
    names = [f"group-{number}" for number in range(arguments.groups)]
    simulated: list[Any] = [SimulatedGroups.remote() for _ in range(PROCESSES)]  # type: ignore[attr-defined]
    running = {
        f"process-{number}": one.run.remote(ledger, names[number::PROCESSES]) for number, one in enumerate(simulated)
    }
    memory: list[tuple[int, float]] = []
    done = 0

    def take(rows: list[Row]) -> None:
        nonlocal done
        done += len(rows)
        if not memory or done - memory[-1][0] >= arguments.points / 10:
            memory.append((done, process.memory_info().rss / 1e6))

    settings = Score(groups=arguments.groups, lease_size=arguments.lease_size)
    pump = Pump(ledger, running, settings, take, ProgressChannel(), arguments.points, 0)
    start = time.perf_counter()
    pump.run(examples(arguments.points))
    seconds = time.perf_counter() - start
    result = {
        "machine": f"{os.cpu_count()} cores",
        "points": done,
        "groups": arguments.groups,
        "lease_size": arguments.lease_size,
        "points_per_s": done / seconds,
        "ledger_rss_mb": memory,
        "driver_rss_mb": psutil.Process().memory_info().rss / 1e6,
    }
    ray.shutdown()
    print(f"{done:,} points by {arguments.groups} groups in {seconds:.1f} s: {done / seconds:,.0f} points/s")
    print("ledger MB after points:", ", ".join(f"{count:,}: {size:.0f}" for count, size in memory))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
