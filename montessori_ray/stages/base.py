"""What a stage is: one artifact made from others by a function, under settings that decide its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import pyarrow as pa
from typing_extensions import TypeVar

from montessori_ray.artifacts.manifest import Identity
from montessori_ray.artifacts.run import Artifact, Run
from montessori_ray.config import Config, ScoreFiles, Section, content_settings
from montessori_ray.synthesis.client import PoolClient
from montessori_ray.telemetry.progress import ProgressChannel

Settings = TypeVar("Settings", bound=Section, covariant=True, default=Config)
"""The settings of a stage's job: the loop's, or those of scoring files."""

AnySettings = Config | ScoreFiles


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the loop; `montessori_ray.loop.stages_of` lists them all."""

    name: str
    """Unique name, e.g. `iteration_00/score`."""
    output: str
    """The artifact it makes, e.g. `iteration_00/influence`."""
    body: Callable[[StageContext[Any]], dict[str, Any]]
    """Makes the output; returns the details for its manifest. Continues what an earlier session committed."""
    inputs: tuple[str, ...] = ()
    """Artifacts it reads."""
    settings: tuple[str, ...] = ()
    """Dotted config keys that decide its content."""
    schema: pa.Schema | None = None
    """Schema of the rows; None for a model."""
    teacher: str | None = None
    """The model artifact the teacher pool must host while it runs."""
    bundles: tuple[dict[str, float], ...] = ()
    """Ray resource requests it holds at once, besides the pool."""
    rows: int | None = None
    """Rows it is planned to make, where the settings say so."""
    config: Config | None = None
    """Settings of its own, where it belongs to an arm of a comparison."""

    @property
    def kind(self) -> str:
        """Name without the iteration, e.g. `score`."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class StageContext(Generic[Settings]):
    """What the body of a stage works with."""

    stage: Stage
    config: Settings
    run: Run
    progress: ProgressChannel
    note: Callable[..., None]
    """`note("one sentence for the user", key=value, ...)`: an event, shown on the console."""
    client: PoolClient | None = None
    """Client of the teacher pool; set when the stage names a teacher."""

    @cached_property
    def output(self) -> Artifact:
        """The artifact this stage makes."""
        return self.run.artifact(self.stage.output)

    def input(self, position: int) -> Artifact:
        """An input by its position in `stage.inputs`."""
        return self.run.artifact(self.stage.inputs[position])

    def model(self, position: int) -> Path:
        """The folder of an input that is a model."""
        return self.input(position).model_path()

    @property
    def pool(self) -> PoolClient:
        """The client of the teacher pool."""
        assert self.client is not None, f"{self.stage.name} uses the pool but names no teacher"
        return self.client

    @property
    def train_name(self) -> str:
        """Name under which Ray Train keeps this stage's checkpoints: another one for other settings or inputs."""
        identity = identity_of(self.stage, self.config, self.run).model_dump_json()
        return f"{self.stage.name.replace('/', '-')}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Commit rows of the output as one part; nothing happens for no rows."""
        assert self.stage.schema is not None
        if rows := list(rows):
            self.output.append(pa.Table.from_pylist(rows, schema=self.stage.schema))


def identity_of(stage: Stage, config: Section, run: Run, to_come: Mapping[str, str] | None = None) -> Identity:
    """What the stage's output is made from; `to_come`: digests that inputs are taken to have that do not exist yet.

    Raises:
        RunError: an input does not exist, and `to_come` is not given.
    """
    inputs = {name: _digest_of(run.artifact(name), to_come) for name in stage.inputs}
    settings = content_settings(stage.config or config, stage.settings)
    return Identity(stage=stage.name, settings=settings, inputs=inputs)


def _digest_of(artifact: Artifact, to_come: Mapping[str, str] | None) -> str:
    if to_come is not None and artifact.manifest() is None:
        return to_come.get(artifact.name, "")
    return artifact.require().digest


def bundles_of(stage: Stage, config: AnySettings) -> list[dict[str, float]]:
    """Everything a stage holds at once: its own workers, and the pool where it uses it or it stays up."""
    if isinstance(config, ScoreFiles):
        return list(stage.bundles)
    pool = [config.pool.worker.bundle] * config.pool.replicas
    return [*stage.bundles, *(pool if stage.teacher or (config.pool.resident and stage.bundles) else [])]
