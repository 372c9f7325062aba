"""What a run starts from: the user's rows and models, checked and brought into the run before anything expensive."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from montessori_ray.artifacts.run import LOCATION, Artifact
from montessori_ray.config import Config, ScoreFiles
from montessori_ray.errors import DataError, ModelError, RunError
from montessori_ray.stages.base import AnySettings, StageContext
from montessori_ray.stages.judging import rendered
from montessori_ray.synthesis.prompts import prompt_style, render

ROWS_A_PART = 10_000

FILES = "files"
"""Detail of a model that lies outside of the run: sizes and times of its files."""
LINKED = "linked"
"""Detail of a model that links to files outside of the run: where they lie, and a digest."""


def import_seeds(context: StageContext) -> dict[str, Any]:
    """Seed instructions into `inputs/seeds`; there must be as many as a few-shot prompt shows."""
    from montessori_ray.data import read_rows  # late: see stages/__init__.py

    rows = list(read_rows("seeds", context.config.data.seeds, needs_response=False))
    shots = context.config.synthesize.shots
    if len(rows) < shots:
        raise DataError(
            f"data.seeds has {len(rows)} instructions, a few-shot prompt shows {shots}: add seeds or lower "
            "synthesize.shots"
        )
    return _store(context, rows)


def import_reference(context: StageContext[AnySettings]) -> dict[str, Any]:
    """Reference rows into `inputs/reference`."""
    from montessori_ray.data import read_rows  # late: see stages/__init__.py

    return _store(context, list(read_rows("reference", context.config.data.reference, needs_response=True)))


def import_held_out(context: StageContext) -> dict[str, Any]:
    """Held-out rows into `inputs/held_out`, disjoint from the reference set and from what few-shot prompts show."""
    from montessori_ray.data import read_rows, require_disjoint  # late: see stages/__init__.py

    rows = list(read_rows("held_out", context.config.data.held_out, needs_response=True))
    held_out = [row["instruction"] for row in rows]
    for position, name in enumerate(("reference", "seed")):
        require_disjoint("held-out", held_out, name, context.input(position).column("instruction"))
    return _store(context, rows)


def import_examples(context: StageContext[ScoreFiles]) -> dict[str, Any]:
    """Rows to score into `inputs/examples`."""
    from montessori_ray.data import read_examples  # late: see stages/__init__.py

    return _store(context, read_examples(context.config.data.examples))


def import_warmup_set(context: StageContext[ScoreFiles]) -> dict[str, Any]:
    """Rows to warm up on into `inputs/warmup_set`."""
    from montessori_ray.data import read_rows  # late: see stages/__init__.py

    assert context.config.data.warm_up is not None
    return _store(context, list(read_rows("warm_up", context.config.data.warm_up, needs_response=True)))


def _store(context: StageContext[AnySettings], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write the rows part by part; nothing is left of them when one of them is refused."""
    context.output.discard_parts()
    categories: set[str | None] = set()
    rows = iter(rows)
    try:
        while part := list(islice(rows, ROWS_A_PART)):
            categories.update(row.get("category") for row in part)
            context.append(part)
    except DataError:
        context.output.discard_parts()
        raise
    return {"categories": len(categories - {None})}


def import_teacher(context: StageContext) -> dict[str, Any]:
    """The original teacher as `inputs/teacher`."""
    config = context.config
    teacher = config.teacher
    made = _import_model(context, teacher.model, "teacher", teacher.chat_template, config.pool.max_model_len, ())
    _require_prompts(config)
    return made


def _require_prompts(config: Config) -> None:
    """Refuse a teacher whose chat template cannot show what stages will ask it."""
    from jinja2 import TemplateError

    from montessori_ray.models import resolve_model  # late: see stages/__init__.py
    from montessori_ray.training.chat import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(config.teacher.model), config.teacher.chat_template, role="teacher")
    try:
        render(tokenizer, prompt_style(config.synthesize.prompt_style), ["Name a fruit."])
        rendered(tokenizer, [{"role": "user", "content": "Name a fruit."}])
    except (TemplateError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the chat template of the teacher {config.teacher.model} cannot show it a prompt ({reason}): set another "
            f"teacher.chat_template or synthesize.prompt_style (now {config.synthesize.prompt_style})"
        ) from None


def import_student(context: StageContext[AnySettings]) -> dict[str, Any]:
    """The original student as `inputs/student`, without `student.drop_layers`."""
    student = context.config.student
    return _import_model(
        context, student.model, "student", student.chat_template, student.max_length, student.drop_layers
    )


