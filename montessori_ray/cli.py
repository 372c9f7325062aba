"""The `montessori` command; jobs/ calls the same functions."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
import yaml
from pydantic import ValidationError
from rich import box
from rich.table import Table
from rich.text import Text

from montessori_ray import comparison, loop
from montessori_ray.artifacts.run import Run
from montessori_ray.calibration import calibrate as measure_scoring
from montessori_ray.calibration import load_calibration, say_scoring
from montessori_ray.cluster import address_of, cluster_nodes, connected, require_room, say_bundles, this_machine
from montessori_ray.config import Config, ScoreFiles, judge_settings, load_benchmarks, load_config, score_settings
from montessori_ray.errors import ConfigError, RunError, UserError
from montessori_ray.outputs import new_folder, parent_of
from montessori_ray.scoring import EXAMPLES, INFLUENCE, score_files, stages_of_scoring
from montessori_ray.session import open_run
from montessori_ray.stages.base import AnySettings, Stage, bundles_of
from montessori_ray.telemetry.console import (
    benchmark_table,
    clock,
    influence_tables,
    say_progress,
    stage_entry,
    stage_table,
    terminal,
    with_error,
)
from montessori_ray.telemetry.events import read_events
from montessori_ray.telemetry.progress import Progress

Arguments = ParamSpec("Arguments")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Montessori-Instruct on Ray: a teacher learns to write the training data its student learns from.",
)
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file, e.g. configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings over the file's, e.g. score.baseline=warmed")]
IterationOption = Annotated[int | None, typer.Option(help="only this iteration, from 0")]


def said_plainly(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A user's error becomes a sentence; Ctrl-C, or SIGTERM as `ray job stop` sends, says how to continue."""

    @wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        # The console shows the run's own progress; libraries' bars and greetings would cut through it.
        for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            command(*args, **kwargs)
        except UserError as error:
            terminal(stderr=True).print(Text.assemble(("error: ", "red"), str(error)))
            sys.exit(2)
        except KeyboardInterrupt:
            typer.echo("\nstopped; what is committed is kept, give the same command again to continue", err=True)
            sys.exit(130)

    return wrapped


@app.command()
@said_plainly
def run(
    config: ConfigOption,
    overrides: Overrides = None,
    stage: Annotated[list[str] | None, typer.Option(help="only stages of this kind (may be repeated)")] = None,
    iteration: IterationOption = None,
) -> None:
    """Start a run, or continue it: finished stages are kept, unfinished ones go on."""
    loop.run_loop(load_config(config, overrides), kinds=stage or (), iteration=iteration)


@app.command()
@said_plainly
def compare(config: ConfigOption, overrides: Overrides = None) -> None:
    """Run the arms of a comparison, share what does not differ, and say which differences are more than noise."""
    comparison.run_comparison(load_config(config, overrides))


