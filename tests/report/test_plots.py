"""Plots: that marks stand where the data says, and that a drawing carries its words, tips and the page's colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import pytest

from montessori_ray.report import plots
from montessori_ray.report.colours import COLOURS, STAND_INS, Colour
from montessori_ray.report.svg import WIDTH, marks

SVG = "{http://www.w3.org/2000/svg}"

ROWS = [
    plots.Interval(label="montessori", mean=-0.044, low=-0.056, high=-0.032, note="-0.044 ± 0.006"),
    plots.Interval(label="shuffled labels", mean=0.066, low=0.056, high=0.076, note="+0.066 ± 0.005"),
    plots.Interval(label="random <arm>", mean=0.002, low=-0.010, high=0.014),
]


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def group(root: ElementTree.Element, name: str) -> ElementTree.Element:
    found = [element for element in root.iter(f"{SVG}g") if element.get("id") == name]
    assert len(found) == 1, name
    return found[0]


def ends(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """Points of the one path in a group."""
    (path,) = group(root, name).iter(f"{SVG}path")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.get("d", ""))]


def colour_of(root: ElementTree.Element, name: str) -> str:
    (path,) = group(root, name).iter(f"{SVG}path")
    found = re.search(r"stroke: var\(--([\w-]+)\)", path.get("style", ""))
    assert found is not None
    return found[1]


def text_of(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_forest_draws_every_interval_to_one_scale() -> None:
    root = parse(plots.forest("arms", "Arms", ROWS, xlabel="change of the loss, nats"))
    drawn = [[x for x, _ in ends(root, f"arms.interval-{number}")] for number in range(3)]
    values = [[row.low, row.high] for row in ROWS]
    slope, start = np.polyfit(np.ravel(values), np.ravel(drawn), 1)
    assert slope > 0
    assert np.allclose(np.ravel(drawn), slope * np.ravel(values) + start, atol=1e-3)
    heights = [ends(root, f"arms.interval-{number}")[0][1] for number in range(3)]
    assert np.allclose(np.diff(heights), heights[1] - heights[0], atol=1e-3), "rows are equally far apart"
    assert heights == sorted(heights), "the first row is at the top"
    assert min(np.ravel(drawn)) >= 0
    assert max(np.ravel(drawn)) <= WIDTH


def test_forest_colours_what_is_more_than_noise() -> None:
    root = parse(plots.forest("arms", "Arms", ROWS, xlabel="change"))
    assert [colour_of(root, f"arms.interval-{number}") for number in range(3)] == ["helpful", "harmful", "neutral"]


def test_forest_says_labels_notes_and_numbers() -> None:
    root = parse(plots.forest("arms", "Arms & controls", ROWS, xlabel="change of the loss, nats"))
    words = text_of(root)
    assert {row.label for row in ROWS} <= set(words)
    assert "-0.044 ± 0.006" in words
    assert "0.00200 (\u22120.010 to 0.014)" in words, "numbers in the unit of the axis where there is no note"
    assert "change of the loss, nats" in words
    assert root.findtext(f"{SVG}title") == "Arms & controls"
    assert "montessori: -0.044 ± 0.006" in (root.findtext(f"{SVG}desc") or "")
    tips = [element.findtext(f"{SVG}title") for element in marks(root, "dot")]
    assert tips == ["montessori: -0.044", "shuffled labels: 0.066", "random <arm>: 0.002"]


def test_bars_are_as_long_as_their_values() -> None:
    values = [8.0, 4.0, 0.0, 1.0]
    rows = [plots.Bar(label=f"b{value}", value=value, note=f"{value}") for value in values]
    root = parse(plots.bars("time", "Time", rows, xlabel="hours"))
    widths = [max(x for x, _ in points) - min(x for x, _ in points) for points in _each(root, "time.bar", 4)]
    assert np.allclose(np.array(widths) / widths[0], np.array(values) / 8, atol=1e-3)


def test_histogram_bars_are_as_high_as_their_counts_and_have_the_colour_of_their_sign() -> None:
    counts = [1, 4, 0, 2]
    svg = plots.histogram(
        "h", "H", [-2e-3, -1e-3, 0.0, 1e-3, 2e-3], counts, xlabel="influence", ylabel="examples", extremes=(-2e-3, 7.0)
    )
    root = parse(svg)
    heights = [max(y for _, y in points) - min(y for _, y in points) for points in _each(root, "h.bar", 4)]
    assert np.allclose(np.array(heights) / heights[1], np.array(counts) / 4, atol=1e-3)
    fills = [next(group(root, f"h.bar-{number}").iter(f"{SVG}path")).get("style", "") for number in range(4)]
    assert ["helpful" in fill for fill in fills] == [True, True, False, False]
    described = root.findtext(f"{SVG}desc") or ""
    assert "7 values" in described
    assert "to 7.00, 5 of them below zero" in described
    assert "to 7.00: 2" in svg, "what lies beyond the axis is in the last bar, which says so"


def test_the_noise_band_is_as_wide_as_the_noise() -> None:
    svg = plots.histogram(
        "h", "H", [-4.0, -2.0, 0.0, 2.0], [1, 1, 1], xlabel="x", ylabel="y", extremes=(-4, 2), noise=1.0, error=2.0
    )
    root = parse(svg)
    widths = {}
    for name in ("noise", "error"):
        across = [x for x, _ in ends(root, f"h.band-{name}")]
        widths[name] = max(across) - min(across)
    bar = [x for x, _ in ends(root, "h.bar-0")]
    assert widths["noise"] == pytest.approx(max(bar) - min(bar), rel=1e-3)
    assert widths["error"] == pytest.approx(2 * widths["noise"], rel=1e-3)


def test_dots_show_every_value_or_quantiles_of_many() -> None:
    few = plots.Values(label="few", values=[-1.0, 0.0, 2.0], mean=0.3, low=-1, high=1)
    many = plots.Values(
        label="many", values=np.random.default_rng(0).normal(size=5000).tolist(), mean=0, low=-1, high=1
    )
    root = parse(plots.dots("d", "D", [few, many], xlabel="influence"))
    assert len(marks(root, "dot")) == 3 + plots.MAX_DOTS
    assert [element.findtext(f"{SVG}title") for element in marks(root, "dot")[:3]] == ["-1", "0", "2"]


def test_curves_show_every_point_or_means_of_many() -> None:
    short = plots.Curve(label="a", points=[(1, 2.0), (2, 1.0)], role="series-0")
    long = plots.Curve(label="b", points=[(step, 1 / step) for step in range(1, 1001)], role="series-1")
    root = parse(plots.curves("c", "C", [short, long], xlabel="step", ylabel="loss"))
    assert len(marks(root, "dot")) == 2 + plots.MAX_POINTS
    steps, values = plots.thinned(long.points, 10)
    assert (steps[0], len(steps)) == (pytest.approx(50.5), 10)
    assert values[0] == pytest.approx(sum(1 / step for step in range(1, 101)) / 100)


def test_running_mean_of_a_straight_line_is_the_line() -> None:
    values = [2.0 * step for step in range(40)]
    assert plots.running_mean(values)[2:-2] == pytest.approx(values[2:-2])


def test_scatter_has_a_mark_for_every_point() -> None:
    points = [(f"e{number}", number / 7, number / 7 + 0.01) for number in range(7)]
    root = parse(plots.scatter("s", "S", points, xlabel="x", ylabel="y", noise=0.02))
    assert len(marks(root, "dot")) == 7


def test_the_same_data_gives_the_same_bytes() -> None:
    assert plots.forest("arms", "A", ROWS, xlabel="x") == plots.forest("arms", "A", ROWS, xlabel="x")


def test_a_drawing_takes_the_colours_of_its_page_and_keeps_its_ids_to_itself() -> None:
    svg = plots.forest("arms", "A", ROWS, xlabel="x")
    root = parse(svg)
    assert not [stand_in for stand_in in STAND_INS.values() if stand_in in svg]
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour of matplotlib's own"
    assert "font-family" not in svg
    assert all(element.get("id", "arms.").startswith("arms.") for element in root.iter())
    ids = {element.get("id") for element in root.iter()}
    referred = [element.get("href", "")[1:] for element in root.iter() if element.get("href")]
    referred += re.findall(r"url\(#([^)]+)\)", svg)
    assert referred
    assert set(referred) <= ids


def test_tips_are_text() -> None:
    row = plots.Bar(label='<b> & id="x" url(#y)', value=1, note="#fe00fd")
    svg = plots.bars("t", "T", [row], xlabel="x")
    assert marks(parse(svg), "bar")[0].findtext(f"{SVG}title") == '<b> & id="x" url(#y): #fe00fd'


def test_labels_are_drawn_whatever_they_hold() -> None:
    """A category may hold a control character that XML forbids, or what looks like a formula."""
    labels = ["list\x0bs\x00", "$x^$", "a <b> & c"]
    rows = [plots.Interval(label=label, mean=1, low=0, high=2, note=label) for label in labels]
    drawn = parse(plots.forest("f", "F\x01", rows, xlabel="x"))
    assert text_of(drawn)[-6:] == ["lists", "lists", "$x^$", "$x^$", "a <b> & c", "a <b> & c"]
    assert drawn.findtext(f"{SVG}title") == "F"
    assert [element.findtext(f"{SVG}title") for element in marks(drawn, "dot")] == [
        "lists: 1",
        "$x^$: 1",
        f"{labels[2]}: 1",
    ]


def _each(root: ElementTree.Element, name: str, amount: int) -> list[list[tuple[float, float]]]:
    return [ends(root, f"{name}-{number}") for number in range(amount)]


# -- colours --------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", Colour._fields)
def test_text_and_marks_stand_out_from_the_page(theme: str) -> None:
    def of(role: str) -> str:
        colour: str = getattr(COLOURS[role], theme)
        return colour

    for role, least in [("ink", 7.0), ("muted", 4.5), ("helpful", 4.5), ("harmful", 4.5), ("neutral", 3.0)]:
        assert contrast(of(role), of("surface")) >= least, role
    for role in ("ink", "muted"):
        assert contrast(of(role), of("panel")) >= 4.5, role
    for number in range(4):
        assert contrast(of(f"series-{number}"), of("surface")) >= 3.0


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("theme", Colour._fields)
@pytest.mark.parametrize("vision", VISION)
def test_helpful_and_harmful_are_told_apart_by_everyone(theme: str, vision: str) -> None:
    seen = [np.array(VISION[vision]) @ _linear(getattr(COLOURS[role], theme)) for role in ("helpful", "harmful")]
    assert np.linalg.norm(_lab(seen[0]) - _lab(seen[1])) > 30, "CIE 1976 difference; 2.3 is just noticeable"


def _linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _lab(linear: Sequence[float] | np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt((np.array(to_xyz) @ np.clip(linear, 0, 1)) / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_long_labels_of_rows_lose_their_middle() -> None:
    long = "arms/a_rather_long_name_of_an_arm/tuning_0/iteration_00 and more of it"
    said = plots.shortened(long)
    assert len(said) <= plots.LABEL_LENGTH
    assert said.startswith("arms/a_rather")
    assert said.endswith("more of it")
    assert plots.shortened("tuned 1x") == "tuned 1x"