def require_whole(config: AnySettings, student: Artifact) -> None:
    """Refuse a student with an adapter where a judge is to read its answers, whose engine knows nothing of adapters.

    Raises:
        ModelError: names the student.
    """
    from montessori_ray.training.adapters import has_adapter  # late: see stages/__init__.py

    if isinstance(config, Config) and config.evaluate.judge and has_adapter(student.model_path()):
        raise ModelError(
            f"student.model {config.student.model} is an adapter, and evaluate.judge has the student answer in vLLM, "
            "which is not given it: merge the adapter into its model first, or leave evaluate.judge out"
        )


def require_measurable(config: AnySettings, student: Artifact, sets: Iterable[Artifact]) -> None:
    """Refuse rows of which `student.max_length` leaves no token of the response, since they have no loss, and for a
    comparison a set of one row, since a difference of one row has no interval.

    Raises:
        DataError: names the set or the row.
    """
    from montessori_ray.influence.reference import require_responses  # late: see stages/__init__.py
    from montessori_ray.training.chat import ChatFormat

    chat = ChatFormat.load(student.model_path(), config.student.chat_template, config.student.max_length)
    for artifact in sets:
        rows = list(artifact.rows(["example_id", "instruction", "response"]))
        if isinstance(config, Config) and config.compare and len(rows) < 2:
            raise DataError(f"{artifact.name} has one row, a comparison needs two or more for an interval: add rows")
        require_responses(rows, [chat.encode(row["instruction"], row["response"]) for row in rows])


def _import_model(
    context: StageContext[AnySettings],
    model: str,
    role: str,
    template: str | None,
    length: int,
    drop_layers: tuple[int, ...],
) -> dict[str, Any]:
    """A model made here (unpacked, pruned, joined) is copied into the run, where every node sees it; another stays.

    Details: `hub` is its name there, None for one from elsewhere.
    """
    from montessori_ray.models import (
        EMBEDDED,
        check_model,
        has_weights,
        hub_name,
        join_adapter,
        prune_layers,
        resolve_model,
        with_template,
    )
    from montessori_ray.training.adapters import has_adapter

    folder = resolve_model(model)
    details = {"model": model, "hub": hub_name(model), "dropped_layers": list(drop_layers)}
    if role == "student" and has_adapter(folder) and not has_weights(folder) and not drop_layers:
        with context.output.model_writer() as target:
            join_adapter(folder, target)
            check_model(target, role=role, chat_template=template, context=length)
        return details
    check_model(folder, role=role, chat_template=template, context=length)
    if drop_layers:
        with context.output.model_writer() as target:
            prune_layers(folder, drop_layers, target)
    elif role == "teacher" and template is not None:  # vLLM and DPO take it from the folder, a student's is handed on
        link = not model.startswith(EMBEDDED)
        with context.output.model_writer() as target:
            with_template(folder, template, target, link=link)
        if link:
            return details | {LINKED: _location(folder), FILES: _sizes_and_times(folder)}
    elif model.startswith(EMBEDDED):
        with context.output.model_writer() as target:
            shutil.copytree(folder, target, dirs_exist_ok=True)
    else:
        context.run.storage.write(f"{context.output.name}/{LOCATION}", json.dumps(_location(folder)).encode())
        return details | {FILES: _sizes_and_times(folder)}
    return details


def require_unchanged(artifact: Artifact) -> None:
    """Refuse a run whose model lies outside of it and has changed since.

    Sizes and times of its files are looked at first; their content is read only where these differ.

    Raises:
        RunError: names the folder.
    """
    from montessori_ray.models import model_digest  # late: see stages/__init__.py

    if (manifest := artifact.manifest()) is None:
        return
    location = artifact.location() or manifest.details.get(LINKED)
    if location is None:
        return
    folder = Path(location["path"])
    if _sizes_and_times(folder) != manifest.details.get(FILES) and model_digest(folder) != location["digest"]:
        raise RunError(
            f"{folder}, which is {artifact.name} of this run, is not the model that the run began with: put that back, "
            "or begin another run (run=DIR)"
        )


def _location(folder: Path) -> dict[str, str]:
    """Where a model lies, and what its content is."""
    from montessori_ray.models import model_digest  # late: see stages/__init__.py

    return {"path": str(folder), "digest": model_digest(folder)}


def _sizes_and_times(folder: Path) -> dict[str, list[int]]:
    """Bytes and time of change (nanoseconds) of a model's files."""
    from montessori_ray.models import model_files  # late: see stages/__init__.py

    found = {path.name: path.stat() for path in model_files(folder)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
