"""What a user gets wrong, through the command line: one sentence, exit code 2, no cluster started, nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Run
from montessori_ray.cli import app
from montessori_ray.config import ScoreFiles

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def _without_bars() -> None:
    """The command switches them off before it imports what draws them; here that is imported already."""
    datasets.disable_progress_bars()


def refused(run: Path, *arguments: str, command: str = "run", config: str = "configs/quickstart.yaml") -> str:
    """Give the command, expect it to be refused; returns the sentence. No Ray session may have been started."""
    ray_folder = run.with_name("ray")  # where a cluster would leave its session
    ray_folder.mkdir(exist_ok=True)
    line = [command, "--config", config, f"run={run}", *arguments]
    done = CliRunner().invoke(app, line, env={"RAY_TMPDIR": str(ray_folder)})
    assert done.exit_code == 2, done.output
    assert not list(ray_folder.rglob("session_*"))
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that loads, with random weights and a context of 128 tokens."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_missing_config(tmp_path: Path) -> None:
    assert "no config file at nowhere.yaml" in refused(tmp_path / "run", config="nowhere.yaml")


def test_from_a_shell_too_it_is_one_sentence() -> None:
    line = [sys.executable, "-m", "montessori_ray", "run", "--config", "nowhere.yaml"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no config file at nowhere.yaml")


def test_unknown_key_and_wrong_type(tmp_path: Path) -> None:
    said = refused(tmp_path / "run", "score.estimater=exact", "split.warmup=many")
    assert "score.estimater" in said
    assert "split.warmup" in said
    assert not (tmp_path / "run").exists()


def test_one_sample_a_prompt_makes_no_pair(tmp_path: Path) -> None:
    assert "a pair needs two instructions" in refused(tmp_path / "run", "synthesize.n=1")


def test_missing_empty_and_wrong_columns(tmp_path: Path) -> None:
    assert "no file at /nowhere/seeds.jsonl" in refused(tmp_path / "a", "data.seeds.path=/nowhere/seeds.jsonl")
    empty = jsonl(tmp_path / "empty.jsonl", [])
    assert "is empty" in refused(tmp_path / "b", f"data.reference.path={empty}")
    other = jsonl(tmp_path / "other.jsonl", [{"question": "Why?"}])
    said = refused(tmp_path / "c", f"data.seeds.path={other}")
    assert "no column 'instruction', only question" in said
    assert "data.seeds.instruction" in said


def test_overlap_and_too_few_seeds(tmp_path: Path) -> None:
    rows = [{"instruction": f"Name the number {n}.", "response": str(n), "category": "numbers"} for n in range(4)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    reference, held_out = (
        [f"data.{role}.path={path}", f"data.{role}.response=response"] for role in ("reference", "held_out")
    )
    both = [*reference, *held_out]
    said = refused(tmp_path / "a", *both)
    assert "of the 4 held-out rows are also in the reference set" in said
    assert "a few-shot prompt shows 8" in refused(tmp_path / "b", f"data.seeds.path={path}")
    seeds = [f"data.seeds.path={path}", "synthesize.shots=4"]
    said = refused(tmp_path / "c", *seeds, *held_out)
    assert "of the 4 held-out rows are also in the seed set" in said


def test_a_row_without_room_for_its_response_is_named_before_anything_is_written(tmp_path: Path) -> None:
    rows = [{"instruction": "Say yes.", "response": "Yes."}, {"instruction": "word " * 300, "response": "Yes."}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    settings = [f"data.held_out.path={path}", "data.held_out.response=response", "student.drop_layers=[]"]
    said = refused(tmp_path / "run", *settings)
    assert "row held_out-000001 ('word word" in said
    assert "has no response token within student.max_length" in said
    assert not (tmp_path / "run/iteration_00").exists()


def test_a_comparison_of_one_row_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Its result would have no interval, and say so after everything is trained."""
    arms = "compare={against: a, arms: {a: {tune_teacher.tunes: nothing}, b: {}}}"
    for role in ("reference", "held_out"):
        run = tmp_path / role
        settings = [f"data.{role}.rows=1", "student.drop_layers=[]"]
        assert f"inputs/{role} has one row, a comparison needs two" in refused(run, arms, *settings, command="compare")
        assert not (run / "iteration_00").exists()


