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
    """Where in the loop a stage stands: `iteration_01/score` -> `iteration 1`, `final/...` -> `final`."""
    folder, _, rest = stage.partition("/")
    return (
        f"iteration {int(folder.removeprefix('iteration_'))}"
        if folder.startswith("iteration_")
        else folder
        if rest
        else ""
    )
