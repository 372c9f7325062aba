"""The list of stages: that it is the algorithm, that it is complete, and what is refused before anything runs."""

from __future__ import annotations

import json
import runpy
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from montessori_ray.artifacts.run import Artifact, Run
from montessori_ray.config import Config, content_settings, load_config
from montessori_ray.errors import ConfigError, ModelError, RunError
from montessori_ray.loop import (
    _connect,
    bundles_of,
    check_run,
    made_from,
    require_shared,
    run_loop,
    select,
    stages_of,
    startable,
    state_of,
)
from montessori_ray.models import resolve_model
from montessori_ray.session import Session
from montessori_ray.stages.base import Stage, identity_of
from montessori_ray.stages.judging import require_keys

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SHIPPED = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("benchmarks_*.yaml")))


def quickstart(*overrides: str) -> Config:
    return load_config(CONFIGS / "quickstart.yaml", list(overrides))


def by_name(config: Config) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(config)}


def finish(run: Run, stage: Stage, config: Config) -> Artifact:
    """Commit the output of a stage without doing its work."""
    artifact = run.artifact(stage.output)
    artifact.begin(identity_of(stage, config, run))
    artifact.commit(details={"stage": stage.name}, seconds=0.0, columns={"x": "int64"} if stage.schema else None)
    return artifact


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


# -- the list -------------------------------------------------------------------------------------------------------

INPUTS = ["inputs/seeds", "inputs/reference", "inputs/held_out", "inputs/teacher", "inputs/student"]
ITERATION = ["instructions", "responses", "warmup_set", "warm_up", "probing_set", "score", "pair", "tune_teacher"]
FINAL = ["instructions", "responses", "training_set", "train_student", "evaluate"]
FRESH = ["fresh_instructions", "fresh_responses", "fresh_set"]


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("fresh", [0, 32])
def test_the_stages_are_those_of_the_algorithm(iterations: int, fresh: int) -> None:
    names = [stage.name for stage in stages_of(quickstart(f"iterations={iterations}", f"evaluate.fresh={fresh}"))]
    if fresh:
        extra = {f"iteration_{number:02d}/{kind}" for number in range(iterations) for kind in FRESH}
        extra |= {f"final/{kind}" for kind in (*FRESH, "score_fresh")}
        assert extra <= set(names)
        names = [name for name in names if name not in extra]
    loops = [f"iteration_{number:02d}/{kind}" for number in range(iterations) for kind in ITERATION]
    assert names == [*INPUTS, *loops, *(f"final/{kind}" for kind in FINAL)]


@pytest.mark.parametrize("overrides", [["iterations=1"], ["iterations=2"], ["iterations=2", "evaluate.fresh=0"]])
def test_names_and_outputs_are_unique_and_every_input_is_made_before(overrides: list[str]) -> None:
    stages = stages_of(quickstart(*overrides))
    assert max(Counter(stage.name for stage in stages).values()) == 1
    assert max(Counter(stage.output for stage in stages).values()) == 1
    made: set[str] = set()
    for stage in stages:
        assert set(stage.inputs) <= made, stage.name
        assert stage.teacher is None or stage.teacher in stage.inputs, "a stage must be remade for another teacher"
        made.add(stage.output)


def test_every_output_has_a_reader_or_is_the_result() -> None:
    stages = stages_of(quickstart("iterations=2"))
    read = {name for stage in stages for name in stage.inputs}
    assert {stage.output for stage in stages} - read == {"final/evaluation"}


def test_the_tuned_teacher_writes_next() -> None:
    stages = by_name(quickstart("iterations=2"))
    teachers = ["inputs/teacher", "iteration_00/teacher", "iteration_01/teacher"]
    for name, teacher in zip(("iteration_00", "iteration_01", "final"), teachers, strict=True):
        for kind in ("instructions", "responses", "fresh_instructions", "fresh_responses"):
            assert stages[f"{name}/{kind}"].teacher == teacher
    assert stages["iteration_01/tune_teacher"].inputs == ("iteration_00/teacher", "iteration_01/pairs")


