"""What a person reads: times, progress lines and tables, as rendered text."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console as RichConsole
from rich.table import Table

from montessori_ray.artifacts.manifest import Identity, Manifest
from montessori_ray.artifacts.run import Run
from montessori_ray.stages.base import Stage
from montessori_ray.telemetry import console as console_module
from montessori_ray.telemetry.console import (
    Console,
    clock,
    comparison_tables,
    result_tables,
    say_progress,
    stage_entry,
    stage_table,
)
from montessori_ray.telemetry.progress import Progress


def stage(name: str) -> Stage:
    return Stage(name=name, output=name, body=lambda _: {})


def manifest(*, rows: int | None = 3, seconds: float = 61.0, memory: float | None = None) -> Manifest:
    return Manifest(
        artifact="a", identity=Identity(stage="a", settings={}, inputs={}), digest="d", files={}, rows=rows,
        started=0, finished=1, seconds=seconds, peak_memory_gb=memory, versions={},
    )  # fmt: skip


def lines(*tables: Table) -> list[list[str]]:
    """The words of every line that is not a rule, columns parted at two spaces."""
    rich = RichConsole(file=io.StringIO(), width=200)
    rich.print(*tables)
    assert isinstance(rich.file, io.StringIO)
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in rich.file.getvalue().splitlines()]
    return [row for row in rows if row and set("".join(row)) - set("\u2500\u2501\u2574\u2576 ")]


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(console_module, "time", SimpleNamespace(monotonic=lambda: seconds))


def make_console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    """A console that writes to a buffer, with a clock that stands still at 100 s."""
    console, buffer = Console(), io.StringIO()
    console.rich = RichConsole(file=buffer, width=120, force_terminal=terminal, highlight=False, soft_wrap=True)
    set_clock(monkeypatch, 100.0)
    return console, buffer


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0:00"),
        (-3, "0:00"),
        (0.4, "0:00"),
        (5, "0:05"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.9, "1:00:00"),
        (3661, "1:01:01"),
        (360_000, "100:00:00"),
    ],
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("progress", "rate", "said"),
    [
        (Progress(), None, "starting \u00b7 1:15"),
        (Progress(done=0, total=96), None, "0/96 rows \u00b7 1:15"),
        (Progress(done=48, total=96), 1.3, "48/96 rows \u00b7 1.30/s \u00b7 0:37 left"),
        (Progress(done=48, total=96), 120.4, "48/96 rows \u00b7 120/s \u00b7 0:00 left"),
        (Progress(done=48), 2.0, "48 rows \u00b7 2.00/s"),
        (Progress(done=3, total=9, unit="steps", note="loss 2.1"), None, "3/9 steps \u00b7 1:15 \u00b7 loss 2.1"),
        (Progress(done=12, total=9), 1.0, "12/9 rows \u00b7 1.00/s \u00b7 0:00 left"),
    ],
)
def test_say_progress(progress: Progress, rate: float | None, said: str) -> None:
    assert say_progress(progress, rate, 75.0) == said


def test_stage_table_sums_the_time() -> None:
    table = stage_table(
        [
            (stage("inputs/teacher"), manifest(rows=None, seconds=4)),
            (stage("iteration_00/score"), manifest(rows=12_000, seconds=3600, memory=7.25)),
        ]
    )
    assert lines(table) == [
        ["Stages"],
        ["stage", "rows", "time", "peak GB"],
        ["inputs/teacher", "model", "0:04"],
        ["iteration_00/score", "12,000", "1:00:00", "7.2"],
        ["all", "1:00:04"],
    ]


LOSSES: dict[str, Any] = {
    "original": {"reference": {"mean": 2.5, "se": 0.1}, "held_out": {"mean": 2.25, "se": 0.1}},
    "trained": {
        "reference": {"mean": 2.0, "se": 0.1, "change": {"mean": -0.5, "se": 0.01}},
        "held_out": {"mean": 2.0, "se": 0.1, "change": {"mean": -0.25, "se": 0.0123}},
    },
}
FRESH: dict[str, Any] = {
    "original": {"scored": 32, "mean": -0.00074, "se": 0.00006, "share_helpful": 0.609},
    "tuned 1x": {
        "scored": 31,
        "mean": -0.00365,
        "se": 0.00008,
        "share_helpful": 0.93,
        "change": {"mean": -0.00291, "se": 0.0001},
    },
}


def test_result_tables_show_means_changes_and_standard_errors() -> None:
    losses, fresh = result_tables({"losses": LOSSES, "fresh": FRESH})
    assert lines(losses) == [
        ["Loss of the student (lower is better)"],
        ["student", "reference", "held-out", "held-out change"],
        ["original", "2.5000", "2.2500"],
        ["trained", "2.0000", "2.0000", "-0.2500 \u00b1 0.0123"],
    ]
    assert lines(fresh) == [
        ["Influence of fresh instructions (negative helps)"],
        ["teacher", "scored", "mean influence", "helpful", "change"],
        ["original", "32", "-7.40e-04 \u00b1 6.0e-05", "61%"],
        ["tuned 1x", "31", "-3.65e-03 \u00b1 8.0e-05", "93%", "-2.91e-03 \u00b1 1.0e-04"],
    ]


def test_a_run_without_fresh_instructions_has_one_table() -> None:
    assert len(result_tables({"losses": LOSSES})) == 1


def test_lines_of_finished_and_kept_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    console, buffer = make_console(monkeypatch)
    console.finished("iteration_00/score", manifest(rows=96))
    console.skipped("inputs/teacher", manifest(rows=None, seconds=3))
    console.note("all scores [have] one sign")
    assert buffer.getvalue().splitlines() == [
        f"\u2713 {'iteration_00/score':<32} {'96 rows':>12} {'1:01':>8}",
        f"= {'inputs/teacher':<32} {'model':>12} {'0:03':>8}, kept",
        "  all scores [have] one sign",
    ]


def test_long_names_of_a_comparison_keep_the_columns_where_the_terminal_is_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console, buffer = make_console(monkeypatch)
    names = ["inputs/seeds", "arms/montessori/tuning_0/student_0/final/train_student"]
    for width, expected in ((120, len(names[1])), (80, 32)):
        console.rich.width = width
        console.make_room([stage(name) for name in names])
        for name in names:
            console.finished(name, manifest(rows=9))
        shown = buffer.getvalue().splitlines()[-2:]
        assert shown == [f"\u2713 {name:<{expected}} {'9 rows':>12} {'1:01':>8}" for name in names]


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console, buffer = make_console(monkeypatch)
    console.started("score")
    for seconds in (101.0, 114.9, 115.0, 116.0, 131.0):
        set_clock(monkeypatch, seconds)
        console.progress("score", Progress(done=int(seconds), total=200), None)
    console.stopped()
    assert [line.split()[1] for line in buffer.getvalue().splitlines()] == ["115/200", "131/200"]


def test_on_a_terminal_progress_is_one_live_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    console, buffer = make_console(monkeypatch, terminal=True)
    console.started("score")
    console.progress("score", Progress(done=3, total=9), 1.5)
    console.stopped()
    console.stopped()
    assert "3/9 rows \u00b7 1.50/s \u00b7 0:04 left" in buffer.getvalue()
    assert buffer.getvalue().endswith("\x1b[2K"), "the line is erased"


def test_a_live_line_shows_the_time_left_however_long_the_name_is(monkeypatch: pytest.MonkeyPatch) -> None:
    console, buffer = make_console(monkeypatch, terminal=True)
    console.rich = RichConsole(file=buffer, width=80, force_terminal=True, highlight=False)
    name = "arms/montessori/tuning_0/student_0/final/train_student"
    console.make_room([stage(name)])
    console.started(name)
    console.progress(name, Progress(done=104, total=160, unit="steps"), 0.43)
    console.stopped()
    assert "arms/montessori…al/train_student 104/160 steps · 0.43/s · 2:10 left" in buffer.getvalue()


def test_an_error_that_is_not_known_is_not_shown() -> None:
    one = {"scored": 1, "mean": -2e-3, "se": None, "share_helpful": 1.0}
    measured = {"mean": 2.0, "se": None}
    table = result_tables(
        {
            "losses": {"original": {"reference": measured, "held_out": measured}},
            "fresh": {"original": one, "tuned 1x": one | {"change": {"mean": 0.0, "se": None}}},
        }
    )
    assert not any("±" in cell for line in lines(*table) for cell in line)


def test_summary_shows_finished_stages_the_result_and_where_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, buffer = make_console(monkeypatch)
    run = Run(str(tmp_path / "run"))
    evaluation = run.artifact("final/evaluation")
    evaluation.begin(Identity(stage="final/evaluate", settings={}, inputs={}))
    evaluation.commit(details={"losses": LOSSES, "fresh": FRESH}, seconds=2.0, columns={"loss": "double"})
    console.summary(run, [stage("final/evaluation"), stage("final/unfinished")])
    shown = buffer.getvalue()
    for text in ("final/evaluation", "Loss of the student", "tuned 1x", f"run: {run.root}"):
        assert text in shown
    assert "final/unfinished" not in shown


def test_brackets_in_the_path_of_a_run_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console, buffer = make_console(monkeypatch)
    console.summary(Run(str(tmp_path / "run[b]")), [])
    assert "run[b]" in buffer.getvalue()


def test_a_rate_leaves_out_what_was_found_and_the_start_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("montessori_ray.telemetry.progress.time.monotonic", lambda: now)
    progress = Progress(total=64)
    said = []
    for seconds, done in ((0, 32), (30, 32), (10, 36), (4, 38), (4, 40)):
        now += seconds
        progress.reach(done)
        said.append(progress.rate())
    assert said == [None, None, None, 0.5, 0.5]


def test_a_comparison_fits_eighty_columns() -> None:
    def row(arm: str, measure: str, value: float, difference: float | None, category: str | None) -> dict[str, Any]:
        low, high = (None, None) if difference is None else (difference - abs(value), difference + abs(value))
        return {
            "arm": arm, "measure": measure, "category": category, "models": 6, "value": value, "value_se": value / 9,
            "difference": difference, "low": low, "high": high,
        }  # fmt: skip

    rows = [
        row("self_instruct", "held_out_loss", 2.9654, None, None),
        row("instructions_only", "held_out_loss", 2.8736, -0.0918, None),
        row("instructions_only", "held_out_loss", 7.7777, -0.0777, "facts"),
        row("instructions_only", "fresh_influence", -1.29e-2, -2.6e-3, None),
    ]
    fresh = {
        "parse_rate": 0.98, "duplicate_rate": 0.265, "instructions": {"self_rouge_l": 0.45},
        "responses": {"tokens": 40.2},
    }  # fmt: skip
    data = {"instructions_only": {"fresh": fresh, "training_rows": [93, 104], "training_tokens": [3954, 3961]}}
    console = RichConsole(width=80, record=True, file=io.StringIO())
    for table in comparison_tables({"against": "self_instruct", "measures": rows, "data": data}):
        console.print(table)
    shown = console.export_text()
    assert "…" not in shown
    assert "7.777" not in shown
    for said in ("2.874 ± 0.319", "-0.092", "in 1e-3", "-12.900", "-15.500 to +10.300", "duplicates", "26.5%"):
        assert said in shown, said


def test_a_stage_is_listed_in_lines_that_break_no_name() -> None:
    inputs = tuple(f"arms/montessori/tuning_{number}/iteration_00/fresh_instructions" for number in range(3))
    listed = replace(stage("compare/score_fresh"), output="compare/fresh_influence", inputs=inputs)
    first, *rest = stage_entry(listed, "done, with other settings", 72).splitlines()
    assert first == "done   compare/score_fresh (with other settings)"
    assert rest[0].split() == ["makes", "compare/fresh_influence"]
    assert [line.split()[-1].rstrip(",") for line in rest[1:]] == list(inputs)
    assert max(map(len, rest)) <= 72
    assert stage_entry(stage("inputs/seeds"), "to do", 72) == "to do  inputs/seeds"
