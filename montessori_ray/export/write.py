"""Exporting a run into a folder, and that folder to the Hugging Face Hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from montessori_ray.artifacts.manifest import Manifest
from montessori_ray.artifacts.run import BEGUN, LOCATION, MANIFEST, Run
from montessori_ray.config import Config
from montessori_ray.errors import RunError
from montessori_ray.export.cards import dataset_card, model_card
from montessori_ray.export.tables import KINDS, Split, write_split
from montessori_ray.outputs import new_folder, require_new
from montessori_ray.stages.base import AnySettings, Stage

CARD = "README.md"
MODELS = "models"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    folder: Path
    splits: list[Split]
    models: list[str]
    """Names of the folders in `models/`."""

    def said(self) -> list[str]:
        """A line for each thing written."""
        lines = [f"{self.folder / split.path}: {split.rows:,} rows" for split in self.splits]
        return [*lines, *(f"{self.folder / MODELS / name}: model" for name in self.models)]


def export_run(run: Run, config: AnySettings, stages: list[Stage], output: Path, *, models: bool) -> Exported:
    """Write what the run has of datasets and, if asked, models into `output`.

    Raises:
        RunError: there is nothing to export yet, or the folder has files in it.
    """
    require_new(output)
    found = {stage.output: run.artifact(stage.output).manifest() for stage in stages}
    manifests = {name: manifest for name, manifest in found.items() if manifest is not None}
    chosen = [stage for kind in KINDS for stage in stages if stage.kind == kind and _has_rows(manifests, stage)]
    if not chosen:
        raise RunError(f"{run.root} has no dataset to export yet: `montessori status {run.root}` says where it stands")
    new_folder(output)
    compared = isinstance(config, Config) and config.compare is not None
    splits = [write_split(run, stage, output, compared=compared) for stage in chosen]
    copied = _copy_models(run, config, stages, manifests, output / MODELS) if models else []
    provenance = {name: manifest.model_dump(mode="json") for name, manifest in manifests.items()}
    (output / "provenance.json").write_text(json.dumps(provenance, indent=1), encoding="utf-8")
    card = dataset_card(run.root.rstrip("/").rsplit("/", 1)[-1], config, splits, manifests, copied)
    (output / CARD).write_text(card, encoding="utf-8")
    return Exported(folder=output, splits=splits, models=copied)


def _has_rows(manifests: dict[str, Manifest], stage: Stage) -> bool:
    return stage.output in manifests and bool(manifests[stage.output].rows)


def _copy_models(
    run: Run, config: AnySettings, stages: list[Stage], manifests: dict[str, Manifest], folder: Path
) -> list[str]:
    """The tuned teachers and the trained student, each with a card; a warmed student stays in the run."""
    copied = []
    for stage in stages:
        if stage.kind not in ("tune_teacher", "train_student") or stage.output not in manifests:
            continue
        name = stage.output.replace("/", "_")
        source = run.artifact(stage.output).model_path()
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(BEGUN, MANIFEST, LOCATION))
        original = "inputs/teacher" if stage.kind == "tune_teacher" else "inputs/student"
        base = manifests[original].details.get("hub")
        card = model_card(name, _how(stage, stage.config or config), base, manifests[stage.output])
        (folder / name / CARD).write_text(card, encoding="utf-8")
        copied.append(name)
    return copied


def _how(stage: Stage, config: AnySettings) -> str:
    source, rows = stage.inputs[:2]
    if stage.kind == "tune_teacher":
        assert isinstance(config, Config), "only the loop tunes teachers"
        return (
            f"A teacher, `{source}`, tuned by DPO on `{rows}`: pairs of {config.tune_teacher.tunes}s, preferred by "
            f"`{config.pair.signal}`."
        )
    return f"A student, `{source}`, fine-tuned on what its teacher wrote, `{rows}`."


def upload(exported: Exported, repository: str) -> list[str]:
    """Upload to the Hub, private: the datasets to `repository`, each model to `repository-NAME`; returns their URLs.
    A `repository` without an owner is the user's own.

    Raises:
        RunError: the Hub did not take it, or a repository is there already and public; the export stays where it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    parts = [(repository, "dataset", exported.folder)]
    parts += [(f"{repository}-{name}", "model", exported.folder / MODELS / name) for name in exported.models]
    urls = []
    for number, (name, kind, folder) in enumerate(parts):
        try:
            made = api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            if not api.repo_info(made.repo_id, repo_type=kind).private:  # one that is there stays as it is
                raise RunError(
                    f"{made.repo_id} is on the Hub already and public, so nothing was sent there: make it private in "
                    f"its settings, or give another name; the export is complete in {exported.folder}"
                )
            api.upload_folder(
                repo_id=made.repo_id, repo_type=kind, folder_path=folder,
                commit_message="Export of a montessori_ray run",
                ignore_patterns=[f"{MODELS}/**"] if kind == "dataset" else None,
            )  # fmt: skip
        except RunError:
            raise
        except Exception as error:  # the client also lets errors of its HTTP library through
            left = " && ".join(_upload_command(*part) for part in parts[number:])
            raise RunError(
                f"could not upload {folder} to {name}: {error}; the export is complete: log in with `hf auth login`, "
                f"then `{left}`"
            ) from None
        urls.append(str(made))
    return urls


def _upload_command(name: str, kind: str, folder: Path) -> str:
    models = f" --exclude '{MODELS}/**'" if kind == "dataset" else ""
    return f"hf upload {name} {folder} --repo-type {kind} --private{models}"