def test_the_reference_policy_is_an_input_where_it_is_another_teacher() -> None:
    stages = by_name(quickstart("iterations=2", "tune_teacher.reference=original"))
    assert stages["iteration_00/tune_teacher"].inputs == ("inputs/teacher", "iteration_00/pairs")
    assert stages["iteration_01/tune_teacher"].inputs == (
        "iteration_00/teacher",
        "iteration_01/pairs",
        "inputs/teacher",
    )


def test_students_start_from_the_original_weights() -> None:
    stages = by_name(quickstart("iterations=2"))
    for name in ("iteration_00/warm_up", "iteration_01/warm_up", "final/train_student"):
        assert stages[name].inputs[0] == "inputs/student"


def test_held_out_rows_bar_training_examples_and_nothing_reads_them_else() -> None:
    readers = [stage.name for stage in stages_of(quickstart("iterations=2")) if "inputs/held_out" in stage.inputs]
    assert readers == ["final/training_set", "final/evaluate"]


AT_ENDPOINT = "evaluate.judge={model: judge, base_url: http://127.0.0.1:8000/v1}"


@pytest.mark.parametrize(
    ("judge", "teacher"), [(AT_ENDPOINT, None), ("evaluate.judge={model: pool}", "inputs/teacher")]
)
def test_a_judge_compares_what_both_students_answer(judge: str, teacher: str | None) -> None:
    without, stages = by_name(quickstart()), by_name(quickstart(judge))
    assert [name for name in stages if name not in without] == [
        "final/answer_original", "final/answer_trained", "final/win_rate",
    ]  # fmt: skip
    students = {"original": "inputs/student", "trained": "final/student"}
    for name, student in students.items():
        assert stages[f"final/answer_{name}"].inputs == ("inputs/held_out", student)
        assert stages[f"final/answer_{name}"].teacher == student  # the pool hosts it
    assert stages["final/win_rate"].inputs[:2] == ("final/answers_trained", "final/answers_original")
    assert stages["final/win_rate"].teacher == teacher
    assert teacher is None or teacher in stages["final/win_rate"].inputs


def test_an_endpoint_may_move_but_another_judge_is_other_work() -> None:
    first, moved, other = (
        quickstart(AT_ENDPOINT, *overrides)
        for overrides in ([], ["evaluate.judge.base_url=http://host/v1"], ["evaluate.judge.model=gpt"])
    )
    assert content_settings(first, ("evaluate.judge",)) == content_settings(moved, ("evaluate.judge",))
    assert content_settings(first, ("evaluate.judge",)) != content_settings(other, ("evaluate.judge",))


def test_fresh_prompts_of_all_teachers_are_scored_against_one_student() -> None:
    score = by_name(quickstart("iterations=2", "evaluate.fresh=7"))["final/score_fresh"]
    fresh = ("iteration_00/fresh_set", "iteration_01/fresh_set", "final/fresh_set")
    assert score.inputs == ("iteration_00/warmed_student", "inputs/reference", *fresh)
    assert score.rows == 3 * 7


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_settings_of_every_stage_exist(path: Path) -> None:
    config = load_config(path)
    for stage in stages_of(config):
        settings = content_settings(config, stage.settings)
        assert set(stage.settings) <= {key[: len(name)] for key in settings for name in stage.settings}


SIZES = ["split.warmup=50", "split.probing=50", "evaluate.fresh=7", "training_set=7"]


@pytest.mark.parametrize("override", SIZES[:3])
def test_a_stage_whose_target_changed_is_other_work(override: str) -> None:
    """A resumed synthesis with another target replays its rounds with other sizes, so it must be refused."""
    assert_other_target_is_other_work(override)


@pytest.mark.parametrize("override", SIZES[3:])
def test_a_training_set_of_another_size_is_other_work(override: str) -> None:
    assert_other_target_is_other_work(override)


def assert_other_target_is_other_work(override: str) -> None:
    before, after = quickstart(), quickstart(override)
    for old, new in zip(stages_of(before), stages_of(after), strict=True):
        if old.rows != new.rows and old.kind.endswith("instructions"):
            settings = [content_settings(config, old.settings) for config in (before, after)]
            assert settings[0] != settings[1], f"{old.name}: {old.rows} -> {new.rows} instructions"


