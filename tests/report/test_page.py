"""The page as a document: what it says, what it never does, and what a run without a result gets."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import Markup
from typer.testing import CliRunner

from montessori_ray.cli import app
from montessori_ray.loop import run_loop
from montessori_ray.report.html import Section, bar_cell, figure, page, paragraph, table, tiles
from montessori_ray.report.run_page import SECTIONS
from montessori_ray.report.words import xml_text
from montessori_ray.report.write import write_report
from montessori_ray.telemetry.events import EventLog
from tests.report import synthetic
from tests.report.synthetic import HOSTILE, RunWriter, comparison_writer, loop_writer, scores_writer

VOID = {"meta", "input", "br", "link", "img"}


class Document(HTMLParser):
    """Reads a page strictly enough to notice a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "action", "data", "poster", "srcset"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(writer: RunWriter, until: str | None = None) -> tuple[Path, str, Document]:
    run = writer.write(until)
    path = Path(write_report(run, writer.config, writer.stages))
    text = path.read_text(encoding="utf-8")
    return path, text, Document(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Document]:
    return written(loop_writer(tmp_path_factory.mktemp("finished")))


def test_every_section_is_there_and_can_be_jumped_to(finished: tuple[Path, str, Document]) -> None:
    _, text, document = finished
    assert re.findall(r"<h2>([^<]+)</h2>", text) == [title for title, _ in SECTIONS if title != "Arms"]
    assert {link[1:] for link in document.links} <= set(document.ids)
    assert len(document.ids) == len(set(document.ids)), "ids are unique"


def test_a_page_asks_for_nothing(finished: tuple[Path, str, Document]) -> None:
    _, text, document = finished
    assert [link for link in document.links if not link.startswith("#")] == []
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", text)


def test_what_models_wrote_is_text(finished: tuple[Path, str, Document]) -> None:
    _, text, document = finished
    assert text.count("<script") == 1
    assert HOSTILE in document.text


def test_a_page_says_the_result_and_its_numbers(finished: tuple[Path, str, Document]) -> None:
    path, _, document = finished
    report = json.loads(path.with_name("report.json").read_text())
    text = document.text.replace("\u00a0", " ")
    for sentence in report["sentences"]:
        assert sentence["headline"] in text
        assert sentence["detail"] in text
    for entry in report["cost"]["stages"]:
        assert entry["seconds"] < 0.01 * report["cost"]["stage_seconds"] or entry["name"] in text
    for words in (
        report["what"],
        "duplicate, iteration 0",
        "null_step",
        "Bars are pale",
        report["artifacts"][0]["digest"][:12],
    ):
        assert words in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path, "iterations=1")
    path, text, _ = written(writer)
    numbers = path.with_name("report.json").read_bytes()
    write_report(writer.run, writer.config, writer.stages)
    assert path.read_text(encoding="utf-8") == text
    assert path.with_name("report.json").read_bytes() == numbers
    assert len(text) < 400_000


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    _, text, document = written(loop_writer(tmp_path, "iterations=1"), "iteration_00/pair")
    assert "Unfinished: 14 of 25 stages are done, next iteration_00/pair." in document.text
    assert "since the run has not made it yet: student, teacher, pairs and teacher tuning." in document.text
    assert 'data-plot="influence-iteration_00-score"' in text


def test_a_run_with_nothing_yet_has_a_page(tmp_path: Path) -> None:
    _, _, document = written(loop_writer(tmp_path), "inputs/seeds")
    assert "0 of 36 stages are done, next inputs/seeds" in document.text


def test_a_run_that_only_scores_has_the_sections_it_can(tmp_path: Path) -> None:
    _, text, _ = written(scores_writer(tmp_path))
    assert re.findall(r"<h2>([^<]+)</h2>", text) == ["Influence", "Examples", "Time and cost", "Environment"]


def test_an_unfinished_run_promises_what_such_a_run_makes(tmp_path: Path) -> None:
    _, _, scoring = written(scores_writer(tmp_path / "scores"), "score")
    assert "has not made it yet: influence and examples." in scoring.text
    _, _, comparison = written(comparison_writer(tmp_path / "arms"), "iteration_00/pair")
    assert "has not made it yet: arms, pairs and teacher tuning." in comparison.text


