"""`montessori score`: any examples for any student, checked before anything starts, continued, and with its tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.table import Table
from safetensors.torch import save_file
from typer.testing import CliRunner

from montessori_ray.artifacts.storage import Storage
from montessori_ray.cli import app
from montessori_ray.config import ScoreFiles, score_settings
from montessori_ray.errors import ConfigError
from montessori_ray.influence.update import AdamW
from montessori_ray.models import OPTIMIZER_TENSORS
from montessori_ray.scoring import stages_of_scoring
from montessori_ray.session import Session
from montessori_ray.stages.base import identity_of
from montessori_ray.telemetry.console import influence_tables, terminal
from montessori_ray.telemetry.events import EventLog
from montessori_ray.training.student_state import OPTIMIZER_JSON

ROWS = [
    {"instruction": "Name a prime number.", "response": "Seven is a prime number."},
    {"instruction": "What do bees make?", "response": "Bees make honey."},
    {"instruction": "Spell cat.", "response": "C, a, t."},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    examples = [{"example_id": f"mine-{number}", **row} for number, row in enumerate(ROWS)]
    return {
        "examples": write(tmp_path / "examples.jsonl", [*examples, {**ROWS[0], "example_id": "mute", "response": ""}]),
        "reference": write(tmp_path / "reference.jsonl", ROWS[1:]),
        "output": tmp_path / "scores",
    }


def command(files: dict[str, Path], *more: str, student: str = "embedded:smollm2-135m-instruct") -> list[str]:
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    return ["score", "--student", student, *options, "telemetry.tracker=none", *more]


def said(arguments: list[str]) -> str:
    """What a refused command says, on one line."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_bad_input_is_said_before_anything_starts(files: dict[str, Path], tmp_path: Path) -> None:
    assert "no file at" in said(command({**files, "examples": tmp_path / "none.jsonl"}))
    assert "score.estimator is 'exakt'" in said(command(files, "estimator=exakt"))
    assert "unknown key score.estimate" in said(command(files, "estimate=exact"))
    twice = write(tmp_path / "twice.jsonl", [{**ROWS[0], "example_id": "a"}, {**ROWS[1], "example_id": "a"}])
    assert "has the example_id 'a' twice" in said(command({**files, "examples": twice}))
    unmarked = write(tmp_path / "unmarked.jsonl", [{"instruction": "Hm?", "output": "x"}])
    assert "has no column 'response'" in said(command({**files, "reference": unmarked, "output": tmp_path / "other"}))
    assert "backend local holds the student on one device" in said(command(files, "backend=local", "group_size=2"))
    assert "precision tf32 needs worker.gpus" in said(command(files, "precision=tf32"))
    assert "offload is for backend zero with zero_stage 1 to 3" in said(command(files, "offload=true", "zero_stage=3"))


def no_cluster(_: Session) -> None:
    raise ConfigError("no cluster today")


