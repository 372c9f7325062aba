"""The cards: what a dataset or a model is, and what it was made from, by whom a reader can check it (README.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from montessori_ray.artifacts.manifest import Manifest
from montessori_ray.config import Config
from montessori_ray.export.tables import Split
from montessori_ray.stages.base import AnySettings

LICENSE = (
    "# license: choose one, e.g. `license: apache-2.0`. The licences of the teacher and of the seed, reference and "
    "held-out data bind what was made with them.\n"
)
PROJECT = "montessori_ray ([Montessori-Instruct](https://arxiv.org/abs/2410.14208) on Ray)"


def dataset_card(
    name: str, config: AnySettings, splits: Sequence[Split], manifests: dict[str, Manifest], models: Sequence[str]
) -> str:
    """Card of the exported datasets.

    Args:
        name: of the run.
        config: its settings.
        splits: what was written.
        manifests: artifact -> manifest, of all finished stages.
        models: names of the folders in `models/`.
    """
    kinds = list(dict.fromkeys(split.kind.config for split in splits))
    header: dict[str, Any] = {
        "pretty_name": name,
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "instruction-tuning", "influence", "montessori-instruct"],
        "configs": [_config(kind, splits, is_default=kind == kinds[0]) for kind in kinds],
    }
    return "\n".join(
        [
            _header(header),
            f"# {name}",
            f"Made by {PROJECT}. {_who(config)}",
            "```python\nfrom datasets import load_dataset\n\n"
            f'rows = load_dataset("{{this folder or repository}}", "{kinds[0]}")\n```',
            "## Configs",
            _table(
                ("config", "split", "rows", "artifact", "what a row is"),
                [
                    (split.kind.config, split.split, f"{split.rows:,}", f"`{split.artifact}`", split.kind.about)
                    for split in splits
                ],
            ),
            "Columns: "
            + "; ".join(f"`{kind}`: {', '.join(_columns(splits, kind))}" for kind in kinds)
            + ". Tables made in one place of the run join on `example_id` and `prompt_id`, pairs by `chosen_id` and "
            "`rejected_id`; other places may use the same ids for other texts.",
            *([f"Models made in the same run: {', '.join(models)}."] if models else []),
            "## Provenance",
            "Digests are SHA-256 over a run's files; `provenance.json` has them in full, with every setting.",
            _table(
                ("artifact", "rows", "digest", "made from"),
                [
                    (
                        artifact,
                        "model" if manifest.rows is None else f"{manifest.rows:,}",
                        f"`{manifest.digest[:16]}`",
                        ", ".join(manifest.identity.inputs),
                    )
                    for artifact, manifest in manifests.items()
                ],
            ),
            _versions(list(manifests.values())),
            "",
        ]
    )


def _config(kind: str, splits: Sequence[Split], *, is_default: bool) -> dict[str, Any]:
    """A config as the Hub's card header has it."""
    files = [{"split": split.split, "path": split.path} for split in splits if split.kind.config == kind]
    return {"config_name": kind, **({"default": True} if is_default else {}), "data_files": files}


def model_card(name: str, what: str, base_model: str | None, manifest: Manifest) -> str:
    """Card of one model.

    Args:
        name: of the model.
        what: how it was made, in a sentence.
        base_model: what it was tuned from, where that is a name on the Hub.
        manifest: of its artifact.
    """
    header: dict[str, Any] = {
        **({"base_model": base_model} if base_model else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["montessori-instruct"],
    }
    numbers = [(key, f"{value:.5g}") for key, value in _flat(manifest.details) if isinstance(value, int | float)]
    return "\n".join(
        [
            _header(header),
            f"# {name}",
            f"{what} Made by {PROJECT}.",
            *(["## Numbers", _table(("", "value"), numbers)] if numbers else []),
            "## Provenance",
            _table(
                ("made from", "digest"), [(input, f"`{digest}`") for input, digest in manifest.identity.inputs.items()]
            ),
            f"Digest of this model's files (SHA-256): `{manifest.digest}`.",
            _versions([manifest]),
            "## Settings",
            _table(("setting", "value"), [(key, f"`{value}`") for key, value in manifest.identity.settings.items()]),
            "",
        ]
    )


def _who(config: AnySettings) -> str:
    student = f"`{config.student.model}`"
    if config.student.drop_layers:
        student += f" (without layers {', '.join(map(str, config.student.drop_layers))})"
    scored = f"Influence by `{config.score.estimator}` against `{config.score.baseline}`."
    if not isinstance(config, Config):
        return f"Scored for the student {student}. {scored}"
    iterations = f"{config.iterations} iteration" + ("s" if config.iterations > 1 else "")
    said = f"Teacher `{config.teacher.model}`, student {student}, {iterations}. {scored}"
    if config.compare is None:
        return said
    arms = ", ".join(f"`{name}`" for name in config.compare.arms)
    return (
        f"{said} A comparison of the arms {arms}: what a split without an arm's name holds was made once for all arms "
        "that need it, as the artifacts of the provenance say."
    )


def _columns(splits: Sequence[Split], config: str) -> list[str]:
    return next(split.columns for split in splits if split.kind.config == config)


def _versions(manifests: Sequence[Manifest]) -> str:
    found: dict[str, list[str]] = {}
    for manifest in manifests:
        for library, version in manifest.versions.items():
            if version not in found.setdefault(library, []):
                found[library].append(version)
    return f"Versions: {', '.join(f'{name} {joined}' for name, joined in sorted(_joined(found)))}."


def _joined(versions: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, " and ".join(found)) for name, found in versions.items()]


def _flat(details: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested details as dotted names and values."""
    found: list[tuple[str, Any]] = []
    for key, value in details.items():
        found += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", value)]
    return found


def _header(fields: dict[str, Any]) -> str:
    return f"---\n{LICENSE}{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars and line breaks in cells are made harmless."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")
