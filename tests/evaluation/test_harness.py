"""The adapter of lm-evaluation-harness on a local task and a tiny model, against the likelihoods computed here."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from montessori_ray.config import Benchmarks, load_benchmarks
from montessori_ray.errors import ConfigError, ModelError, RunError
from montessori_ray.evaluation.harness import run_benchmarks
from tests.tiny import write_student

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests/evaluation/tasks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_student(folder)
    return folder


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def settings(**others: object) -> Benchmarks:
    tree = {"tasks": {"words": 0}, "task_folder": str(TASKS), "batch_size": 4}
    return Benchmarks.model_validate(tree | others)


def accuracy(folder: Path) -> float:
    """Share of questions whose right choice is the most likely next word."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in (TASKS / "words.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        prompt = tokenizer(row["question"], return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            likely = model(prompt).logits[0, -1, tokenizer.convert_tokens_to_ids(row["choices"])]
        right += int(likely.argmax()) == row["answer"]
    return right / len(rows)


def test_a_task_is_scored_as_the_model_finds_its_choices(model: Path, tmp_path: Path) -> None:
    found = run_benchmarks(model, settings(), tmp_path / "results.json")
    words = found["tasks"]["words"]
    expected = accuracy(model)
    assert 0 < expected < 1
    assert (words["shots"], words["questions"]) == (0, 24)
    assert words["metrics"]["acc"]["value"] == pytest.approx(expected)
    stderr = (expected * (1 - expected) / 23) ** 0.5
    assert words["metrics"]["acc"]["stderr"] == pytest.approx(stderr)
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_finished_tasks_are_kept_and_other_settings_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    first = run_benchmarks(model, settings(), output)
    done: list[str] = []
    both = settings(tasks={"words": 0, "words_zero_shot": 0})
    second = run_benchmarks(model, both, output, on_task=lambda task, _: done.append(task))
    assert done == ["words_zero_shot"]
    assert second["tasks"]["words"] == first["tasks"]["words"]
    with pytest.raises(RunError, match="results of another settings, words"):
        run_benchmarks(model, settings(tasks={"words": 3}, limit=5), output)


def test_results_are_written_where_a_folder_must_be_made_and_other_files_are_left_alone(
    model: Path, tmp_path: Path
) -> None:
    run_benchmarks(model, settings(), tmp_path / "results" / "a.json")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["a.json"]
    for content in ("", "[1]", '{"tasks"'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(RunError, match=r"other\.json (cannot be read|holds no).*results.*: choose another output"):
            run_benchmarks(model, settings(), tmp_path / "other.json")
        assert (tmp_path / "other.json").read_text() == content


def test_a_folder_trained_again_is_another_model(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(model, folder)
    output = folder / "results.json"  # which is no part of the model
    first = run_benchmarks(folder, settings(), output)
    assert run_benchmarks(folder, settings(), output) == first
    trained = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(trained.get_output_embeddings().weight)
    trained.save_pretrained(folder)
    with pytest.raises(RunError, match="results of another version of the model: choose another output"):
        run_benchmarks(folder, settings(), output)


def test_shots_are_shown_or_refused(model: Path, tmp_path: Path) -> None:
    few = run_benchmarks(model, settings(tasks={"words": 3}, limit=5), tmp_path / "few.json")["tasks"]["words"]
    assert (few["shots"], few["questions"]) == (3, 5)
    mixed = settings(tasks={"words": 3, "words_zero_shot": 3}, limit=5)
    with pytest.raises(ConfigError, match=r"with 3 shots, lm-evaluation-harness fixes 0 for \['words_zero_shot'\]"):
        run_benchmarks(model, mixed, tmp_path / "zero.json")
    assert not (tmp_path / "zero.json").exists()  # refused before any task is run


def test_a_model_that_cannot_be_loaded_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        run_benchmarks(tmp_path, settings(), tmp_path / "results.json")
    with pytest.raises(ModelError, match=r"cannot load .* with .*no_such_argument"):
        run_benchmarks(model, settings(model_arguments={"no_such_argument": 1}), tmp_path / "results.json")


@pytest.mark.skipif("vllm" in packages_distributions().get("vllm", []), reason="vllm for GPUs is installed")
def test_vllm_as_a_backend_needs_the_package_of_that_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backend=vllm: there is no package vllm here .*take backend=hf"):
        run_benchmarks(model, settings(backend="vllm"), tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow  # the index of all the harness's tasks
def test_the_papers_tasks_are_tasks_of_the_harness_and_a_misspelt_one_is_not(tmp_path: Path) -> None:
    paper = load_benchmarks(ROOT / "configs/benchmarks_paper.yaml")
    assert paper.tasks == {"mmlu": 0, "gpqa_main_zeroshot": 0, "arc_challenge": 25, "gsm8k": 8, "hellaswag": 8}
    with pytest.raises(ConfigError, match=r"has no task wrods:"):  # and nothing of the paper's is missing
        run_benchmarks(tmp_path, paper.model_copy(update={"tasks": paper.tasks | {"wrods": 0}}), tmp_path / "r.json")
