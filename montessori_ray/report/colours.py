"""Every colour of a report, named once by what it stands for.

Plots are drawn in stand-in colours, which `svg.py` replaces by the CSS variables of the page: one drawing serves light,
dark and print. Data colours are Okabe and Ito's (told apart with any colour vision), lightened for dark pages.
"""

from __future__ import annotations

from typing import NamedTuple


class Colour(NamedTuple):
    """A role's colour on a light and on a dark page."""

    light: str
    dark: str


COLOURS = {
    # the page
    "surface": Colour("#ffffff", "#14171b"),
    "panel": Colour("#f5f6f8", "#1d2126"),
    "line": Colour("#d5d9df", "#3a4149"),
    "ink": Colour("#1b1f24", "#e6e9ed"),
    "muted": Colour("#5a626d", "#a0a9b4"),
    # what data stands for
    "helpful": Colour("#0072b2", "#56b4e9"),
    "harmful": Colour("#c25400", "#ff9d52"),
    "neutral": Colour("#767f8a", "#929ba6"),
    "noise": Colour("#dfe3e8", "#333a42"),
    # lines that differ in nothing but their number
    "series-0": Colour("#0072b2", "#56b4e9"),
    "series-1": Colour("#c25400", "#ff9d52"),
    "series-2": Colour("#00805c", "#2fc79a"),
    "series-3": Colour("#a8508a", "#e39cc6"),
}

STAND_INS = {role: f"#fe{number:02x}fd" for number, role in enumerate(COLOURS)}
"""Role -> the colour a plot is drawn in; none of them is one that matplotlib draws by itself."""


NUM_SERIES = sum(role.startswith("series-") for role in COLOURS)


def series(number: int) -> str:
    """Role of the line of this number; the colours come round again after NUM_SERIES."""
    return f"series-{number % NUM_SERIES}"


def css_variables() -> str:
    """The style rules that give every role its colour: light, dark where the reader's system is, light in print."""
    light = "".join(f"--{role}:{colour.light};" for role, colour in COLOURS.items())
    dark = "".join(f"--{role}:{colour.dark};" for role, colour in COLOURS.items())
    return (
        f":root{{color-scheme:light dark;{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
