"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from montessori_ray.report.words import (
    Scale,
    count,
    duration,
    listed,
    number,
    percent,
    plus_minus,
    span,
    ticks,
    tied,
    xml_text,
)

MINUS, TIMES, DASH, HARD = "\u2212", "\u00d7", "\u2013", "\u00a0"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (4.0777, "4.08"),
        (-2.5, f"{MINUS}2.50"),
        (0.0, "0"),
        (1234.5, "1,234"),
        (0.04, "0.0400"),
        (-3.65e-3, f"{MINUS}3.65 {TIMES} 10⁻³"),
        (-3.65e-5, f"{MINUS}36.5 {TIMES} 10⁻⁶"),
        (2.5e9, f"2.50 {TIMES} 10⁹"),
        (None, DASH),
        (float("nan"), DASH),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("mean", "se", "shown"),
    [
        (-0.044, 0.0061, f"{MINUS}0.0440 ± 0.0061"),
        (-2.5525, 0.133, f"{MINUS}2.55 ± 0.13"),
        (-3.65e-3, 8e-5, f"({MINUS}3.650 ± 0.080) {TIMES} 10⁻³"),
        (0.00001, 0.2, "0.00 ± 0.20"),
        (1.5, float("nan"), "1.50"),
    ],
)
def test_a_mean_has_as_many_places_as_its_error_deserves(mean: float, se: float, shown: str) -> None:
    assert plus_minus(mean, se) == shown


def test_signs_and_spans() -> None:
    assert number(0.5, sign=True) == "+0.500"
    assert span(-2.847, -2.312) == f"{MINUS}2.85 to {MINUS}2.31"
    assert span(-6e-3, 1.4e-2) == f"{MINUS}0.006 to 0.014"
    assert span(-0.123, -0.123) == f"{MINUS}0.123 to {MINUS}0.123"


def test_a_scale_is_said_once() -> None:
    scale = Scale.of(-4e-2, 1e-3, smallest=0.1)
    assert scale.label("mean") == "mean, 10⁻³"
    assert scale.plus_minus(-8.99e-3, 4.0e-3) == f"{MINUS}9.0 ± 4.0"
    assert Scale.of(0.5).label("mean") == "mean"
    assert Scale.of() == Scale(0)


def test_ticks_of_an_axis_have_equal_places() -> None:
    assert ticks([-4.5, -3.0, 0.0]) == [f"{MINUS}4.5", f"{MINUS}3.0", "0.0"]
    assert ticks([0.0, 10.0]) == ["0", "10"]
    assert ticks([-0.0]) == ["0"]
    assert ticks([0.0, 1e-5, 2e-5]) == ["0.00000", "0.00001", "0.00002"]
    assert ticks([1e7, 2e7]) == ["10,000,000", "20,000,000"]


def test_amounts() -> None:
    assert [duration(seconds) for seconds in (0.4, 41, 89, 95, 5399, 7500)] == [
        "0 s", "41 s", "89 s", "2 min", "1 h 30 min", "2 h 05 min",
    ]  # fmt: skip
    assert (count(1, "pair"), count(1200, "pair")) == ("1 pair", "1,200 pairs")
    assert (listed([]), listed(["a"]), listed(["a", "b", "c"])) == ("", "a", "a, b and c")
    assert percent(0.666) == "67 %"


def test_a_number_keeps_its_error_and_unit_on_its_line() -> None:
    assert (
        tied(f"fell by ({MINUS}1 ± 2) {TIMES} 10⁻³, 95 %.")
        == f"fell by ({MINUS}1{HARD}±{HARD}2){HARD}{TIMES}{HARD}10⁻³, 95{HARD}%."
    )


def test_text_has_no_character_that_xml_forbids() -> None:
    kept = "tab\t, line\r\n, é, \ue000\ufffd \U0001f600"
    assert xml_text(kept) == kept
    assert xml_text("\x00a\x08b\x0b\x1fc\ud800\udfff\ufffe\uffff") == "abc"