@app.command()
@said_plainly
def plan(config: ConfigOption, overrides: Overrides = None) -> None:
    """Show the stages, their rows and what they ask the cluster for; starts nothing."""
    settings = load_config(config, overrides)
    nodes = _nodes(settings)
    table = Table(title=f"Plan of {open_run(settings.run).root}", box=box.SIMPLE_HEAD, title_justify="left")
    calibration = load_calibration(settings, open_run(settings.run))
    table.add_column("stage", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("asks for at once", no_wrap=True)
    if calibration:
        table.add_column("will take", no_wrap=True)
    stages = comparison.all_stages(settings)
    for stage in stages:
        rows = f"{stage.rows:,}" if stage.rows is not None else ""
        time_it = [say_scoring(calibration, stage, settings)] if calibration else []
        table.add_row(stage.name, rows, say_bundles(bundles_of(stage, settings)), *time_it)
    terminal().print(table)
    typer.echo(f"cluster: {say_bundles(nodes)}")
    if calibration is None:
        typer.echo("how long scoring will take with these settings: `montessori calibrate` measures it")
    for stage in stages:
        require_room(stage.name, bundles_of(stage, settings), nodes)


@app.command()
@said_plainly
def calibrate(config: ConfigOption, overrides: Overrides = None) -> None:
    """Measure on the cluster how long a point takes to score; `plan` then says what the score stages will take."""
    settings = load_config(config, overrides)
    measured = measure_scoring(settings)
    typer.echo(
        f"a group starts in {measured.start_s:.0f} s and scores a point in {measured.point_s:.3g} s, with all "
        f"{settings.score.groups} at work"
    )
    for stage in comparison.all_stages(settings):
        if said := say_scoring(measured, stage, settings):
            typer.echo(f"{stage.name}: {said}")


def _nodes(settings: Config) -> list[dict[str, float]]:
    """Nodes of the configured cluster, or of the one that would be started here."""
    if address_of(settings.cluster) is None:
        return this_machine(settings.cluster)
    with connected(settings.cluster):
        return cluster_nodes()


@app.command()
@said_plainly
def stages(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of the settings")] = None,
    directory: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="a run directory: the settings it was started with")
    ] = None,
    remove: Annotated[str | None, typer.Option(help="remove this artifact and all made from it")] = None,
) -> None:
    """List the stages and the artifacts they read and make; remove some to have them made again."""
    if (config is None) == (directory is None):
        raise ConfigError("give the settings as --config FILE, or a run directory as --run RUN")
    if directory is not None and overrides:
        raise ConfigError(f"--run takes the settings the run was started with: leave {' '.join(overrides)} out")
    settings: AnySettings
    if config is not None:
        settings = load_config(config, overrides)
        artifacts, listed = open_run(settings.run), comparison.all_stages(settings)
    else:
        artifacts, settings, listed = _read_run(str(directory))
    if remove is not None:
        maker = {stage.output: stage.name for stage in listed}
        with artifacts.lock():
            for artifact in map(artifacts.artifact, loop.made_from(remove, listed)):
                there = artifact.manifest() or artifact.begun()
                if there:
                    artifact.remove()
                # Or an unfinished one would go on; of one that failed nothing else is left.
                if artifacts.remove_trainings(maker[artifact.name]) or there:
                    typer.echo(f"removed {artifact.name}")
        return
    for stage in listed:
        typer.echo(stage_entry(stage, loop.state_of(stage, settings, artifacts), shutil.get_terminal_size().columns))


@app.command()
@said_plainly
def status(directory: Annotated[str, typer.Argument(metavar="RUN", help="the run directory")]) -> None:
    """Where a run stands, read from its directory: works from any shell, while it runs and after."""
    artifacts, _, its_stages = _read_run(directory)
    listed = [(stage, artifacts.artifact(stage.output).manifest()) for stage in its_stages]
    terminal().print(stage_table([(stage, manifest) for stage, manifest in listed if manifest]))
    todo = [stage.name for stage, manifest in listed if manifest is None]
    typer.echo(f"{len(listed) - len(todo)} of {len(listed)} stages done" + (f", next {todo[0]}" if todo else ""))
    latest, began = None, 0.0
    for event in read_events(artifacts.storage):
        if event["event"] == "stage_started":
            began = event["time"]
        if event["event"] in ("progress", "session_ended", "stage_finished"):
            latest = event
    if latest and latest["event"] == "progress":
        progress = Progress(**{name: latest[name] for name in ("done", "total", "unit", "note")})
        said = say_progress(progress, latest["rate"], latest["time"] - began)
        typer.echo(f"{latest['stage']}: {said} ({clock(time.time() - latest['time'])} ago)")


def _read_run(directory: str) -> tuple[Run, AnySettings, list[Stage]]:
    """A run directory with its settings and stages, of the loop or of `montessori score`.

    Raises:
        RunError: it is none, or its settings are not of this version.
    """
    artifacts = open_run(directory)
    if not artifacts.storage.exists("config.yaml"):
        raise RunError(f"{artifacts.root} is not a run directory: it has no config.yaml")
    tree = yaml.safe_load(artifacts.storage.read("config.yaml"))
    try:
        if isinstance(tree, dict) and "teacher" not in tree:
            job = ScoreFiles.model_validate(tree)
            return artifacts, job, stages_of_scoring(job)
        settings = Config.model_validate(tree)
    except ValidationError as error:
        raise RunError(
            f"{artifacts.root}/config.yaml cannot be read by this version: {error.error_count()} settings differ; use "
            "the version that wrote it"
        ) from None
    return artifacts, settings, comparison.all_stages(settings)