@pytest.mark.parametrize("override", ["score.groups=4", "pool.replicas=2", "warm_up.checkpoint_steps=7"])
def test_more_machines_are_no_other_work(override: str) -> None:
    before, after = quickstart(), quickstart(override)
    for old, new in zip(stages_of(before), stages_of(after), strict=True):
        assert content_settings(before, old.settings) == content_settings(after, new.settings)


# -- what stages ask for --------------------------------------------------------------------------------------------


def test_bundles_of_the_paper_config() -> None:
    config = load_config(CONFIGS / "paper_llama3_8b.yaml")
    stages = by_name(config)
    gpu = {"CPU": 4.0, "GPU": 1.0}
    expected = {"instructions": 8, "warm_up": 8, "score": 8, "pair": 0, "tune_teacher": 4}
    for kind, count in expected.items():
        assert bundles_of(stages[f"iteration_00/{kind}"], config) == [gpu] * count
    assert bundles_of(stages["final/evaluate"], config) == [gpu]


def test_a_resident_pool_is_held_beside_other_workers() -> None:
    config = quickstart("pool.resident=true", "score.groups=2", "pool.replicas=3")
    stages = by_name(config)
    assert len(bundles_of(stages["iteration_00/score"], config)) == 2 + 3
    assert len(bundles_of(stages["iteration_00/instructions"], config)) == 3
    assert bundles_of(stages["iteration_00/pair"], config) == []


# -- choosing stages ------------------------------------------------------------------------------------------------


def test_select_takes_kinds_of_one_iteration_or_all() -> None:
    stages = stages_of(quickstart("iterations=2"))
    names = [stage.name for stage in select(stages, ("score", "pair"), None)]
    assert names == [f"iteration_0{number}/{kind}" for number in range(2) for kind in ("score", "pair")]
    assert [stage.name for stage in select(stages, ("score",), 1)] == ["iteration_01/score"]
    assert select(stages, (), None) == stages
    first = [stage.name for stage in select(stages, (), 0)]
    assert first == [stage.name for stage in stages if stage.name.startswith("iteration_00/")]
    assert first


