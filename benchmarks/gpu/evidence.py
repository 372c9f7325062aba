"""`montessori compare` in pieces: works for a while, stops cleanly, and goes on with the same command.

    python benchmarks/gpu/evidence.py --seconds 520 --json evidence.json [--config FILE] [section.key=value ...]

For machines that are lent for minutes at a time. Exit status 0: finished, the numbers are in the file; 3: there is
more to do, give the same command again (the run directory has to be kept between the pieces).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from montessori_ray.comparison import RESULT
from montessori_ray.config import load_config
from montessori_ray.session import open_run

GRACE_S = 20
"""Seconds that an interrupted run gets to stop its cluster."""


def main() -> int:
    arguments = _arguments()
    command = ["-m", "montessori_ray", "compare", "--config", str(arguments.config), *arguments.overrides]
    process = subprocess.Popen([sys.executable, *command])
    try:
        status = process.wait(timeout=arguments.seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # what is committed stays
        print("time is up; give the same command again to continue", file=sys.stderr)
        return 3
    if status == 0:
        run = open_run(load_config(arguments.config, arguments.overrides).run)
        arguments.json.write_text(json.dumps(run.artifact(RESULT).require().details, indent=1), encoding="utf-8")
    return status


def _arguments() -> argparse.Namespace:
    config = Path(__file__).parents[2] / "configs/evidence_gpu.yaml"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--json", type=Path, default=Path("evidence.json"))
    parser.add_argument("overrides", nargs="*", help="settings over the file's")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
