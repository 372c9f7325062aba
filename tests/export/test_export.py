"""`montessori export`: the folder as `datasets` loads it, and cards that say what it was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard, ModelCard
from typer.testing import CliRunner

from montessori_ray.cli import app
from montessori_ray.errors import RunError
from montessori_ray.export import tables
from montessori_ray.export.write import Exported, export_run, upload
from tests.export.hub import Hub, serving_hub
from tests.report.synthetic import HOSTILE, RunWriter, comparison_writer, loop_writer, scores_writer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunWriter, Exported]:
    folder = tmp_path_factory.mktemp("export")
    writer = loop_writer(folder)
    writer.write()
    return writer, export_run(writer.run, writer.config, writer.stages, folder / "out", models=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, offline: None) -> Iterator[Hub]:
    """An empty one, which the real client takes for the Hugging Face Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with serving_hub() as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        yield served


SOURCES = {
    "training_set": {"train": "final/training_set"},
    "examples": {place: f"{place}/responses" for place in ("iteration_00", "iteration_01", "final")},
    "samples": {place: f"{place}/instructions" for place in ("iteration_00", "iteration_01", "final")},
    "influence": {place: f"{place}/influence" for place in ("iteration_00", "iteration_01")},
    "fresh_influence": {"train": "final/fresh_influence"},
    "preference_pairs": {place: f"{place}/pairs" for place in ("iteration_00", "iteration_01")},
}
"""Config -> split -> the artifact its rows are in."""


@pytest.mark.parametrize("config", SOURCES)
def test_every_config_loads_with_the_rows_of_the_run(exported: tuple[RunWriter, Exported], config: str) -> None:
    writer, out = exported
    loaded = load_dataset(str(out.folder), config)
    assert set(loaded) == set(SOURCES[config])
    for split, artifact in SOURCES[config].items():
        rows = list(writer.run.artifact(artifact).rows())
        texts = ("instruction", "response") if "influence" in config else ()
        assert [{name: row[name] for name in rows[0]} for row in loaded[split]] == rows
        assert set(loaded[split].column_names) == {*rows[0], *texts}


def test_configs_are_those_of_the_card(exported: tuple[RunWriter, Exported]) -> None:
    _, out = exported
    assert get_dataset_config_names(str(out.folder)) == list(SOURCES)
    assert load_dataset(str(out.folder))["train"].num_rows == 40, "the training set is what one gets unasked"


def test_scores_stand_beside_their_texts(exported: tuple[RunWriter, Exported]) -> None:
    writer, out = exported
    texts = {row["example_id"]: row for row in writer.run.artifact("iteration_00/probing_set").rows()}
    rows = list(load_dataset(str(out.folder), "influence")["iteration_00"])
    assert all(row["instruction"] == texts[row["example_id"]]["instruction"] for row in rows)
    assert HOSTILE in {row["instruction"] for row in rows}


def test_row_groups_are_joined_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = loop_writer(tmp_path, "iterations=1")
    writer.write()
    monkeypatch.setattr(tables, "ROWS_A_GROUP", 10)
    out = export_run(writer.run, writer.config, writer.stages, tmp_path / "out", models=False)
    rows = list(writer.run.artifact("final/training_set").rows())
    assert list(load_dataset(str(out.folder), "training_set")["train"]) == rows
    assert not (tmp_path / "out" / "models").exists()


def test_the_dataset_card_says_where_it_comes_from(exported: tuple[RunWriter, Exported]) -> None:
    writer, out = exported
    card = DatasetCard.load(out.folder / "README.md")
    assert card.data.license is None, "the user's to choose"
    assert "# license: choose one" in (out.folder / "README.md").read_text()
    for stage in writer.stages:
        manifest = writer.run.artifact(stage.output).require()
        assert manifest.digest[:16] in card.text
    for words in (
        "embedded:smollm2-135m-instruct",
        "2 iterations",
        "null_step",
        "ray 2.",
        "torch 2.",
        "negative helps",
    ):
        assert words in card.text
    provenance = json.loads((out.folder / "provenance.json").read_text())
    assert provenance["final/training_set"]["digest"] == writer.run.artifact("final/training_set").require().digest
    assert provenance["iteration_00/influence"]["identity"]["settings"]["score.baseline"] == "null_step"