def test_a_comparison_tells_arms_apart(tmp_path: Path) -> None:
    _, text, document = written(comparison_writer(tmp_path), "compare/result")
    assert len(document.ids) == len(set(document.ids))
    (loss,) = re.findall(r"<h3>Loss while tuning</h3>(.*?)</ul>", text)
    assert re.findall(r"</i>([^<]+)", loss) == ["montessori", "shuffled labels", "responses"]


def test_a_bad_value_does_not_cost_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CATEGORIES", ("list\x0bs", "$x^$", "facts"))
    monkeypatch.setattr(synthetic, "HOSTILE", "Ring the \x07bell.")
    writer = loop_writer(tmp_path, "iterations=1")
    writer.write()
    points = [{"step": 20, "loss": float("nan")}]
    EventLog(writer.run.storage).write("metrics", stage="final/train_student", points=points)
    text = Path(write_report(writer.run, writer.config, writer.stages)).read_text(encoding="utf-8")
    plots = {found[1]: found[0] for found in re.finditer(r'<svg[^>]* data-plot="([^"]+)".*?</svg>', text, flags=re.S)}
    for plot in plots.values():
        ElementTree.fromstring(plot)
    assert ">lists (8)<" in plots["categories"]
    assert ">$x^$ (8)<" in plots["categories"]
    assert "Ring the bell." in text
    assert xml_text(text) == text


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    writer = scores_writer(tmp_path)
    writer.score_se = float("nan")
    path, _, _ = written(writer)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    report = json.loads(path.with_name("report.json").read_text(), parse_constant=refuse)
    assert report["examples"][0]["helpful"][0]["influence_se"] is None


# -- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_escape_text_and_keep_markup() -> None:
    bad = '<i onclick="x">&'
    blocks = [
        paragraph(bad, kind="note"),
        figure(bad, Markup("<svg></svg>"), bad, [("ink", bad)]),
        table([bad], [[bad], [bar_cell(0.5, bad)]], caption=bad, search=True),
    ]
    whole = page(bad, Markup("").join(blocks), [Section("s", bad, tiles([]))])
    Document(whole)
    assert "<i onclick" not in whole
    assert "<svg></svg>" in whole


# -- from the command line ------------------------------------------------------------------------------------------


def test_report_command(tmp_path: Path) -> None:
    writer = loop_writer(tmp_path)
    writer.write("iteration_00/score")
    result = CliRunner().invoke(app, ["report", writer.run.root])
    assert result.exit_code == 0, result.output
    assert f"report: {writer.run.root}/report.html" in result.output
    assert (tmp_path / "run" / "report.html").exists()
    scoring = scores_writer(tmp_path)
    scoring.write()
    assert CliRunner().invoke(app, ["report", scoring.run.root]).exit_code == 0


def test_what_is_no_run_gives_one_error(tmp_path: Path) -> None:
    for command in (["report"], ["export", "--output", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, [*command, str(tmp_path)])
        assert result.exit_code == 2
        assert "is not a run directory: it has no config.yaml" in " ".join(result.output.split())
    (tmp_path / "config.yaml").write_text("run: x\nteacher: {}\n")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot be read by this version" in " ".join(result.output.split())


def test_every_run_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = loop_writer(tmp_path, "telemetry.tracker=none")
    writer.write()
    run_loop(writer.config)  # type: ignore[arg-type]
    assert f"report: {writer.run.root}/report.html" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_costs_the_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = loop_writer(tmp_path, "telemetry.tracker=none")
    writer.write()
    (tmp_path / "run" / "report.html").mkdir()
    assert run_loop(writer.config).root == writer.run.root  # type: ignore[arg-type]
    said = " ".join(capsys.readouterr().out.split())
    assert "the report could not be written" in said
    assert f"`montessori report {writer.run.root}` tries again" in said
    assert "run: " in said