@pytest.mark.parametrize(
    ("kinds", "iteration", "said"),
    [
        (("scoring",), None, "no stage is called scoring; `montessori stages` lists them"),
        (("a", "b"), None, "no stage is called a or b; `montessori stages` lists them"),
        (("score", "traim_student"), None, "no stage is called traim_student; `montessori stages` lists them"),
        (("score",), 2, "no stage is called score in iteration 2; `montessori stages` lists them"),
        ((), 2, "no stage is in iteration 2; `montessori stages` lists them"),
        (("evaluate",), 0, "no stage is called evaluate in iteration 0; `montessori stages` lists them"),
    ],
)
def test_select_refuses_what_there_is_not(kinds: tuple[str, ...], iteration: int | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select(stages_of(quickstart("iterations=2")), kinds, iteration)
    assert str(caught.value) == said


def test_jobs_name_stages_that_exist() -> None:
    kinds = {stage.kind for stage in stages_of(quickstart())}
    for script in (CONFIGS.parent / "jobs").glob("*.py"):
        for line in script.read_text().splitlines():
            if line.lstrip().startswith("job("):
                assert {kind.strip("\"' ") for kind in line.strip()[4:-1].split(",")} - {""} <= kinds, script.name


# -- what was made from what ----------------------------------------------------------------------------------------


def test_made_from_follows_every_path_and_lists_the_last_first() -> None:
    stages = stages_of(quickstart("iterations=2"))
    readers: dict[str, set[str]] = {}
    for stage in stages:
        for name in stage.inputs:
            readers.setdefault(name, set()).add(stage.output)

    def reachable(name: str) -> set[str]:
        return {name}.union(*(reachable(reader) for reader in readers.get(name, ())))

    order = [stage.output for stage in stages]
    for stage in stages:
        made = made_from(stage.output, stages)
        assert set(made) == reachable(stage.output)
        assert made == sorted(made, key=order.index, reverse=True)


def test_made_from_of_the_pairs() -> None:
    made = made_from("iteration_00/pairs", stages_of(quickstart("evaluate.fresh=0")))
    expected = ["teacher", "instructions", "responses", "training_set", "student", "evaluation"]
    assert made[::-1] == ["iteration_00/pairs", "iteration_00/teacher", *(f"final/{name}" for name in expected[1:])]


def test_made_from_refuses_unknown_names() -> None:
    with pytest.raises(ConfigError, match="no stage makes iteration_00/score; `montessori stages` lists the artifacts"):
        made_from("iteration_00/score", stages_of(quickstart()))


# -- a run and its stages -------------------------------------------------------------------------------------------


def test_a_stage_without_its_inputs_is_refused_by_what_is_missing(run: Run) -> None:
    stages = by_name(quickstart())
    with pytest.raises(RunError) as caught:
        startable([stages["iteration_00/score"]], list(stages.values()), run)
    assert str(caught.value) == (
        f"iteration_00/score needs {run.root}/iteration_00/warmed_student, which does not exist: run the stage "
        "iteration_00/warm_up first (or the whole loop with `montessori run`)"
    )


def test_what_can_run_runs_and_the_rest_waits(run: Run) -> None:
    config = quickstart("iterations=2")
    stages = by_name(config)
    every = list(stages.values())
    ready, waiting = startable(every, every, run)
    assert (ready, waiting) == (every, {})
    for stage in every:
        if stage.name.startswith("inputs/"):
            finish(run, stage, config)
    ready, waiting = startable(select(every, ("instructions", "responses"), None), every, run)
    assert [stage.name for stage in ready] == ["iteration_00/instructions", "iteration_00/responses"]
    later = ("iteration_01", "final")
    assert list(waiting) == [f"{place}/{kind}" for place in later for kind in ("instructions", "responses")]
    assert "run the stage iteration_00/tune_teacher first" in waiting["iteration_01/instructions"]


def test_the_scripts_of_jobs_make_every_stage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given again and again in the order of the algorithm, as somebody would who submits one job a stage."""
    config = quickstart("iterations=2")
    every = stages_of(config)
    kinds: dict[str, tuple[str, ...]] = {}
    for script in sorted((ROOT / "jobs").glob("*.py")):
        monkeypatch.setattr("montessori_ray.cli.job", lambda *of, name=script.stem: kinds.update({name: of}))
        if script.stem not in ("compare", "score_files"):
            runpy.run_path(str(script), run_name="__main__")
    for stage in every:
        if stage.name.startswith("inputs/"):
            finish(run, stage, config)
    iteration = ["synthesize", "split", "warm_up", "score", "pair", "tune_teacher"]
    done = []
    for script in [*iteration, *iteration, "synthesize", "train_student", "evaluate"]:
        ready, _ = startable(select(every, kinds[script], None), every, run)
        for stage in ready:
            finish(run, stage, config)
            done.append(stage.name)
    assert sorted(done) == sorted(stage.name for stage in every if not stage.name.startswith("inputs/"))


def test_states(run: Run) -> None:
    config = quickstart()
    stage = by_name(config)["inputs/reference"]
    assert state_of(stage, config, run) == "to do"
    run.artifact(stage.output).begin(identity_of(stage, config, run))
    assert state_of(stage, config, run) == "begun"
    finish(run, stage, config)
    assert state_of(stage, config, run) == "done"
    assert state_of(stage, quickstart("data.reference.rows=7"), run) == "done, with other settings"


def test_check_run_passes_what_fits_and_names_what_changed(run: Run) -> None:
    config = quickstart()
    stages = stages_of(config)
    for stage in stages:
        if not stage.name.startswith("final/"):
            finish(run, stage, config)
    check_run(stages, config, run)
    other = quickstart("score.baseline=warmed", "score.groups=7", "split.by=example")
    with pytest.raises(RunError, match=r"iteration_00/warmup_set was made with .*\(split\.by: prompt -> example\)"):
        check_run(stages_of(other), other, run)
    other = quickstart("score.baseline=warmed", "score.groups=7")
    with pytest.raises(RunError, match=r"iteration_00/influence .*\(score\.baseline: null_step -> warmed\)"):
        check_run(stages_of(other), other, run)


def test_an_input_that_is_new_is_refused_before_it_is_made(run: Run) -> None:
    """Else a judge would grade for hours, and pairs made without grades be refused after that."""
    config = quickstart()
    for stage in stages_of(config):
        if stage.name.startswith("inputs/") or stage.name.startswith("iteration_00/"):
            finish(run, stage, config)
    judged = quickstart("pair.signal=llm_judge", "pair.judge={model: pool}")
    with pytest.raises(RunError, match=r"iteration_00/pairs was .*input iteration_00/grades is new"):
        check_run(stages_of(judged), judged, run)


def test_what_does_not_decide_the_instructions_leaves_them(run: Run) -> None:
    config = quickstart()
    stages = by_name(config)
    for name in (*INPUTS, "iteration_00/instructions"):
        finish(run, stages[name], config)
    other = quickstart(
        "synthesize.max_rejected=1", "synthesize.drop_truncated=true", "synthesize.responses.max_tokens=99"
    )
    check_run(stages_of(other), other, run)
    other = quickstart("synthesize.min_characters=7")
    with pytest.raises(RunError, match=r"iteration_00/instructions .*synthesize\.min_characters: 6 -> 7"):
        check_run(stages_of(other), other, run)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize("embedded", [True, False])
def test_a_teacher_gets_the_template_given(run: Run, tmp_path: Path, embedded: bool) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    model = "embedded:smollm2-135m-instruct"
    settings = [f"run={run.root}", "telemetry.tracker=none", f"teacher.chat_template={tmp_path / 'template.jinja'}"]
    if not embedded:
        shutil.copytree(resolve_model(model), tmp_path / "teacher")
        settings.insert(0, f"teacher.model={tmp_path / 'teacher'}")
    config = quickstart(*settings)
    assert config.teacher.chat_template == template
    with pytest.raises(RunError, match="iteration_00/score needs"):
        run_loop(config, kinds=("score",))
    teacher = run.artifact("inputs/teacher")
    assert (teacher.model_path() / "chat_template.jinja").read_text() == template
    if not embedded:
        assert (teacher.model_path() / "model.safetensors").resolve() == tmp_path / "teacher/model.safetensors"
        (tmp_path / "teacher/config.json").write_text("{}")
        with pytest.raises(RunError, match="teacher, which is inputs/teacher of this run, is not the model"):
            run_loop(config, kinds=("score",))


@pytest.mark.parametrize(("gpus", "asks", "said"), [(2.0, 0, True), (2.0, 1, False), (0.0, 0, False)])
def test_gpus_that_no_stage_asks_for_are_told(run: Run, gpus: float, asks: int, said: bool) -> None:
    config = quickstart(f"score.worker.gpus={asks}", "score.groups=1")
    notes: list[str] = []
    session: Any = SimpleNamespace(connect=lambda: [{"CPU": 8.0, "GPU": gpus}], run=run, note=notes.append)
    _connect(session, config, [by_name(config)["iteration_00/score"]])
    assert notes == (
        ["the cluster has 2 GPUs, and no stage asks for one: see `worker.gpus` in its section"] if said else []
    )


def test_a_cluster_of_several_nodes_needs_folders_that_all_see(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, node = Run("memory://bucket/run"), {"CPU": 2.0}
    asked: list[list[str]] = []
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("montessori_ray.loop.unseen", lambda paths: asked.append(paths) or found)
    require_shared(bucket, [node])
    require_shared(run, [node], ["/models/teacher"])
    assert not asked
    require_shared(run, [node, node], ["/models/teacher"])
    assert asked == [[f"{run.root}/config.yaml", "/models/teacher"]]
    found.append(("10.0.0.7", ["/models/teacher"]))
    with pytest.raises(RunError, match=r"1 of 2 nodes do not see .*, 10\.0\.0\.7 has no /models/teacher: run and"):
        require_shared(run, [node, node], ["/models/teacher"])
    with pytest.raises(RunError, match=r"run=memory://.*/run is a bucket, the cluster has 2 nodes"):
        require_shared(bucket, [node, node])


def test_a_finished_stage_is_refused_when_its_input_was_made_again(run: Run) -> None:
    config = quickstart()
    stages = by_name(config)
    for name in ("inputs/reference", "inputs/seeds", "inputs/held_out"):
        finish(run, stages[name], config)
    reference = run.artifact("inputs/reference")
    reference.remove()
    reference.begin(identity_of(stages["inputs/reference"], config, run))
    run.storage.write("inputs/reference/part-000000.parquet", b"other rows")
    reference.commit(details={}, seconds=0.0)
    with pytest.raises(RunError, match=r"inputs/held_out was made .*\(input inputs/reference has other content\)"):
        check_run(list(stages.values()), config, run)


def written_config(run: Run) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(run.storage.read("config.yaml"))
    return tree


def test_run_loop_refuses_changed_settings_before_it_starts_anything(run: Run) -> None:
    config = quickstart(f"run={run.root}", "telemetry.tracker=none")
    finish(run, by_name(config)["inputs/reference"], config)
    with pytest.raises(RunError, match=r"inputs/reference was made with .*data\.reference\.rows: 32 -> 9"):
        run_loop(quickstart(f"run={run.root}", "telemetry.tracker=none", "data.reference.rows=9"))
    with run.lock():
        assert not run.storage.exists("inputs/seeds")


def test_a_refused_run_keeps_the_settings_it_was_made_with(run: Run) -> None:
    config = quickstart(f"run={run.root}", "telemetry.tracker=none")
    finish(run, by_name(config)["inputs/reference"], config)
    run.storage.write("config.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    with pytest.raises(RunError):
        run_loop(quickstart(f"run={run.root}", "telemetry.tracker=none", "data.reference.rows=9"))
    assert written_config(run)["data"]["reference"]["rows"] == 32


def test_run_loop_refuses_unknown_stages_before_it_touches_the_run(run: Run) -> None:
    with pytest.raises(ConfigError, match="no stage is called scoring"):
        run_loop(quickstart(f"run={run.root}"), kinds=("scoring",))
    assert not Path(run.root).exists()


def test_the_time_of_a_killed_session_counts(run: Run) -> None:
    """It ends with the last that it has said, and is counted once, by the next session that goes on with the stage."""
    config = quickstart(f"run={run.root}", "telemetry.tracker=none")
    stage = by_name(config)["inputs/reference"]
    run.artifact(stage.output).begin(identity_of(stage, config, run))

    def said(*events: tuple[float, str]) -> None:
        lines = [{"time": time, "event": event, "stage": stage.name} for time, event in events]
        run.storage.append("events.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    said((10, "session_started"), (20, "stage_started"), (50, "progress"))
    said((100, "session_started"), (110, "stage_started"), (120, "progress"), (180, "progress"))
    said((200, "session_started"), (210, "session_ended"))
    with Session(config) as session:
        session.execute(stage)
    assert 70 <= run.artifact(stage.output).require().seconds < 75, "the first one's 30 were added by the second"
    with Session(config) as session:
        assert session._earlier_seconds(stage.name, begun=True) == 0


def test_the_time_of_a_training_that_failed_counts_although_its_artifact_is_forgotten(run: Run) -> None:
    config = quickstart(f"run={run.root}", "telemetry.tracker=none")

    times = [(0, "session_started"), (10, "stage_started"), (20, "stage_finished")]  # and removed
    times += [(100, "session_started"), (110, "stage_started"), (150, "stage_stopped"), (190, "session_ended")]
    times += [(200, "session_started"), (210, "stage_started"), (215, "progress")]
    events = [{"time": time, "event": event, "stage": "inputs/reference"} for time, event in times]
    run.storage.write("events.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())
    with Session(config) as session:
        assert session._earlier_seconds("inputs/reference", begun=False) == 45
        assert session._earlier_seconds("inputs/reference", begun=True) == 5
        session.execute(by_name(config)["inputs/reference"])
        assert 45 <= run.artifact("inputs/reference").require().seconds < 50
        assert session._earlier_seconds("inputs/reference", begun=False) == 0


def test_a_run_goes_on_without_the_file_its_rows_came_from(run: Run, tmp_path: Path) -> None:
    """As in a job's copy of the working directory, which is deleted with the job."""
    source = tmp_path / "copy" / "rows.jsonl"
    source.parent.mkdir()
    source.write_text('{"instruction": "a", "response": "b"}\n')
    words = ["telemetry.tracker=none", f"data.reference.path={source}", "data.reference.response=response"]
    config = quickstart(f"run={run.root}", *words)
    stage = by_name(config)["inputs/reference"]
    with Session(config) as session:
        session.execute(stage)
    source.unlink()
    config = quickstart(f"run={run.root}", *words)
    assert run.artifact(stage.output).check(identity_of(stage, config, run))
    config = quickstart(f"run={run.root}", *words, f"data.reference.path={tmp_path / 'other.jsonl'}")
    with pytest.raises(RunError, match="made with other settings"):
        run.artifact(stage.output).check(identity_of(stage, config, run))


def test_an_optimizer_state_that_is_none_is_refused_before_anything_starts(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Session, "connect", lambda _: pytest.fail("a cluster was started"))
    with pytest.raises(ModelError, match=r"nowhere has no optimizer\.json and no optimizer\.safetensors"):
        run_loop(quickstart(f"run={run.root}", f"score.optimizer_state={tmp_path / 'nowhere'}"))


def test_a_session_that_cannot_start_lets_the_run_go(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.tracker is wandb, which is not installed"):
        run_loop(quickstart(f"run={run.root}", "telemetry.tracker=wandb"))
    with run.lock():
        pass


def prepare(run: Run, config: Config, *names: str) -> None:
    """Finish the inputs and these stages, in the order of the loop."""
    for stage in stages_of(config):
        if stage.name in INPUTS or stage.name in names:
            finish(run, stage, config)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is refused may have started a cluster before."""
    monkeypatch.setattr(Session, "connect", lambda _: pytest.fail("a cluster was started"))


@pytest.mark.usefixtures("no_cluster")
def test_a_single_stage_without_its_inputs_is_refused_before_a_cluster_is_started(run: Run) -> None:
    config = quickstart(f"run={run.root}", "telemetry.tracker=none")
    prepare(run, config)
    with pytest.raises(
        RunError, match=r"iteration_00/score needs .*warmed_student.*: run the stage iteration_00/warm_up"
    ):
        run_loop(config, kinds=("score",))


@pytest.mark.usefixtures("no_cluster")
def test_stages_that_lack_an_input_none_of_them_makes_are_refused_as_well(run: Run) -> None:
    config = quickstart(f"run={run.root}", "telemetry.tracker=none")
    instructions = [f"iteration_00/{kind}" for kind in ("instructions", "responses", "warmup_set")]
    prepare(run, config, *instructions)
    with pytest.raises(RunError, match=r"iteration_00/score needs .*probing_set"):
        run_loop(config, kinds=("warm_up", "score"))


WITH_KEY = "evaluate.judge={model: m, base_url: http://127.0.0.1:8000/v1, api_key_env: NO_SUCH_KEY}"


@pytest.mark.usefixtures("no_cluster")
def test_a_judge_without_its_key_is_refused_before_anything_is_made(run: Run) -> None:
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY, named by api_key_env, is not set"):
        run_loop(quickstart(f"run={run.root}", "telemetry.tracker=none", WITH_KEY))
    assert not run.storage.exists("config.yaml")
    assert not Path(run.root, "inputs").exists()


def test_only_a_judge_that_will_be_asked_needs_its_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quickstart(f"run={run.root}", WITH_KEY)
    stages = stages_of(config)
    require_keys(select(stages, ["score"], None), config, run)
    in_pool = quickstart("evaluate.judge={model: pool, api_key_env: NO_SUCH_KEY}")
    require_keys(stages_of(in_pool), in_pool, run)
    monkeypatch.setenv("NO_SUCH_KEY", "secret")
    require_keys(stages, config, run)
    monkeypatch.setenv("NO_SUCH_KEY", "")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        require_keys(stages, config, run)
    prepare(run, config, *(stage.name for stage in stages))
    require_keys(stages, config, run)


@pytest.mark.usefixtures("no_cluster")
def test_finished_stages_are_kept_and_need_no_cluster(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = quickstart(f"run={run.root}", "telemetry.tracker=none", "evaluate.fresh=0")
    names = [f"iteration_00/{kind}" for kind in ITERATION]
    prepare(run, config, *names)
    assert run_loop(config, kinds=("pair", "score")).root == run.root
    printed = capsys.readouterr().out
    for name in (*INPUTS, "iteration_00/score", "iteration_00/pair"):
        assert f"= {name:<32}" in printed