@app.command()
@said_plainly
def report(directory: Annotated[str, typer.Argument(metavar="RUN", help="the run directory")]) -> None:
    """Write RUN/report.html and RUN/report.json, as far as the run got; every run does so at its end."""
    from montessori_ray.report.write import write_report  # late: matplotlib takes a second

    typer.echo(f"report: {write_report(*_read_run(directory))}")


@app.command()
@said_plainly
def export(
    directory: Annotated[str, typer.Argument(metavar="RUN", help="the run directory")],
    output: Annotated[Path, typer.Option(help="folder of the export, empty or not there yet")],
    models: Annotated[bool, typer.Option(help="copy the models too, with a card each")] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="dataset repository on the Hugging Face Hub to upload it to")
    ] = None,
) -> None:
    """Leave a run's datasets as a Hugging Face dataset folder, with cards that say what they were made from."""
    from montessori_ray.export.write import export_run, upload

    exported = export_run(*_read_run(directory), output, models=models)
    for line in exported.said():
        typer.echo(line)
    if push_to_hub is not None:
        for url in upload(exported, push_to_hub):
            typer.echo(f"uploaded: {url}")


@app.command()
@said_plainly
def score(
    student: Annotated[str, typer.Option(help="Hub name or folder of the student, warmed up or not")],
    examples: Annotated[Path, typer.Option(help="JSONL or Parquet: instruction, response; example_id, prompt_id kept")],
    reference: Annotated[Path, typer.Option(help="JSONL or Parquet: instruction, response")],
    output: Annotated[str, typer.Option(help="run directory of the result; the same command continues it")],
    overrides: Overrides = None,
    optimizer_state: Annotated[
        str | None, typer.Option(help="folder of AdamW's state, or none: fresh moments  [default: the student's own]")
    ] = None,
    warm_up: Annotated[Path | None, typer.Option(help="warm the student up on these rows first")] = None,
) -> None:
    """Score any examples for any student: how much one step on each helps with the reference rows.

    Overrides are settings of the `score` section (`estimator=first_order baseline=warmed groups=4`), or dotted ones
    (`student.max_length=512`).
    """
    files = {"examples": examples, "reference": reference, **({"warm_up": warm_up} if warm_up else {})}
    tree = {
        "run": output,
        "student": {"model": student},
        "data": {name: {"path": str(path.absolute()), "response": "response"} for name, path in files.items()},
        "score": {"optimizer_state": optimizer_state},
    }
    run = score_files(score_settings(tree, overrides))
    influence = run.artifact(INFLUENCE)
    rows = partial(influence.rows, ["example_id", "influence", "influence_se"])
    texts = run.artifact(EXAMPLES).rows(["example_id", "instruction"])
    for table in influence_tables(influence.require().details, rows, texts):
        terminal().print(table)


@app.command()
@said_plainly
def benchmark(
    model: Annotated[str, typer.Option(help="Hub name or folder of the model")],
    tasks: Annotated[Path, typer.Option(help="YAML file, e.g. configs/benchmarks_paper.yaml")],
    output: Annotated[Path, typer.Option(help="JSON file of the results; the same command continues it")],
    overrides: Overrides = None,
) -> None:
    """Run benchmarks of lm-evaluation-harness on a model, with the shots the file says."""
    from montessori_ray.evaluation.harness import run_benchmarks
    from montessori_ray.models import resolve_model

    settings = load_benchmarks(tasks, overrides)
    results = run_benchmarks(
        resolve_model(model), settings, output, on_task=lambda task, _: typer.echo(f"done: {task}")
    )
    terminal().print(benchmark_table(results), f"results: {output}", sep="")


