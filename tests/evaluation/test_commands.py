"""The commands that measure models outside of a run, as a user gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.cli import app
from montessori_ray.stages.schemas import ANSWERS
from tests.evaluation.serving import serving
from tests.tiny import write_student

ROOT = Path(__file__).parents[2]


def montessori(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output
    return result.output


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    write_student(tmp_path / "model")
    (tmp_path / "tasks.yaml").write_text("tasks: {words: 0}\nbatch_size: 4\nmodel_arguments: {device: cpu}\n")
    command = ["benchmark", "--model", str(tmp_path / "model"), "--tasks", str(tmp_path / "tasks.yaml")]
    command += ["--output", str(tmp_path / "results.json"), "task_folder=tests/evaluation/tasks"]
    printed = montessori(*command)
    accuracy = json.loads((tmp_path / "results.json").read_text())["tasks"]["words"]["metrics"]["acc"]
    assert f"acc {accuracy['value']:.4f} ± {accuracy['stderr']:.4f}" in printed
    assert "done: words" not in montessori(*command)
    assert "unknown key shots" in montessori(*command, "shots=5", status=2)


def test_mt_bench(tmp_path: Path) -> None:
    question = {"question_id": 81, "category": "writing", "turns": ["A poem!", "A shorter one!"]}
    answer = {"question_id": 81, "choices": [{"index": 0, "turns": ["Roses are red.", "Roses."]}]}
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("question", "answers", "grades")}
    command = ["mt-bench", "--questions", files["question"], "--answers", files["answers"], "--output", files["grades"]]
    with serving(lambda messages: f"Rating: {4 + messages[0]['content'].count('Roses')}") as (url, _):
        printed = montessori(*command, "model=judge", f"base_url={url}")
    assert "turn 1       5.00" in printed
    assert "turn 2       6.00" in printed
    assert "2 answers graded, 0 without a rating" in printed
    assert [json.loads(line)["judge"] for line in Path(files["grades"]).read_text().splitlines()] == ["judge"] * 2
    assert "a judge is either `pool`" in montessori(*command, "model=judge", status=2)


def test_alpaca_eval(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    for name in ("original", "trained"):
        artifact = run.artifact(f"final/answers_{name}")
        artifact.begin(Identity(stage="answer", settings={}, inputs={}))
        row = {"example_id": "h0", "instruction": "Why?", "response": name, "finish_reason": "stop", "num_tokens": 2}
        artifact.append(ANSWERS.empty_table().from_pylist([row], schema=ANSWERS))
        artifact.commit(details={}, seconds=0.0, columns={"example_id": "string"})
    montessori("alpaca-eval", str(tmp_path / "run"), "--output", str(tmp_path / "outputs"))
    expected = {"instruction": "Why?", "output": "trained", "generator": "trained", "dataset": "held_out"}
    assert json.loads((tmp_path / "outputs/trained.json").read_text()) == [expected]
    refused = montessori("alpaca-eval", str(tmp_path), "--output", str(tmp_path / "o"), status=2)
    assert "final/answers_original does not exist yet: students answer only in runs with evaluate.judge" in refused
    assert not (tmp_path / "o").exists()