def test_a_run_directory_removes_by_its_own_settings_whatever_made_it(tmp_path: Path) -> None:
    """What the refusal of other settings advises; runs of `montessori score` have no other config file."""
    run = tmp_path / "run"
    path = jsonl(tmp_path / "rows.jsonl", [{"instruction": "Say yes.", "response": "Yes."}])
    files = {name: {"path": str(path), "response": "response"} for name in ("examples", "reference")}
    job = ScoreFiles.model_validate({"run": str(run), "student": {"model": "a-student"}, "data": files})
    artifact = Run(str(run)).artifact("inputs/reference")
    artifact.begin(Identity(stage="inputs/reference", settings={}, inputs={}))
    (run / "config.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["stages", "--run", str(run), "--remove", "inputs/reference"])
    assert (done.exit_code, done.output) == (0, "removed inputs/reference\n")
    assert artifact.made_from() is None
    (run / "train/inputs-reference-0123abcd").mkdir(parents=True)  # of a training that failed nothing else is left
    done = CliRunner().invoke(app, ["stages", "--run", str(run), "--remove", "inputs/reference"])
    assert (done.exit_code, done.output) == (0, "removed inputs/reference\n")
    assert not (run / "train/inputs-reference-0123abcd").exists()
    for wrong, said in (([], "as --config FILE, or"), (["--run", str(run), "seed=3"], "leave seed=3 out")):
        done = CliRunner().invoke(app, ["stages", *wrong])
        assert (done.exit_code, said in done.stderr) == (2, True), done.output


def test_model_without_weights_tokenizer_template_or_context(tmp_path: Path, tiny_model: Path) -> None:
    def broken(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny_model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    without_weights = broken("weights")
    (without_weights / "model.safetensors").unlink()
    assert "weights" in refused(tmp_path / "a", f"teacher.model={without_weights}")
    without_tokenizer = broken("tokenizer")
    for file in without_tokenizer.glob("token*"):
        file.unlink()
    assert "tokenizer" in refused(tmp_path / "b", f"teacher.model={without_tokenizer}")
    without_template = broken("template")
    (without_template / "chat_template.jinja").unlink()
    assert "chat template" in refused(tmp_path / "c", f"teacher.model={without_template}")
    assert "128" in refused(tmp_path / "d", f"teacher.model={tiny_model}")
    assert "/nowhere" in refused(tmp_path / "e", "teacher.model=/nowhere")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}{{ message['content'] | shout }}{% endfor %}", "No filter named 'shout'"),
        (
            "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ raise_exception('no answer yet') }}"
            "{% endif %}{{ message['content'] }}{% endfor %}",
            "no answer yet",
        ),
        ("{{ messages[0]['content'] }}", "chat template"),
    ],
)
def test_a_template_that_cannot_show_a_prompt(tmp_path: Path, tiny_model: Path, template: str, reason: str) -> None:
    """Seen while the models are imported, and not once the pool is up."""
    (tmp_path / "template.jinja").write_text(template)
    said = refused(
        tmp_path / "run", f"teacher.model={tiny_model}", f"teacher.chat_template={tmp_path / 'template.jinja'}",
        "pool.max_model_len=128",
    )  # fmt: skip
    assert f"the chat template of the teacher {tiny_model} cannot show it a prompt (" in said
    assert reason in said


def test_a_model_outside_of_the_run_that_became_another(tmp_path: Path, tiny_model: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "teacher"))
    line = (f"teacher.model={folder}", "pool.max_model_len=128", "student.drop_layers=[99]")
    assert "99" in refused(tmp_path / "run", *line)
    weights = folder / "model.safetensors"
    weights.touch()
    assert "99" in refused(tmp_path / "run", *line), "the same content at another time"
    weights.write_bytes(weights.read_bytes()[:-1] + b"@")
    assert f"{folder}, which is inputs/teacher of this run, is not the model" in refused(tmp_path / "run", *line)


def test_more_than_the_machine_has(tmp_path: Path) -> None:
    said = refused(tmp_path / "run", "cluster.num_cpus=2", "pool.worker.cpus=3", command="plan")
    assert "iteration_00/instructions asks for 1 x (3 CPU)" in said
    assert "the cluster has 1 x (2 CPU" in said


@pytest.mark.parametrize(
    ("layers", "part"),
    [("a-b", "a-b"), ("3,19-10", "19-10"), ("1,,2", ""), ("7-", "7-"), ("1-1000000000", "1-1000000000")],
)
def test_layers_that_are_none(tmp_path: Path, tiny_model: Path, layers: str, part: str) -> None:
    line = ["prune-student", "--model", str(tiny_model), "--drop-layers", layers, "--output", str(tmp_path / "pruned")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(f"error: --drop-layers is {layers!r}: {part!r} is neither a layer's number nor a ")
    assert not (tmp_path / "pruned").exists()


def test_layers_and_ranges_of_them_are_read(tmp_path: Path, tiny_model: Path) -> None:
    line = ["prune-student", "--model", str(tiny_model), "--output", str(tmp_path / "pruned"), "--drop-layers"]
    assert "has layers 0 to 1; drop_layers names [3, 5, 7, 8, 9]" in CliRunner().invoke(app, [*line, "3,5, 7-9"]).stderr
    assert "without layers 1\n" in CliRunner().invoke(app, [*line, "1-1"]).stdout


def test_a_pruned_model_overwrites_nothing(tmp_path: Path, tiny_model: Path) -> None:
    copied = shutil.copytree(tiny_model, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in copied.iterdir()}

    def said(*arguments: str) -> str:
        return CliRunner().invoke(app, ["prune-student", "--drop-layers", "1", *arguments]).stderr

    assert "is no empty folder" in said("--model", str(copied), "--output", str(copied))
    assert before == {file.name: file.read_bytes() for file in copied.iterdir()}
    under_a_file = str(copied / "config.json" / "x")
    assert "cannot be made (Not a directory)" in said("--model", str(tiny_model), "--output", under_a_file)
    (copied / "config.json").unlink()
    assert "has no config.json" in said("--model", str(copied), "--output", str(tmp_path / "pruned"))


def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")


def test_a_stage_without_its_inputs_names_the_stage_that_makes_them(tmp_path: Path) -> None:
    small = ["teacher.model=embedded:smollm2-135m-instruct"]
    line = [sys.executable, "jobs/score.py", "--config", "configs/quickstart.yaml", f"run={tmp_path / 'run'}", *small]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "run the stage iteration_00/warm_up first" in done.stderr


def test_scoring_files_as_a_job_says_what_is_missing(tmp_path: Path) -> None:
    files = [part for name in ("examples", "reference") for part in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    line = [sys.executable, "jobs/score_files.py", "--student", "s", *files, "--output", str(tmp_path / "scores")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"no file at {tmp_path / 'reference.jsonl'}" in " ".join(done.stderr.split())
