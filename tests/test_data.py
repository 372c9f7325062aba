"""Rows a user brings: every kind of file, every column mapping, every error; and the quickstart's own data."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from montessori_ray.config import DataFile
from montessori_ray.data import read_examples, read_rows, require_disjoint
from montessori_ray.errors import DataError
from montessori_ray.synthesis.deduplication import NearDuplicates

SHIPPED = Path(__file__).parents[1] / "configs" / "data"
ROWS: list[dict[str, Any]] = [
    {"instruction": "Name a prime.", "input": "", "output": "Seven.", "kind": "number"},
    {"instruction": "Translate.", "input": "chat", "output": "cat", "kind": "words"},
    {"instruction": "  Spell it.  ", "input": None, "output": " I-T \n", "kind": None},
]


@pytest.fixture(autouse=True)
def lookups(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache of its own and no network: the hosts that were asked for."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    hosts: list[str] = []

    def refuse(host: str, *_: Any, **__: Any) -> None:
        hosts.append(host)
        raise socket.gaierror(f"no network in tests: {host}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "json": write_json,
    "arrow": write_arrow,
}


def read(
    path: Path | str, *, needs_response: bool = False, role: str = "seeds", **columns: Any
) -> list[dict[str, Any]]:
    return list(read_rows(role, DataFile(path=str(path), **columns), needs_response=needs_response))


def instructions(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["instruction"] for row in rows]


# -- kinds of files and columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    rows = read(path, role="held_out", needs_response=True, input="input", response="output", category="kind")
    assert rows == [
        {
            "example_id": "held_out-000000",
            "instruction": "Name a prime.",
            "response": "Seven.",
            "category": "number",
        },
        {
            "example_id": "held_out-000001",
            "instruction": "Translate.\n\nchat",
            "response": "cat",
            "category": "words",
        },
        {"example_id": "held_out-000002", "instruction": "Spell it.", "response": "I-T", "category": None},
    ]


def test_columns_that_are_not_named_are_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    rows = read(tmp_path / "rows.jsonl")
    assert instructions(rows) == ["Name a prime.", "Translate.", "Spell it."]
    assert {(row["response"], row["category"]) for row in rows} == {(None, None)}


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", [{"question": "Why?", "context": "It rains.", "answer": "Clouds.", "label": "a"}]
    )
    [row] = read(tmp_path / "rows.jsonl", instruction="question", input="context", response="answer", category="label")
    assert (row["instruction"], row["response"], row["category"]) == ("Why?\n\nIt rains.", "Clouds.", "a")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path: Path, kind: str) -> None:
    for number in (2, 0, 1):
        WRITERS[kind](tmp_path / f"part-{number}.{kind}", [{"instruction": f"from file {number}"}])
    (tmp_path / "README.md").write_text("not data")
    rows = read(tmp_path)
    assert instructions(rows) == ["from file 0", "from file 1", "from file 2"]
    assert [row["example_id"] for row in rows] == ["seeds-000000", "seeds-000001", "seeds-000002"]


@pytest.mark.parametrize(
    ("start", "rows", "expected"), [(0, None, "01234"), (3, None, "34"), (1, 2, "12"), (3, 9, "34"), (0, 1, "0")]
)
def test_start_and_rows_choose_and_ids_keep_counting_from_the_files_first_row(
    tmp_path: Path, start: int, rows: int | None, expected: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"i{number}"} for number in range(5)])
    chosen = read(tmp_path / "rows.jsonl", start=start, rows=rows)
    assert instructions(chosen) == [f"i{number}" for number in expected]
    assert [row["example_id"] for row in chosen] == [f"seeds-00000{number}" for number in expected]


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "first"}])
    assert instructions(read(tmp_path / "rows.jsonl")) == ["first"]
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "the second"}])
    assert instructions(read(tmp_path / "rows.jsonl")) == ["the second"]


def test_a_local_file_is_nobodys_business(tmp_path: Path, lookups: list[str]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    read(tmp_path / "rows.jsonl")
    assert lookups == []


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "absent"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"data\.seeds: no file at .*{name}$"):
        read(tmp_path / name)


def test_missing_relative_file() -> None:
    with pytest.raises(DataError, match=r"data\.seeds: no file at data/absent\.jsonl"):
        read("data/absent.jsonl")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"data\.seeds: .* holds no \.parquet, \.jsonl, \.json, \.arrow file"):
        read(tmp_path)


def test_parquet_without_rows(tmp_path: Path) -> None:
    schema = pa.schema([("instruction", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"data\.seeds: .* has 0 rows, none from row 0 on"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("kind", WRITERS)
def test_empty_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"rows.{kind}").touch()
    with pytest.raises(DataError, match=rf"data\.seeds: .*rows\.{kind} is empty"):
        read(tmp_path / f"rows.{kind}")


def test_start_behind_the_last_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"has 3 rows, none from row 3 on"):
        read(tmp_path / "rows.jsonl", start=3)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"rows.{kind}").write_bytes(b"\x00\x01 neither { nor [")
    with pytest.raises(DataError, match=rf"data\.seeds: cannot read .*rows\.{kind}: "):
        read(tmp_path / f"rows.{kind}")


@pytest.mark.parametrize("field", ["instruction", "input", "response", "category"])
def test_missing_column_lists_the_columns_there_are(tmp_path: Path, field: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    columns: dict[str, Any] = {field: "absent"}
    said = rf"has no column 'absent', only instruction, input, output, kind; set data\.seeds\.{field}"
    with pytest.raises(DataError, match=said):
        read(tmp_path / "rows.jsonl", **columns)


def test_a_set_that_needs_responses_must_name_their_column(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data\.reference\.response is not set: name the column of "):
        read(tmp_path / "rows.jsonl", role="reference", needs_response=True)


@pytest.mark.parametrize("empty", ["", "  \n", None])
@pytest.mark.parametrize("column", ["instruction", "output"])
def test_empty_cell_is_named_by_row_and_column(tmp_path: Path, column: str, empty: str | None) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], ROWS[1] | {column: empty}, ROWS[2]])
    with pytest.raises(DataError, match=rf"data\.reference: row 1 of .*rows\.jsonl has an empty '{column}'"):
        read(tmp_path / "rows.jsonl", role="reference", needs_response=True, response="output")


def test_an_empty_response_is_no_fault_of_seeds(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {"output": ""}])
    assert len(read(tmp_path / "rows.jsonl", response="output")) == 1


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_column_that_is_no_text_is_refused_by_name(tmp_path: Path, column: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {column: 7}])
    with pytest.raises(DataError, match=rf"data\.reference: .*'{column}'"):
        read(tmp_path / "rows.jsonl", role="reference", needs_response=True, input="input", response="output")


def test_a_category_may_be_a_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {"kind": 7}])
    assert read(tmp_path / "rows.jsonl", category="kind")[0]["category"] == "7"


# -- disjoint sets --------------------------------------------------------------------------------------------------


def test_overlap_is_refused_with_its_size_and_a_sample() -> None:
    held_out = ["Why is it wet?", "NAME a\n prime. ", "Other"]
    said = (
        r"2 of the 3 held-out rows are also in the reference set \(first: 'Why is it wet\?'\); the held-out result "
        "would be worth nothing, remove them from one of the two"
    )
    with pytest.raises(DataError, match=said):
        require_disjoint("held-out", held_out, "reference", ["Name a prime.", "why  is it wet?"])


def test_disjoint_sets_pass() -> None:
    require_disjoint("held-out", ["a", "b"], "reference", ["c", "ab"])
    require_disjoint("held-out", [], "reference", ["c"])


# -- the shipped data -----------------------------------------------------------------------------------------------

SETS = {"seeds": 120, "reference": 48, "held_out": 48}
"""Name of the file -> rows it has at least."""


@pytest.mark.parametrize("name", SETS)
def test_shipped_rows_are_complete_ascii_and_enough(name: str) -> None:
    path = SHIPPED / f"{name}.jsonl"
    assert path.read_bytes().isascii()
    response = None if name == "seeds" else "response"
    rows = read(path, role=name, needs_response=response is not None, response=response, category="category")
    assert len(rows) >= SETS[name]
    assert all(row["category"] for row in rows)
    assert not any("\n" in row["instruction"] for row in rows)


def test_reference_and_held_out_rows_have_the_same_categories() -> None:
    categories = [{row["category"] for row in read(SHIPPED / f"{name}.jsonl", category="category")} for name in SETS]
    assert categories[1] == categories[2]


def test_no_shipped_instruction_repeats_another_in_any_of_the_files() -> None:
    kept = NearDuplicates(0.7)
    for name in SETS:
        for instruction in instructions(read(SHIPPED / f"{name}.jsonl")):
            match = kept.most_similar(instruction)
            assert match is None, f"{name}: {instruction!r} repeats {match}"
            kept.add(instruction)


def test_ids_of_examples_are_kept_whatever_pandas_made_of_them(tmp_path: Path) -> None:
    """An index begins with 0, and one missing number makes floats of the others."""
    rows = [
        {
            "example_id": number,
            "prompt_id": None if number == 3 else float(number // 2),
            "instruction": f"Do {number}.",
            "response": "Done.",
        }
        for number in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = list(read_examples(DataFile(path=str(tmp_path / "rows.parquet"), response="response")))
    assert [(row["example_id"], row["prompt_id"]) for row in found] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "3")]


def test_examples_without_a_column_of_responses_are_refused(tmp_path: Path) -> None:
    """Each would be quarantined for its empty response, after the student is warmed up."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say yes.", "response": "Yes."}\n')
    with pytest.raises(
        DataError, match=r"no column of .*rows\.jsonl is said to hold responses.*set data\.examples\.resp"
    ):
        list(read_examples(DataFile(path=str(tmp_path / "rows.jsonl"))))
