"""What a person sees in the terminal: a live line for the running stage, a line for each finished one, then tables.

Without a terminal (a job's log) the live line becomes a plain one every `LOG_SECONDS`.
"""

from __future__ import annotations

import textwrap
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import nlargest, nsmallest
from math import floor, log10
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from montessori_ray.artifacts.manifest import Manifest
from montessori_ray.telemetry.progress import Progress

if TYPE_CHECKING:
    from montessori_ray.artifacts.run import Run
    from montessori_ray.stages.base import Stage

LOG_SECONDS = 15.0
NAME_WIDTH = 32
"""Columns for a stage's name, at least."""
SAID_WIDTH = 48
"""Columns for what is said of a stage beside its name: where a terminal is narrow, long names give way."""
PIPE_WIDTH = 200


def terminal(*, stderr: bool = False) -> RichConsole:
    """Where sentences and tables are printed, instructions and paths among them as they are; a pipe or a job's log is
    so wide that no name in a table is folded."""
    console = RichConsole(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


class Console:
    """Prints for one session."""

    def __init__(self) -> None:
        self.rich = terminal()
        self._live: Live | None = None
        self._last_log = 0.0
        self._began = 0.0
        self._name_width = NAME_WIDTH

    def make_room(self, stages: Sequence[Stage]) -> None:
        """Align what is said of these stages, as far as the terminal is wide enough for their names."""
        longest = max((len(stage.name) for stage in stages), default=0)
        self._name_width = max(NAME_WIDTH, min(longest, self.rich.width - SAID_WIDTH))

    def note(self, sentence: str) -> None:
        """A sentence the user should see."""
        self.rich.print(Text(f"  {sentence}", style="dim"))

    def started(self, stage: str) -> None:
        """A stage begins."""
        self._began = self._last_log = time.monotonic()
        if self.rich.is_terminal:
            self._live = Live(Text(f"  {self._short(stage)} starting"), console=self.rich, transient=True)
            self._live.start()

    def progress(self, stage: str, progress: Progress, rate: float | None) -> None:
        """The stage's progress, on the live line or now and then as a plain one."""
        line = Text(f"  {self._short(stage)} {say_progress(progress, rate, time.monotonic() - self._began)}")
        if self._live is not None:
            self._live.update(line)
        elif time.monotonic() - self._last_log >= LOG_SECONDS:
            self._last_log = time.monotonic()
            self.rich.print(line)

    def _short(self, stage: str) -> str:
        """A name in its columns, without its middle where it is longer: the live line is cut at its end, where the time
        left stands."""
        width = self._name_width
        if len(stage) > width:
            stage = f"{stage[: width // 2 - 1]}…{stage[-(width - width // 2) :]}"
        return f"{stage:<{width}}"

    def stopped(self) -> None:
        """The stage ended, one way or the other: take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finished(self, stage: str, manifest: Manifest) -> None:
        """A stage's output is committed."""
        self.rich.print(Text.assemble(("✓ ", "green"), f"{stage:<{self._name_width}} {_said(manifest)}"))

    def skipped(self, stage: str, manifest: Manifest) -> None:
        """A stage's output was there already."""
        self.rich.print(Text.assemble(("= ", "cyan"), (f"{stage:<{self._name_width}} {_said(manifest)}, kept", "dim")))

    def summary(self, run: Run, stages: Sequence[Stage], report: str | None = None) -> None:
        """The stages with rows, time and memory; then the result, if the run has one, and where its report is."""
        manifests = [(stage, run.artifact(stage.output).manifest()) for stage in stages]
        self.rich.print()
        self.rich.print(stage_table([(stage, manifest) for stage, manifest in manifests if manifest]))
        result = run.artifact("final/evaluation").manifest()
        if result is not None:
            for table in result_tables(result.details):
                self.rich.print(table)
        judged = run.artifact("final/win_rate").manifest()
        if judged is not None:
            self.rich.print(Text("\n  ".join(said_of_win_rate(judged.details))), "")
        comparison = run.artifact("compare/result").manifest()
        if comparison is not None:
            for part in comparison_tables(comparison.details):
                self.rich.print(part)
        self.rich.print(Text(f"run: {run.root}"))
        if report is not None:
            self.rich.print(Text(f"report: {report}"))


def say_progress(progress: Progress, rate: float | None, seconds: float) -> str:
    """`48/96 rows · 1.3/s · 0:37 left`, as far as it is known."""
    if not progress.done and not progress.total:
        return f"starting · {clock(seconds)}"
    total = f"/{progress.total}" if progress.total else ""
    parts = [f"{progress.done}{total} {progress.unit}"]
    if rate:
        parts.append(f"{rate:.2f}/s" if rate < 10 else f"{rate:.0f}/s")
        if progress.total:
            parts.append(f"{clock((progress.total - progress.done) / rate)} left")
    else:
        parts.append(clock(seconds))
    return " · ".join(filter(None, [*parts, progress.note]))


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _said(manifest: Manifest) -> str:
    rows = f"{manifest.rows:,} rows" if manifest.rows is not None else "model"
    return f"{rows:>12} {clock(manifest.seconds):>8}"


def stage_entry(stage: Stage, state: str, width: int) -> str:
    """A stage with its state, what it makes and what from, in lines of `width` that break no name."""
    word, _, but = state.partition(", ")
    lines = [f"{word:<5}  {stage.name}" + (f" ({but})" if but else "")]
    told = {"makes": [stage.output] if stage.output != stage.name else [], "from": list(stage.inputs)}
    for what, names in told.items():
        if names:
            lines += textwrap.wrap(
                ", ".join(names), max(width, 40), initial_indent=f"         {what:<5} ", subsequent_indent=" " * 15,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)


def stage_table(manifests: Sequence[tuple[Stage, Manifest]]) -> Table:
    """What each finished stage made, how long it took and the most memory in use meanwhile."""
    table = Table(title="Stages", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("stage", overflow="fold")
    for name in ("rows", "time", "peak GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, manifest in manifests:
        rows = f"{manifest.rows:,}" if manifest.rows is not None else "model"
        memory = f"{manifest.peak_memory_gb:.1f}" if manifest.peak_memory_gb is not None else ""
        table.add_row(stage.name, rows, clock(manifest.seconds), memory)
    table.add_section()
    table.add_row("all", "", clock(sum(manifest.seconds for _, manifest in manifests)), "")
    return table


def result_tables(details: dict[str, Any]) -> list[Table]:
    """Losses of the students, and influence of fresh instructions of the teachers; ± is one standard error."""
    losses = Table(title="Loss of the student (lower is better)", box=box.SIMPLE_HEAD, title_justify="left")
    losses.add_column("student", no_wrap=True)
    for name in ("reference", "held-out", "held-out change"):
        losses.add_column(name, justify="right", no_wrap=True)
    for name, row in details["losses"].items():
        change = row["held_out"].get("change")
        losses.add_row(
            name,
            f"{row['reference']['mean']:.4f}",
            f"{row['held_out']['mean']:.4f}",
            "" if change is None else with_error(change, "+.4f", ".4f"),
        )
    tables = [losses]
    if details.get("fresh"):
        fresh = Table(
            title="Influence of fresh instructions (negative helps)", box=box.SIMPLE_HEAD, title_justify="left"
        )
        fresh.add_column("teacher", no_wrap=True)
        for name in ("scored", "mean influence", "helpful", "change"):
            fresh.add_column(name, justify="right", no_wrap=True)
        for name, row in details["fresh"].items():
            change = row.get("change")
            fresh.add_row(
                name,
                str(row["scored"]),
                with_error(row, "+.2e", ".1e"),
                f"{row['share_helpful']:.0%}",
                "" if change is None else with_error(change, "+.2e", ".1e"),
            )
        tables.append(fresh)
    return tables


def with_error(found: Mapping[str, Any], mean: str, error: str) -> str:
    """A mean ± its standard error in these formats; the mean alone where the error is not known."""
    return f"{found['mean']:{mean}}" + ("" if found["se"] is None else f" ± {found['se']:{error}}")


def comparison_tables(details: dict[str, Any]) -> list[Table | Text]:
    """Each arm's students and teachers, and how they differ from the arm all are compared with; intervals of 95 %."""
    against = details["against"]
    titles = {
        "held_out_loss": f"Held-out loss against {against} (lower is better)",
        "fresh_influence": f"Influence of fresh instructions against {against} (negative helps)",
        "fresh_influence_alone": "The same without the original teacher's probing examples",
    }
    tables: list[Table | Text] = []
    for measure, title in titles.items():
        rows = [row for row in details["measures"] if row["measure"] == measure and row["category"] is None]
        if not rows:
            continue
        exponent = 3 * floor(log10(max((abs(row["value"]) for row in rows), default=0.0) or 1.0) / 3)
        unit = f", in 1e{exponent:+d}" if exponent else ""
        tables.append(_arms_table(f"{title}{unit}", rows, 10.0**exponent))
    return [*tables, _data_table(details["data"])]


def _arms_table(title: str, rows: Sequence[dict[str, Any]], unit: float) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("arm", overflow="fold")
    for name in ("models", "mean", "difference", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["arm"], str(row["models"]), f"{row['value'] / unit:.3f} ± {row['value_se'] / unit:.3f}"]
        if row["difference"] is not None:
            interval = f"{row['low'] / unit:+.3f} to {row['high'] / unit:+.3f}"
            cells += [f"{row['difference'] / unit:+.3f}", interval]
        table.add_row(*cells)
    return table


def _data_table(data: dict[str, Any]) -> Table:
    """What the teachers of each arm write, and how much its students saw."""
    table = Table(title="Data, and tokens that students trained on", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("arm", overflow="fold")
    for name in ("parsed", "duplicates", "self-ROUGE", "an answer", "trained on"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, told in data.items():
        fresh = told["fresh"]
        table.add_row(
            arm,
            f"{fresh['parse_rate']:.1%}",
            f"{fresh['duplicate_rate']:.1%}",
            f"{fresh['instructions']['self_rouge_l']:.2f}",
            f"{fresh['responses']['tokens']:.0f}",
            say_counts(told["training_tokens"]),
        )
    return table


def say_counts(counts: Sequence[int]) -> str:
    """`96`, or `94 to 96` where they differ."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def benchmark_table(results: dict[str, Any]) -> Table:
    """Metrics of the tasks of `evaluation.harness.run_benchmarks`; ± is the harness's standard error."""
    table = Table(title=f"Benchmarks of {results['model']}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("task", no_wrap=True)
    for name in ("shots", "questions"):
        table.add_column(name, justify="right")
    table.add_column("metrics")
    for task, found in results["tasks"].items():
        metrics = (
            f"{name} {value['value']:.4f}" + (f" ± {value['stderr']:.4f}" if value["stderr"] is not None else "")
            for name, value in found["metrics"].items()
        )
        table.add_row(task, str(found["shots"]), f"{found['questions']:,}", "\n".join(metrics))
    return table


def said_of_win_rate(details: dict[str, Any]) -> list[str]:
    """What a judge found, in a few sentences without a full stop."""
    rate, controlled, verdicts = details["win_rate"], details["length_controlled"], details["verdicts"]
    even = ", within noise of 50 %" if rate["low"] <= 0.5 <= rate["high"] else ""
    said = [
        f"Win rate of the trained against the original student: {rate['mean']:.1%} (95 % interval {rate['low']:.1%} to "
        f"{rate['high']:.1%}{even}) of {details['pairs']} pairs of answers, judged by {details['judge']}",
        f"{details['wins']} won, {details['ties']} tied, {details['losses']} lost; both verdicts on a pair followed "
        f"the place instead of the answer in {details['follows_place']:.0%}",
    ]
    if details["first_place"] is not None:
        said[-1] += f", and {details['first_place']:.0%} of all decided ones went to the answer shown first"
    lost = [f"{verdicts[what]} {what}" for what in ("unparsed", "refused") if what in verdicts]
    if lost:
        pairs = sum(verdicts.values()) // 2
        said.append(
            f"{pairs - details['pairs']} of {pairs} pairs have no two verdicts ({', '.join(lost)}) and count nowhere"
        )
    if controlled["win_rate"] is None:
        said.append(f"no length-controlled win rate: {controlled['reason']}")
    else:
        said.append(f"length-controlled: {controlled['win_rate']:.1%} ± {controlled['standard_error']:.1%}")
    return said


BINS = 15
BAR = 40
SHOWN = 5
"""Examples at either end of the distribution."""


def influence_tables(
    details: dict[str, Any], rows: Callable[[], Iterable[dict[str, Any]]], examples: Iterable[Mapping[str, str]]
) -> list[Table | Text]:
    """The distribution of influence, its most helpful and most harmful examples, and how sure the scores are.

    Args:
        details: of the score stage.
        rows: gives the score rows, each time it is called; there may be more than fit into memory.
        examples: rows with `example_id` and `instruction`.
    """
    influences = array("d", (row["influence"] for row in rows() if row["influence"] is not None))
    if not influences:
        return [Text(f"no example has a score: {details['quarantined']}")]
    low, high = min(influences), max(influences)
    counts = [0] * BINS
    for influence in influences:
        counts[min(BINS - 1, int((influence - low) / ((high - low) or 1.0) * BINS))] += 1
    shown = _ends(rows, len(influences))
    ids = {row["example_id"] for row in shown}
    instructions = {row["example_id"]: row["instruction"] for row in examples if row["example_id"] in ids}
    histogram = Table(title="Influence (negative helps)", box=box.SIMPLE_HEAD, title_justify="left")
    histogram.add_column("from", justify="right")
    histogram.add_column("examples", justify="right")
    histogram.add_column("")
    for number, count in enumerate(counts):
        start = low + (high - low) * number / BINS
        style = "green" if start + (high - low) / BINS / 2 < 0 else "red"
        histogram.add_row(f"{start:+.2e}", str(count), Text("█" * round(BAR * count / max(counts)), style=style))
    ends = Table(title="Most helpful and most harmful", box=box.SIMPLE_HEAD, title_justify="left")
    ends.add_column("influence", justify="right", no_wrap=True, min_width=19)
    ends.add_column("instruction", overflow="ellipsis", no_wrap=True)
    for row in shown:
        error = "" if row["influence_se"] is None else f" ± {row['influence_se']:.1e}"
        ends.add_row(f"{row['influence']:+.2e}{error}", " ".join(instructions[row["example_id"]].split())[:90])
    return [histogram, ends, Text(_said_of_scores(details))]


def _ends(rows: Callable[[], Iterable[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The most helpful and the most harmful rows, by influence; all where there are few."""

    def scored() -> Iterator[dict[str, Any]]:
        return (row for row in rows() if row["influence"] is not None)

    by_influence = itemgetter("influence")
    if count <= 2 * SHOWN:
        return sorted(scored(), key=by_influence)
    return [*nsmallest(SHOWN, scored(), key=by_influence), *nlargest(SHOWN, scored(), key=by_influence)[::-1]]


def _said_of_scores(details: dict[str, Any]) -> str:
    mean, recheck = details["influence"], details["recheck"]
    parts = [
        f"{details['scored']} scored, {details['share_helpful']:.0%} help",
        f"mean {with_error(mean, '+.2e', '.1e')}",
    ]
    if details["quarantined"]:
        parts.append(f"{sum(details['quarantined'].values())} without a score {details['quarantined']}")
    if recheck:
        ranks = "" if recheck["spearman"] is None else f", rank correlation {recheck['spearman']:.3f}"
        parts.append(
            f"{recheck['points']} scored again (exact, float32): noise {recheck['noise']:.1e}, "
            f"{recheck['same_sign']:.0%} of one sign{ranks}"
        )
    return "; ".join(parts)