def test_a_student_without_moments_must_be_given_some_or_a_rate(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = said(command(files))
    assert "has no optimizer.json, so the student was not warmed up" in words
    assert "data.warm_up" in words
    assert "score.learning_rate" in words
    monkeypatch.setattr(Session, "connect", no_cluster)
    assert "no cluster today" in said(command(files, "score.learning_rate=1e-3")), "its own advice, in the same run"


def save_rule(folder: Path, learning_rate: float) -> None:
    fields = {name: getattr(AdamW.fresh(learning_rate), name) for name in AdamW.__slots__}
    (folder / OPTIMIZER_JSON).write_text(json.dumps(fields), encoding="utf-8")
    save_file({}, folder / OPTIMIZER_TENSORS)


def test_an_optimizer_state_that_changes_between_sessions_is_refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows would come from two states; the same content at a later time is the same state."""

    def begin_and_fail(session: Session) -> None:
        assert isinstance(session.config, ScoreFiles)
        stage = stages_of_scoring(session.config)[-1]
        session.run.artifact(stage.output).begin(identity_of(stage, session.config, session.run))
        no_cluster(session)

    monkeypatch.setattr(Session, "connect", begin_and_fail)
    state = tmp_path / "state"
    state.mkdir()
    save_rule(state, learning_rate=1e-3)
    arguments = command(files, "--optimizer-state", str(state))
    for _ in range(2):
        assert "no cluster today" in said(arguments)
        (state / OPTIMIZER_JSON).touch()
    save_rule(state, learning_rate=2e-3)
    words = said(arguments)
    assert "influence was made with other settings" in words
    assert "score.optimizer_state: state (content " in words


def test_status_says_how_far_scoring_is_and_with_how_many_groups(tmp_path: Path) -> None:
    file = {"path": "rows.jsonl", "response": "response"}
    settings = score_settings(
        {"run": str(tmp_path), "student": {"model": "m"}, "data": {"examples": file, "reference": file}}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    EventLog(Storage(str(tmp_path))).write(
        "progress", stage="score", done=40, total=100, unit="points", rate=2.0, note="3 of 4 groups"
    )
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "0 of 4 stages done, next inputs/reference" in result.output
    assert "score: 40/100 points · 2.00/s · 0:30 left · 3 of 4 groups (0:00 ago)" in result.output


def test_tables_of_scores() -> None:
    rows = [
        {"example_id": str(number), "influence": value, "influence_se": None if number else 0.1, "quarantine": None}
        for number, value in enumerate((-2.0, -1.0, 1.0))
    ]
    details = {
        "scored": 3, "share_helpful": 2 / 3, "influence": {"mean": -2 / 3, "se": 0.9},
        "quarantined": {"empty response": 1},
        "recheck": {"points": 2, "noise": 0.01, "same_sign": 1.0, "spearman": None},
    }  # fmt: skip
    examples = [{"example_id": str(number), "instruction": f"do {number}"} for number in range(3)]
    histogram, ends, sentence = influence_tables(details, lambda: iter(rows), examples)
    assert sum(int(cell) for cell in histogram.columns[1].cells) == 3  # type: ignore[union-attr]
    assert list(ends.columns[0].cells) == ["-2.00e+00 ± 1.0e-01", "-1.00e+00", "+1.00e+00"]  # type: ignore[union-attr]
    assert "3 scored, 67% help" in str(sentence)
    assert "1 without a score {'empty response': 1}" in str(sentence)
    assert "2 scored again (exact, float32): noise 1.0e-02, 100% of one sign" in str(sentence)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.lora={rank: 8}", r"student\.lora says how the student is warmed up, but there are no rows"),
        ("warm_up.epochs=3", "warm_up says how the student is warmed up, but there are no rows"),
        ("student.drop_layers=[1]", r"has no optimizer state: warm it up .* or set score\.learning_rate"),
    ],
)
def test_settings_of_a_warm_up_that_is_not_made_are_refused(override: str, said: str) -> None:
    tree = {
        "run": "scores", "student": {"model": "s"},
        "data": {name: {"path": f"{name}.jsonl"} for name in ("examples", "reference")},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        score_settings(tree, [override])


def test_instructions_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Not as markup of the terminal's, in which "[/INST]" is an error and "[red]" a colour."""
    table = Table("instruction")
    table.add_row("Write a poem [/INST] with [red] words :smile:")
    terminal().print(table, "results: /runs/[bold]")
    said = capsys.readouterr().out
    assert "Write a poem [/INST] with [red] words :smile:" in said
    assert "results: /runs/[bold]" in said


@pytest.mark.slow
def test_scores_files_with_fresh_moments_and_continues(files: dict[str, Path]) -> None:
    from montessori_ray.artifacts.run import Run

    arguments = command(files, "learning_rate=1e-6", "estimator=corrected", "correction_rows=1", "recheck=1")
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    rows = {row["example_id"]: row for row in Run(str(files["output"])).artifact("influence").rows()}
    assert rows.keys() == {"mine-0", "mine-1", "mine-2", "mute"}
    assert rows["mute"]["quarantine"] == "empty response"
    assert rows["mine-0"]["recheck_influence"] == pytest.approx(rows["mine-0"]["influence"], rel=0.5)
    assert rows["mine-1"]["influence"] < 0, "a step on a reference row itself helps"
    assert "Influence (negative helps)" in first.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "kept" in again.output
    assert "score.estimator: corrected -> exact" in said(command(files, "learning_rate=1e-6", "estimator=exact"))
