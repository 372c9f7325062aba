"""The page as people see it: in headless Chromium, on a desktop and a phone, light and dark, and on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from montessori_ray.report.colours import COLOURS
from montessori_ray.report.write import write_report
from tests.browser import CHROMIUM, Browser
from tests.report.synthetic import loop_writer

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

PLOTS = """
[...document.querySelectorAll('svg[data-plot]')].map(svg => {
  const name = svg.dataset.plot, whole = svg.getBoundingClientRect();
  const mark = shape => {
    const box = shape.getBoundingClientRect();
    const inside = box.left >= whole.left - 1 && box.right <= whole.right + 1 && box.top >= whole.top - 1
      && box.bottom <= whole.bottom + 1;
    return {width: box.width, height: box.height, inside, fill: getComputedStyle(shape).fill};
  };
  const groups = {};
  for (const kind of ['dot', 'bar', 'interval', 'line']) {
    const shapes = [...svg.querySelectorAll('g')].filter(g => g.id.startsWith(`${name}.${kind}-`))
      .flatMap(g => [...g.querySelectorAll('use, path')].filter(shape => !shape.closest('defs')));
    if (shapes.length) groups[kind] = shapes.map(mark);
  }
  const sizes = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect().height);
  return {name, groups, smallest: Math.min(...sizes), title: svg.querySelector('title').textContent};
})
"""
"""Every plot on the page with its marks as they are laid out."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    writer = loop_writer(tmp_path_factory.mktemp("page"))
    page = Path(write_report(writer.write(), writer.config, writer.stages))
    return page, json.loads(page.with_name("report.json").read_text())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def expected_marks(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Plot -> kind of mark -> how many the data asks for."""
    changed = sum(loss["change"] is not None for loss in report["losses"])
    reasons = {reason for entry in report["syntheses"] for reason in entry["rejected"]}
    written = sum(not entry["fresh"] for entry in report["syntheses"])
    expected = {
        "losses": {"interval": changed, "dot": changed},
        "categories": {"interval": len(report["categories"]), "dot": len(report["categories"])},
        "fresh": {
            "interval": len(report["fresh"]),
            "dot": sum(len(entry["values"]) for entry in report["fresh"]),
        },
        "rejected": {"bar": written * len(reasons)},
        "time": {"bar": sum(seconds >= 0.005 * sum(report["cost"]["by_work"].values())
                            for seconds in report["cost"]["by_work"].values())},
        "training": _curves(report["trainings"], "loss"),
    }  # fmt: skip
    for entry in report["influences"]:
        name = entry["name"].replace("/", "-")
        expected[f"agreement-{name}"] = {"dot": len(entry["rechecked"])}
        if not entry["fresh"]:
            expected[f"influence-{name}"] = {"bar": len(entry["counts"])}
    for entry in report["pairs"]:
        expected[f"pairs-{entry['name'].replace('/', '-')}"] = {"bar": 1 + len(entry["without"])}
    for metric in ("loss", "reward_margin", "reward_accuracy"):
        expected[f"dpo-{metric}"] = _curves(report["tunings"], metric)
    return expected


def _curves(trainings: list[dict[str, Any]], metric: str) -> dict[str, int]:
    return {"line": len(trainings), "dot": sum(len(entry["curves"][metric]) for entry in trainings)}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_every_plot_has_its_data_and_nothing_is_wrong(
    browser: Browser, written: tuple[Path, dict[str, Any]], tmp_path: Path, width: int, dark: bool
) -> None:
    path, report = written
    page = browser.open(path, width=width, dark=dark)
    plots = page.evaluate(PLOTS)
    assert {plot["name"]: {kind: len(marks) for kind, marks in plot["groups"].items()} for plot in plots} == (
        expected_marks(report)
    )
    for plot in plots:
        assert plot["title"]
        assert plot["smallest"] >= 10, f"words of {plot['name']} are too small to read"
        for marks in plot["groups"].values():
            assert all(mark["inside"] for mark in marks), plot["name"]
            assert any(mark["width"] + mark["height"] > 1 for mark in marks), plot["name"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    image = Image.open(page.screenshot(tmp_path / "page.png")).convert("RGB")
    surface = COLOURS["surface"].dark if dark else COLOURS["surface"].light
    assert image.getpixel((2, 2)) == tuple(bytes.fromhex(surface[1:]))
    assert len(set(image.resize((200, 400)).getdata())) > 50, "the page is empty"
    assert page.complaints == []
    assert page.requests == [path.resolve().as_uri()], "the page asked for something"


def test_bars_of_the_histogram_are_as_high_as_the_counts(
    browser: Browser, written: tuple[Path, dict[str, Any]]
) -> None:
    path, report = written
    plots = {plot["name"]: plot for plot in browser.open(path, width=1280).evaluate(PLOTS)}
    entry = report["influences"][0]
    bars = plots["influence-iteration_00-score"]["groups"]["bar"]
    highest = max(range(len(bars)), key=lambda index: entry["counts"][index])
    for bar, count in zip(bars, entry["counts"], strict=True):
        share = count / entry["counts"][highest]
        assert bar["height"] == pytest.approx(share * bars[highest]["height"], abs=2.5)
    fills = [bar["fill"] for bar in bars]
    helps, harms = (f"rgb{tuple(bytes.fromhex(COLOURS[role].light[1:]))}" for role in ("helpful", "harmful"))
    assert fills == [helps if end <= 1e-12 else harms for end in entry["edges"][1:]]


def test_tables_can_be_searched(browser: Browser, written: tuple[Path, dict[str, Any]]) -> None:
    path, report = written
    page = browser.open(path, width=1280)
    words = report["examples"][-1]["helpful"][3]["instruction"]
    rows = page.evaluate(
        f"""(() => {{
          const field = document.querySelector('input[type=search]');
          const box = document.querySelector('[data-search]');
          const shown = () => [...box.querySelectorAll('tbody tr')].filter(row => row.offsetParent !== null);
          const before = shown().length;
          field.value = {json.dumps(words.upper())};
          field.dispatchEvent(new Event('input'));
          return [before, shown().map(row => row.cells[1].textContent), field.nextElementSibling.textContent];
        }})()"""
    )
    assert rows == [len(report["examples"][-1]["helpful"]), [words], f"1 of {rows[0]} rows"]


def test_a_mark_says_what_it_shows(browser: Browser, written: tuple[Path, dict[str, Any]]) -> None:
    path, report = written
    page = browser.open(path, width=390)
    place = page.evaluate(
        """(() => {
          const mark = document.querySelector('svg[data-plot=time] [data-tip]');
          mark.scrollIntoView({block: 'center'});
          const box = mark.getBoundingClientRect();
          return {x: box.left + box.width / 2, y: box.top + box.height / 2};
        })()"""
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    work = next(iter(report["cost"]["by_work"]))
    tip = page.evaluate("({text: tip.textContent, left: tip.getBoundingClientRect().left, shown: !tip.hidden})")
    assert tip["shown"]
    assert tip["text"].startswith(work)
    assert tip["left"] >= 0


def test_the_page_prints_in_light_colours(
    browser: Browser, written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    page = browser.open(written[0], width=1280, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == f"rgb{tuple(bytes.fromhex(COLOURS['ink'].light[1:]))}"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.pdf(tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n") >= 3