def test_models_come_with_cards(exported: tuple[RunWriter, Exported]) -> None:
    writer, out = exported
    assert out.models == ["iteration_00_teacher", "iteration_01_teacher", "final_student"]
    for name, artifact in (("iteration_01_teacher", "iteration_01/teacher"), ("final_student", "final/student")):
        folder = out.folder / "models" / name
        manifest = writer.run.artifact(artifact).require()
        assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
        original = Path(writer.run.artifact(artifact).url)
        assert (folder / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "transformers"
        assert manifest.digest in card.text
        for input in manifest.identity.inputs:
            assert input in card.text
    assert "eval_after.reward_accuracy | 0.75" in (out.folder / "models/iteration_00_teacher/README.md").read_text()


def test_a_run_that_only_scores(tmp_path: Path) -> None:
    writer = scores_writer(tmp_path)
    writer.write()
    out = export_run(writer.run, writer.config, writer.stages, tmp_path / "out", models=True)
    assert out.models == []
    (row, *_) = load_dataset(str(tmp_path / "out"), "influence")["train"]
    assert row["instruction"]
    assert math.isfinite(row["influence"])


def test_a_comparison_has_a_split_for_every_arm_and_seed(tmp_path: Path) -> None:
    writer = comparison_writer(tmp_path)
    writer.write("compare/result")
    out = export_run(writer.run, writer.config, writer.stages, tmp_path / "out", models=False)
    assert len({split.path for split in out.splits}) == len(out.splits)
    loaded = load_dataset(str(tmp_path / "out"), "training_set")
    assert {"final", "montessori_tuning_0_final", "responses_tuning_1_final"} < set(loaded), "no arm's is the default"
    card = (out.folder / "README.md").read_text()
    assert "| training_set | final | " in card
    assert "| `arms/responses/tuning_1/final/training_set` |" in card
    assert "A comparison of the arms `" in card
    rows = list(writer.run.artifact("arms/responses/tuning_1/final/training_set").rows())
    assert list(loaded["responses_tuning_1_final"]) == rows


def test_an_unfinished_run_exports_what_it_has(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path)
    writer.write("iteration_00/score")
    result = CliRunner().invoke(app, ["export", writer.run.root, "--output", str(tmp_path / "out"), "--no-models"])
    assert result.exit_code == 0, result.output
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert [config["config_name"] for config in header["configs"]] == ["examples", "samples"]
    assert "data/examples/iteration_00.parquet: 96 rows" in result.output


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path)
    writer.write("iteration_00/instructions")
    with pytest.raises(RunError, match="has no dataset to export yet"):
        export_run(writer.run, writer.config, writer.stages, tmp_path / "out", models=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match="is there already and is no empty folder"):
        export_run(writer.run, writer.config, writer.stages, tmp_path / "run", models=True)


def test_an_upload_that_fails_keeps_the_export(
    exported: tuple[RunWriter, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no Hub here: what is tested is that the real client's failure becomes a sentence."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    _, out = exported
    with pytest.raises(RunError, match=f"could not upload {out.folder} to me/mine: .* log in") as caught:
        upload(out, "me/mine")
    commands = str(caught.value).rpartition("`hf ")[2].split(" && hf ")
    assert len(commands) == 1 + len(out.models), "of all that is left"
    assert all("--private" in command for command in commands)
    assert commands[0].startswith(f"upload me/mine {out.folder} --repo-type dataset")
    assert f"upload me/mine-{out.models[0]} {out.folder / 'models' / out.models[0]} --repo-type model" in commands[1]


def test_datasets_and_models_go_to_private_repositories_of_their_own(
    exported: tuple[RunWriter, Exported], hub: Hub
) -> None:
    _, out = exported
    urls = upload(out, "me/mine")
    assert len(urls) == 1 + len(out.models)
    assert all(url.startswith(hub.address) for url in urls)
    assert [told["visibility"] for told in hub.created] == ["private"] * len(urls)
    sent = {name: {path: len(content) for path, content in files.items()} for name, files in hub.files.items()}
    folders = {"datasets/me/mine": out.folder}
    folders |= {f"models/me/mine-{name}": out.folder / "models" / name for name in out.models}
    assert sent == {
        name: {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and (folder != out.folder or "models" not in path.relative_to(folder).parts)
        }
        for name, folder in folders.items()
    }  # fmt: skip
    assert hub.files["datasets/me/mine"]["README.md"] == (out.folder / "README.md").read_bytes()


def test_nothing_is_sent_to_a_repository_that_is_public_already(exported: tuple[RunWriter, Exported], hub: Hub) -> None:
    _, out = exported
    hub.private = False
    with pytest.raises(RunError, match=r"me/mine is on the Hub already and public, so nothing was sent there"):
        upload(out, "me/mine")
    assert hub.files == {}


def test_a_repository_without_an_owner_is_the_users_own(exported: tuple[RunWriter, Exported], hub: Hub) -> None:
    _, out = exported
    upload(out, "mine")
    assert set(hub.files) == {"datasets/me/mine", *(f"models/me/mine-{name}" for name in out.models)}


def test_cards_say_by_what_pairs_were_preferred(tmp_path: Path) -> None:
    writer = comparison_writer(tmp_path)
    writer.write("compare/result")
    out = export_run(writer.run, writer.config, writer.stages, tmp_path / "out", models=True)
    cards = {name: (out.folder / "models" / name / "README.md").read_text() for name in out.models}
    said = {name: card for name, card in cards.items() if "teacher" in name}
    for stage in writer.stages:
        if stage.kind == "tune_teacher":
            config = stage.config
            assert config is not None
            what = f"pairs of {config.tune_teacher.tunes}s, preferred by `{config.pair.signal}`"
            assert what in said[stage.output.replace("/", "_")]
    assert len({card.partition("preferred by")[2][:20] for card in said.values()}) > 1


def test_a_model_that_came_from_the_hub_is_named_in_the_card(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path, "iterations=1")
    writer.write()
    manifest = Path(writer.run.artifact("inputs/teacher").url) / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(told | {"details": {"hub": "meta-llama/Meta-Llama-3-8B"}}))
    out = export_run(writer.run, writer.config, writer.stages, tmp_path / "out", models=True)
    cards = {name: ModelCard.load(out.folder / "models" / name / "README.md") for name in out.models}
    assert cards["iteration_00_teacher"].data.base_model == "meta-llama/Meta-Llama-3-8B"
    assert cards["final_student"].data.base_model is None
