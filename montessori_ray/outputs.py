"""Files and folders outside of a run that a command writes: made, or refused in a sentence, before any work is done."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from montessori_ray.errors import RunError


def require_new(folder: Path) -> None:
    """Refuse a folder with files in it.

    Raises:
        RunError: see above.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RunError(f"{folder} is there already and is no empty folder: name another one as --output")


def new_folder(folder: Path) -> Path:
    """An empty folder, made if needed.

    Raises:
        RunError: there are files in it, or it cannot be made.
    """
    require_new(folder)
    _make(folder)
    return folder


def parent_of(file: Path) -> Path:
    """The folder of a file that is to be written, made if needed.

    Raises:
        RunError: it cannot be made.
    """
    if file.is_dir():
        raise RunError(f"{file} is a folder: name a file as --output")
    _make(file.parent)
    return file.parent


def write_whole(file: Path, text: str) -> None:
    """Write a file so that whoever reads it, after a kill too, finds all of the old text or all of the new one."""
    temporary = parent_of(file) / f".{file.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}): name another --output") from None
