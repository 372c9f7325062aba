"""Benchmarks by lm-evaluation-harness: a model directory in, one JSON file of metrics with standard errors out.

run_benchmarks(Path("runs/paper/final/student"), load_benchmarks("configs/benchmarks_paper.yaml"), Path("out.json"))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from montessori_ray.config import Benchmarks
from montessori_ray.errors import ConfigError, DataError, ModelError, RunError
from montessori_ray.models import model_digest
from montessori_ray.outputs import parent_of, write_whole

Results = dict[str, Any]

SAID = {"model_digest": "version of the model"}
"""What a message calls a name of the results."""


def run_benchmarks(
    model: Path, settings: Benchmarks, output: Path, on_task: Callable[[str, Results], None] = lambda *_: None
) -> Results:
    """Run the tasks that `output` does not hold yet, one after the other, and write it after each.

    Args:
        model: model directory.
        settings: tasks, shots, backend.
        output: JSON file: model, its digest, settings, versions, and `tasks`: task -> `shots`, `questions` and
            `metrics`, metric -> value and stderr (None where the harness gives none).
        on_task: called with each finished task's name and results.

    Returns:
        What is in `output`.

    Raises:
        ConfigError: a package is missing, or the harness has no such task, or it fixes the task's shots.
        DataError: the data of a task cannot be had.
        ModelError: the backend cannot load the model.
        RunError: `output` holds results of another model, of what the folder held before, or of other settings.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("the package lm-eval is not installed: pip install 'montessori-ray[eval]'")
    results = _begin(model, settings, output)
    left = [task for task in settings.tasks if task not in results["tasks"]]
    if left:
        manager = _task_manager(settings, left)
        for task in left:
            _require_task(task, settings.tasks[task], manager)
        loaded = _load_model(model, settings)
        for task in left:
            results["tasks"][task] = _run_task(task, settings, loaded, manager)
            write_whole(output, json.dumps(results, indent=1))
            on_task(task, results["tasks"][task])
    return results


def _begin(model: Path, settings: Benchmarks, output: Path) -> Results:
    """Results so far: those in `output`, or none yet."""
    made_by = {
        "model": str(model.absolute()),
        "model_digest": model_digest(model, without=output),
        "settings": settings.model_dump(mode="json", exclude={"tasks"}),
        "versions": _versions(settings.backend),
    }
    parent_of(output)
    if not output.exists():
        return made_by | {"tasks": {}}
    results = _read(output)
    changed = [SAID.get(name, name) for name, value in made_by.items() if results.get(name) != value]
    changed += [
        task for task, shots in settings.tasks.items() if results["tasks"].get(task, {}).get("shots", shots) != shots
    ]
    if changed:
        raise RunError(f"{output} holds results of another {', '.join(changed)}: choose another output, or remove it")
    return results


def _read(output: Path) -> Results:
    """Results of an earlier session.

    Raises:
        RunError: the file cannot be read, or holds something else.
    """
    try:
        results: Results = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{output} cannot be read as results ({error}): choose another output, or remove it") from None
    if not isinstance(results, dict) or not isinstance(results.get("tasks"), dict):
        raise RunError(f"{output} holds no results of benchmarks: choose another output, or remove it")
    return results


def _versions(backend: str) -> dict[str, str]:
    """Of the packages that results come from.

    Raises:
        ConfigError: there is no package vllm for the backend of that name.
    """
    names = ("lm_eval", "transformers", "torch", *(["vllm"] if backend == "vllm" else []))
    try:
        return {name: version(name) for name in names}
    except PackageNotFoundError as error:
        raise ConfigError(
            f"backend=vllm: there is no package {error.name} here (lm-evaluation-harness does not know its CPU builds, "
            "which go by other names): take backend=hf, or a machine with vllm for GPUs"
        ) from None


def _task_manager(settings: Benchmarks, tasks: list[str]) -> Any:
    """An index of tasks with all that are asked for; the harness's own, of 14,000 files, takes some 10 s to make."""
    from lm_eval.tasks import TaskManager  # late: its import takes seconds

    if settings.task_folder is not None:
        manager = TaskManager(include_path=settings.task_folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=settings.task_folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}: `lm-eval ls tasks` lists what it has, and "
            "task_folder names a folder with tasks of your own"
        )
    return manager


def _require_task(task: str, shots: int, manager: Any) -> None:
    """Look for the task's data, which are loaded again from the disk, and whether it can be asked with these shots."""
    with _data_of(task):
        parts = manager.load([task])["tasks"]
    fixed = [name for name, part in parts.items() if part.get_config("num_fewshot") == 0]
    if shots and fixed:  # the harness never overrides a task's own zero
        raise ConfigError(f"{task} is asked for with {shots} shots, lm-evaluation-harness fixes 0 for {fixed}: set 0")


@contextmanager
def _data_of(task: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError  # late: see _task_manager

    try:
        yield
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"the data of {task} cannot be had: {error}; check the network, HF_TOKEN and licences"
        ) from None


def _load_model(model: Path, settings: Benchmarks) -> Any:
    import torch  # late: see _task_manager
    from lm_eval.api.registry import get_model

    if not (model / "config.json").is_file():
        raise ModelError(f"{model} is not a model directory: it has no config.json")
    arguments = {"pretrained": str(model), **settings.model_arguments}
    if settings.backend == "hf" and not torch.cuda.is_available():
        arguments = {"device": "cpu"} | arguments  # the harness would fail to find the GPU it takes for granted
    try:
        return get_model(settings.backend).create_from_arg_obj(arguments, {"batch_size": settings.batch_size})
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{settings.backend} cannot load {model} with {settings.model_arguments}: {error}") from error


def _run_task(task: str, settings: Benchmarks, model: Any, manager: Any) -> Results:
    from lm_eval import simple_evaluate

    shots = settings.tasks[task]
    with _data_of(task):
        found: Any = simple_evaluate(
            model=model, tasks=[task], num_fewshot=shots, task_manager=manager, limit=settings.limit,
            apply_chat_template=settings.chat_template, log_samples=False,
        )  # fmt: skip
    return {
        "shots": shots,
        "questions": sum(count["effective"] for count in found["n-samples"].values()),
        "metrics": _metrics(task, found),
    }


def _metrics(task: str, found: Any) -> Results:
    """metric -> value and stderr, of a task or a group's aggregate; a tag has none, and its tasks' names go first."""
    entries = found["results"] | found.get("groups", {})
    if task in entries:
        return _values(entries[task])
    return {f"{name} {metric}": value for name in entries for metric, value in _values(entries[name]).items()}


def _values(entry: Any) -> Results:
    """The harness's keys are `metric,filter` and `metric_stderr,filter`; the filter `none` is left out of the name."""
    values: Results = {}
    for key, value in entry.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = entry.get(f"{name}_stderr,{kind}")
            said = name if kind == "none" else f"{name} ({kind})"
            values[said] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None}
    return values
