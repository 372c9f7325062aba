"""What a report is made from: a run directory, its settings, and its stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from montessori_ray.artifacts.manifest import Manifest
from montessori_ray.artifacts.run import Artifact, Run
from montessori_ray.stages.base import AnySettings, Stage
from montessori_ray.telemetry.events import read_events

ARMS = "arms"
"""Folder of what the arms of a comparison do not share (`montessori_ray.comparison`)."""


@dataclass(frozen=True)
class Source:
    """A run as far as it got."""

    run: Run
    config: AnySettings
    stages: tuple[Stage, ...]
    """All stages of the run, in their order."""

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """Name of a finished stage -> the manifest of what it made."""
        found = {stage.name: self.run.artifact(stage.output).manifest() for stage in self.stages}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Events so far, without those that say how far a stage is."""
        return [event for event in read_events(self.run.storage) if event["event"] != "progress"]

    @property
    def todo(self) -> list[str]:
        """Names of the stages that are not finished."""
        return [stage.name for stage in self.stages if stage.name not in self.manifests]

    def finished(self, *kinds: str) -> Iterator[tuple[Stage, Manifest, Artifact]]:
        """The finished stages of these kinds."""
        for stage in self.stages:
            if stage.kind in kinds and stage.name in self.manifests:
                yield stage, self.manifests[stage.name], self.run.artifact(stage.output)

    def has(self, artifact: Artifact, columns: Iterable[str]) -> bool:
        """Whether a dataset has rows, with these columns."""
        manifest = artifact.manifest()
        return bool(manifest and manifest.rows and set(columns) <= manifest.columns.keys())


def place(stage: str) -> str:
    """Where a stage stands: `iteration 1` for `iteration_01/score`, `random, tuning 0, final` for
    `arms/random/tuning_0/final/instructions`, nothing for a stage by itself.
    """
    folders = [folder for folder in stage.split("/")[:-1] if folder != ARMS]
    return ", ".join(_folder(folder) for folder in folders)


def _folder(name: str) -> str:
    words, _, last = name.rpartition("_")
    return f"{words.replace('_', ' ')} {int(last)}" if words and last.isdecimal() else name.replace("_", " ")


def arm_of(stage: str) -> str | None:
    """The arm of a comparison that a stage belongs to; None for what arms share, and outside of comparisons."""
    _, found, rest = f"/{stage}".partition(f"/{ARMS}/")
    return rest.split("/")[0].replace("_", " ") if found else None