@app.command("mt-bench")
@said_plainly
def mt_bench(
    judge: Annotated[list[str], typer.Argument(help="the judge: model=NAME base_url=URL api_key_env=VARIABLE ...")],
    questions: Annotated[Path, typer.Option(help="MT-Bench's question.jsonl")],
    answers: Annotated[Path, typer.Option(help="a model's answers, in the format of MT-Bench's model_answer/")],
    output: Annotated[Path, typer.Option(help="JSONL file of the grades; the same command continues it")],
) -> None:
    """Have a judge grade a model's two-turn answers to MT-Bench from 1 to 10."""
    from montessori_ray.evaluation.endpoint import ChatEndpoint
    from montessori_ray.evaluation.mt_bench import grade_to_file, read_answers, read_questions

    settings = judge_settings(judge)
    asked, answered = read_questions(questions), read_answers(answers)
    found = grade_to_file(asked, answered, ChatEndpoint(settings), output, judge=settings.model)
    for name, value in {"all": found["score"], **found["turns"], **found["categories"]}.items():
        typer.echo(f"{f'turn {name}' if name in found['turns'] else name:<12} {with_error(value, '.2f', '.2f')}")
    typer.echo(f"{found['graded']} answers graded, {found['without_rating']} without a rating: {output}")


@app.command("alpaca-eval")
@said_plainly
def alpaca_eval(
    directory: Annotated[str, typer.Argument(metavar="RUN", help="the run directory")],
    output: Annotated[Path, typer.Option(help="folder for original.json and trained.json")],
) -> None:
    """Write what a run's students answered to its held-out instructions as AlpacaEval reads it."""
    from montessori_ray.evaluation.alpaca_eval import write_outputs

    artifacts = open_run(directory)
    if artifacts.artifact("compare/result").made_from() is not None:
        raise RunError(f"{artifacts.root} is a comparison, in which no student answers: give the run of one loop")
    students = {name: artifacts.artifact(f"final/answers_{name}") for name in ("original", "trained")}
    for answers in students.values():
        if answers.manifest() is None:
            raise RunError(
                f"{answers.url} does not exist yet: students answer only in runs with evaluate.judge; add it, to a "
                "finished run too, with `montessori run -c CONFIG 'evaluate.judge={model: pool}'` or another judge"
            )
    parent_of(output / "original.json")
    for name, answers in students.items():
        outputs = ((row["instruction"], row["response"]) for row in answers.rows(["instruction", "response"]))
        write_outputs(output / f"{name}.json", outputs, generator=name, dataset="held_out")
        typer.echo(f"written: {output / name}.json")


@app.command("prune-student")
@said_plainly
def prune_student(
    model: Annotated[str, typer.Option(help="Hub name, folder, or embedded:smollm2-135m-instruct")],
    drop_layers: Annotated[str, typer.Option(help="layers to remove, e.g. 12-17 or 3,5,7-9")],
    output: Annotated[Path, typer.Option(help="folder of the pruned model")],
) -> None:
    """Write a copy of a model without some of its layers: a small student that has something to learn."""
    from montessori_ray.models import prune_layers, resolve_model

    layers = _layers(drop_layers)
    prune_layers(resolve_model(model), layers, new_folder(output))
    typer.echo(f"{output}: {model} without layers {', '.join(map(str, layers))}")


def _layers(said: str) -> list[int]:
    """Layers such as `3,5,7-9` as numbers.

    Raises:
        ConfigError: a part is neither a number nor a range from a lower to a higher one.
    """
    layers: list[int] = []
    for part in said.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        found = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else ()
        if not found:
            raise ConfigError(
                f"--drop-layers is {said!r}: {part!r} is neither a layer's number nor a range from a lower to a higher "
                "one, give e.g. 12-17 or 3,5,7-9"
            )
        layers.extend(found)
    return layers


def main() -> None:
    """Entry point of `montessori`."""
    app()


def job(*kinds: str) -> None:
    """Entry point of a script in jobs/: the whole loop, or the stages of these kinds."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @application.command()
    @said_plainly
    def main(config: ConfigOption, overrides: Overrides = None, iteration: IterationOption = None) -> None:
        loop.run_loop(load_config(config, overrides), kinds=kinds, iteration=iteration)

    application()
