"""Which datasets of a run are exported, and their rows as one Parquet file a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from montessori_ray.artifacts.run import Artifact, Run
from montessori_ray.stages.base import Stage

ROWS_A_GROUP = 50_000
"""Rows of a Parquet row group; those of a run's parts are few and many."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of dataset: a config of the exported dataset."""

    config: str
    """Its name, as `load_dataset(DIR, config)` takes it."""
    about: str
    """What a row is."""
    texts: bool = False
    """Whether instruction and response, which its stage read, are put beside its rows."""


KINDS = {
    "training_set": Kind(config="training_set", about="What a student was trained on at the end."),
    "responses": Kind(config="examples", about="Every kept instruction with the teacher's response."),
    "instructions": Kind(
        config="samples",
        about="Every sample of the teacher with its few-shot prompt; `status` is `kept`, or why it was rejected.",
    ),
    "score": Kind(
        config="influence",
        about="Scored examples. `influence` is the change of the student's loss on the reference set when it takes one "
        "step on the example; negative helps.",
        texts=True,
    ),
    "score_fresh": Kind(
        config="fresh_influence",
        about="The same for what every teacher wrote to equal prompts; `example_id` begins with where in the loop.",
        texts=True,
    ),
    "candidates": Kind(
        config="candidates",
        about="Several responses of the teacher to one instruction; `prompt_id` is the same for all.",
    ),
    "pair": Kind(
        config="preference_pairs",
        about="`chosen` is preferred to `rejected` by what the stage's `pair.signal` says (`influence`: it helps the "
        "student more); both are raw outputs sampled from `prompt`.",
    ),
}
"""Kind of a stage -> what becomes of its rows, in the order of the card."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One exported file."""

    kind: Kind
    split: str
    artifact: str
    path: str
    """Relative to the export's folder."""
    rows: int
    columns: list[str]


SINGLE = ("score", "compare/score_fresh")
"""Stages of which any run has one."""
SINGLE_OF_LOOP = ("final/training_set", "final/score_fresh")
"""Stages of which a loop by itself has one; in a comparison they are one arm's."""


def split_of(stage: Stage, *, compared: bool) -> str:
    """`iteration_00`, `final`, `random_tuning_0_final` for an arm of a comparison, `loop_1_random_tuning_1_final` of
    another independent loop; `train` for a stage of its own."""
    folders = [folder for folder in stage.name.split("/")[:-1] if folder != "arms"]
    single = stage.name in SINGLE or (stage.name in SINGLE_OF_LOOP and not compared)
    return "train" if single else "_".join(folders)


def write_split(run: Run, stage: Stage, folder: Path, *, compared: bool) -> Split:
    """Write the rows of a finished stage under `folder`, streamed but for the texts put beside scores."""
    kind = KINDS[stage.kind]
    artifact = run.artifact(stage.output)
    split = split_of(stage, compared=compared)
    path = f"data/{kind.config}/{split}.parquet"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    texts = _texts(run, stage) if kind.texts else None
    rows, columns = 0, []
    writer: pq.ParquetWriter | None = None
    for table in _groups(artifact):
        table = table if texts is None else _beside(table, texts)
        writer = writer or pq.ParquetWriter(folder / path, table.schema, compression="zstd")
        writer.write_table(table)
        rows, columns = rows + table.num_rows, table.column_names
    assert writer is not None, f"{stage.output} has no rows"
    writer.close()
    return Split(kind=kind, split=split, artifact=stage.output, path=path, rows=rows, columns=columns)


def _groups(artifact: Artifact) -> Iterator[pa.Table]:
    """The parts of a dataset, put together until they are a row group."""
    waiting: list[pa.Table] = []
    for table in artifact.tables():
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= ROWS_A_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _texts(run: Run, stage: Stage) -> pa.Table:
    """`example_id, instruction, response` of what a stage scored."""
    columns = ["example_id", "instruction", "response"]
    parts = [table for name in stage.inputs[2:] for table in run.artifact(name).tables(columns)]
    return pa.concat_tables(parts)


def _beside(table: pa.Table, texts: pa.Table) -> pa.Table:
    """A table with the texts of its rows, its own order kept."""
    ordered = table.append_column("row", pa.array(range(table.num_rows)))
    joined = ordered.join(texts, keys="example_id", join_type="left outer", use_threads=False).sort_by("row")
    columns = [name for name in table.column_names if name != "example_id"]
    return joined.select(["example_id", "instruction", "response", *columns])
