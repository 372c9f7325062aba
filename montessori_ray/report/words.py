"""Numbers and counts as a person reads them; a true minus sign, powers of ten where a number is small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import floor, isfinite, log10

NONE = "\u2013"
"""Where there is no number."""

_MINUS, _TIMES = "\u2212", "\u00d7"
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """A power of ten that numbers shown together are given in; the unit is said once, beside them."""

    exponent: int = 0

    @classmethod
    def of(cls, *sizes: float, smallest: float = 0.01) -> Scale:
        """That of the largest: a multiple of 3, and 0 where it is huge or below `smallest`."""
        largest = max((abs(size) for size in sizes if isfinite(size)), default=0.0)
        if not largest or smallest <= largest < 1e5:
            return cls()
        return cls(3 * floor(log10(largest) / 3))

    @property
    def factor(self) -> float:
        """What 1 stands for."""
        return 10.0**self.exponent

    @property
    def unit(self) -> str:
        """`10⁻³`; empty for 1."""
        return "10" + str(self.exponent).translate(_SUPERSCRIPT) if self.exponent else ""

    def label(self, words: str) -> str:
        """Words for an axis or a column, with the unit."""
        return f"{words}, {self.unit}" if self.unit else words

    def in_unit(self, shown: str) -> str:
        """A shown number with the unit."""
        return f"{shown} {_TIMES} {self.unit}" if self.unit else shown

    def number(self, value: float | None, *, sign: bool = False, digits: int = 3) -> str:
        """`digits` significant ones, all of those before the point. A dash where there is none."""
        if value is None or not isfinite(value):
            return NONE
        return _fixed(value / self.factor, _places(value / self.factor, digits), sign)

    def plus_minus(self, mean: float, se: float, *, sign: bool = False) -> str:
        """A mean and its standard error, to two digits of the error; without one, the mean alone."""
        if not isfinite(se):
            return self.number(mean, sign=sign)
        places = _places(se / self.factor, 2) if se else _places(mean / self.factor, 3)
        return f"{_fixed(mean / self.factor, places, sign)} ± {_fixed(se / self.factor, places, False)}"

    def span(self, low: float, high: float) -> str:
        """`-2.85 to -2.31`."""
        places = _places((high - low) / self.factor, 2) if high > low else _places(low / self.factor, 3)
        return f"{_fixed(low / self.factor, places, False)} to {_fixed(high / self.factor, places, False)}"


def number(value: float | None, *, sign: bool = False, digits: int = 3) -> str:
    """`4.08`, `-1.25 x 10⁻³`: a number on its own."""
    scale = Scale.of(value or 0.0)
    return scale.in_unit(scale.number(value, sign=sign, digits=digits))


def plus_minus(mean: float, se: float, *, sign: bool = False) -> str:
    """`-2.58 ± 0.14`, `(-1.88 ± 0.21) x 10⁻³`: a mean and its standard error on their own."""
    scale = Scale.of(mean, se)
    shown = scale.plus_minus(mean, se, sign=sign)
    return scale.in_unit(f"({shown})" if scale.unit else shown)


def span(low: float, high: float) -> str:
    """`-2.85 to -2.31`: an interval on its own."""
    scale = Scale.of(low, high)
    shown = scale.span(low, high)
    return scale.in_unit(f"({shown})" if scale.unit else shown)


def ticks(values: Sequence[float]) -> list[str]:
    """Numbers along an axis, all with as many decimal places as one of them needs."""
    exponents = (Decimal(f"{value:.6g}").normalize().as_tuple().exponent for value in values)
    places = max([0, *(-int(exponent) for exponent in exponents)])
    return [_fixed(value + 0.0, places, False) for value in values]


def duration(seconds: float) -> str:
    """`41 s`, `36 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """`67 %`."""
    return f"{share * 100:.0f} %"


def count(amount: int, noun: str, plural: str | None = None) -> str:
    """`1 pair`, `1,234 pairs`."""
    return f"{amount:,} {noun if amount == 1 else plural or noun + 's'}"


def tied(text: str) -> str:
    """A text whose numbers are not parted from their errors and units at the end of a line."""
    for sign in ("±", _TIMES):
        text = text.replace(f" {sign} ", f"\u00a0{sign}\u00a0")
    return text.replace(" %", "\u00a0%")


def xml_text(text: str) -> str:
    """A text without the characters that XML does not allow: most control characters, and halves of surrogate pairs."""
    return _NOT_XML.sub("", text)


def listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def _places(value: float, digits: int) -> int:
    """Decimal places that show `digits` significant digits of a value."""
    return max(0, digits - 1 - floor(log10(abs(value)))) if value and isfinite(value) else 0


def _fixed(value: float, places: int, sign: bool) -> str:
    shown = f"{value:+,.{places}f}" if sign else f"{value:,.{places}f}"
    return shown.replace("-", _MINUS)
