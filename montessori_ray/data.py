"""Rows a user brings: Parquet, JSONL, Arrow or Hub datasets, read once into the run with the project's own columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from montessori_ray.config import DataFile
from montessori_ray.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
"""File ending -> 🤗 Datasets reader."""


def read_rows(role: str, file: DataFile, *, needs_response: bool) -> Iterator[dict[str, Any]]:
    """Rows `example_id, instruction, response, category` of the file or dataset called `role` in the config.

    Args:
        role: `seeds`, `reference` or `held_out`; prefix of the ids.
        file: where the rows are and how their columns are called.
        needs_response: whether every row must have a response; others have None.

    Raises:
        DataError: nothing is there, it cannot be read, a column is missing, or no row is left.
    """
    table = _open(role, file)
    _require_columns(role, file, table, needs_response)
    stop = len(table) if file.rows is None else min(file.start + file.rows, len(table))
    if stop <= file.start:
        raise DataError(f"data.{role}: {file.path} has {len(table)} rows, none from row {file.start} on")
    for number in range(file.start, stop):
        row = table[number]
        where = f"data.{role}: row {number} of {file.path}"
        instruction = _text(where, row, file.instruction)
        extra = _text(where, row, file.input) if file.input else ""
        response = _text(where, row, file.response) if file.response else None
        if not instruction or (needs_response and not response):
            missing = file.response if instruction else file.instruction
            raise DataError(f"{where} has an empty {missing!r}; remove or fill it")
        category = row[file.category] if file.category else None
        yield {
            "example_id": f"{role}-{number:06d}",
            "instruction": f"{instruction}\n\n{extra}" if extra else instruction,
            "response": response,
            "category": None if category is None else str(category),
        }


def read_examples(file: DataFile) -> Iterator[dict[str, Any]]:
    """Rows `example_id, prompt_id, instruction, response` to score; an empty response is a row all the same.

    Columns `example_id` and `prompt_id` are kept where the file has them; an example without a prompt is its own.

    Raises:
        DataError: as `read_rows`, no column of responses is named, or an `example_id` occurs twice.
    """
    table = _open("examples", file)
    if file.response is None:
        raise DataError(
            f"data.examples: no column of {file.path} is said to hold responses, and an example is scored by its own: "
            "set data.examples.response"
        )
    seen: set[str] = set()
    for number, row in enumerate(read_rows("examples", file, needs_response=False), start=file.start):
        given = table[number]
        example_id = _id(given.get("example_id")) or row["example_id"]
        if example_id in seen:
            raise DataError(f"data.examples: {file.path} has the example_id {example_id!r} twice; make them unique")
        seen.add(example_id)
        yield {
            "example_id": example_id,
            "prompt_id": _id(given.get("prompt_id")) or example_id,
            "instruction": row["instruction"],
            "response": row["response"] or "",
        }


def _id(cell: Any) -> str:
    """A cell that names a row; empty for none. Whole numbers that pandas made floats of are whole again."""
    if cell is None or cell != cell:
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell)


def _text(where: str, row: dict[str, Any], column: str) -> str:
    """A cell without white space around it; empty for none."""
    cell = row[column]
    if cell is None or isinstance(cell, str):
        return (cell or "").strip()
    raise DataError(f"{where} has a {type(cell).__name__} in {column!r}, expected text")


def require_disjoint(name: str, rows: list[str], other_name: str, other_rows: list[str]) -> None:
    """Refuse two sets of instructions that share one, letter case and white space aside.

    Raises:
        DataError: they overlap; names the count and one of the shared instructions.
    """
    seen = {normalised(row) for row in other_rows}
    shared = [row for row in rows if normalised(row) in seen]
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(rows)} {name} rows are also in the {other_name} set (first: "
            f"{shared[0][:60]!r}); the held-out result would be worth nothing, remove them from one of the two"
        )


def normalised(text: str) -> str:
    """The text by which two rows are the same: letter case and white space aside."""
    return re.sub(r"\s+", " ", text).strip().casefold()


def _open(role: str, file: DataFile) -> Dataset:
    path = Path(file.path)
    looks_local = path.suffix in READERS or "://" in file.path or path.is_absolute() or path.exists()
    if looks_local and "://" not in file.path and not path.exists():
        raise DataError(f"data.{role}: no file at {file.path}")

    import datasets  # late: takes seconds, and reads at its import whether the command line wants its progress bars

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every read of a local file sends a request to the Hub
    try:
        if not looks_local:
            return datasets.load_dataset(file.path, split=file.split)
        files = sorted(map(str, path.glob("*"))) if path.is_dir() else [file.path]
        files = [name for name in files if Path(name).suffix in READERS]
        if not files:
            raise DataError(f"data.{role}: {file.path} holds no {', '.join(READERS)} file")
        if path.exists() and all(_is_empty(name) for name in files):
            raise DataError(f"data.{role}: {file.path} is empty: it has 0 rows, none from row {file.start} on")
        return datasets.load_dataset(READERS[Path(files[0]).suffix], data_files=files, split="train")
    except DataError:
        raise
    except Exception as error:  # Datasets wraps what readers raise in types of its own; all mean the same here
        cause = error.__cause__ or error
        raise DataError(f"data.{role}: cannot read {file.path}: {type(cause).__name__}: {cause}") from error


def _is_empty(name: str) -> bool:
    """Whether a local file has no row, as far as can be told without reading it; Datasets' own words are obscure."""
    if not Path(name).stat().st_size:
        return True
    return Path(name).suffix == ".parquet" and pq.read_metadata(name).num_rows == 0


def _require_columns(role: str, file: DataFile, table: Dataset, needs_response: bool) -> None:
    if needs_response and file.response is None:
        raise DataError(f"data.{role}.response is not set: name the column of {file.path} with the responses")
    for field in ("instruction", "input", "response", "category"):
        column = getattr(file, field)
        if column is not None and column not in table.column_names:
            raise DataError(
                f"data.{role}: {file.path} has no column {column!r}, only {', '.join(table.column_names)}; "
                f"set data.{role}.{field}"
            )
