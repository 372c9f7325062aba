"""Writing the report of a run: `report.html` and `report.json` beside its artifacts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from montessori_ray.artifacts.run import Run
from montessori_ray.report.collect import collect
from montessori_ray.report.run_page import run_page
from montessori_ray.report.source import Source
from montessori_ray.stages.base import AnySettings, Stage

PAGE, NUMBERS = "report.html", "report.json"


def write_report(run: Run, config: AnySettings, stages: Sequence[Stage]) -> str:
    """Write the report of a run as far as it got; returns the path or URL of the page."""
    report = collect(Source(run, config, tuple(stages)))
    run.storage.write(NUMBERS, json.dumps(_plain(asdict(report)), indent=1, allow_nan=False).encode())
    run.storage.write(PAGE, run_page(report).encode())
    return f"{run.root}/{PAGE}"


def _plain(value: Any) -> Any:
    """A value as JSON has it: null for a number that is none."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
