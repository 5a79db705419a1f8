"""Quantities with units: read strictly, compared exactly.

A quantity is a Fraction, so that `baseline + 5 %` has no rounding and raising a limit
can never turn a pass into a failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from squeeze.errors import RuleError, nearest

LARGEST = Fraction(10) ** 30  # beyond any model: a limit this large holds nothing
_NUMBER = re.compile(
    r"(\d[\d_]{0,39}(?:\.\d{1,20})?(?:[eE][+-]?\d{1,2})?)\s?(\S{0,12})"
)

COUNT = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BYTES = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
TIME = {  # milliseconds
    "us": Fraction(1, 1000),
    "µs": Fraction(1, 1000),
    "ms": Fraction(1),
    "s": Fraction(1000),
    "min": Fraction(60_000),
}
SHARE = {"%": Fraction(1, 100)}
POINTS = {"pp": Fraction(1, 100)}


@dataclass(frozen=True)
class Family:
    """Units that measure one thing; `example` is how a limit is written."""

    name: str
    units: Mapping[str, int | Fraction]
    example: str


FAMILIES = {
    "count": Family("a count", COUNT, "600M"),
    "bytes": Family("a size", BYTES, "20MB"),
    "time": Family("a time", TIME, "20ms"),
    "share": Family("a share", SHARE, "90%"),
    "points": Family("percentage points", POINTS, "0.5pp"),
    "percent": Family("a percentage", SHARE, "10%"),
}


@dataclass(frozen=True)
class Quantity:
    """An amount in the family's base unit: elements, bytes, ms, or a fraction of 1."""

    amount: Fraction
    family: str
    text: str


def parse(value: object, families: tuple[str, ...], where: str) -> Quantity:
    """Read one quantity of one of the families; RuleError says what is wrong.

    Bare numbers are counts or bytes; shares, points and times need their unit.
    """
    number, unit, text = _split(value, families, where)
    for family in families:
        if unit in FAMILIES[family].units:
            amount = number * FAMILIES[family].units[unit]
            if amount > LARGEST:
                raise RuleError(f"{where}: {text} is too large to limit anything")
            return Quantity(amount, family, text)
    raise RuleError(f"{where}: {_wrong_unit(unit, text, families)}")


def _split(
    value: object, families: tuple[str, ...], where: str
) -> tuple[Fraction, str, str]:
    example = _examples(families)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RuleError(f"{where}: {_shown(value)} is not {example}")
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("-"):
            raise RuleError(f"{where}: {_shown(value)} is negative; write {example}")
        match = _NUMBER.fullmatch(text)
        if match is None:
            raise RuleError(f"{where}: {_shown(value)} is not {example}")
        return Fraction(match[1].replace("_", "")), match[2], text
    if not math.isfinite(value) if isinstance(value, float) else False:
        raise RuleError(f"{where}: {value} is not a limit; write {example}")
    if value < 0:
        raise RuleError(f"{where}: {_shown(value)} is negative; write {example}")
    if value > LARGEST:
        raise RuleError(f"{where}: a number over 10^30 is too large to limit anything")
    return Fraction(value), "", str(value)


def _wrong_unit(unit: str, text: str, families: tuple[str, ...]) -> str:
    known = [u for f in families for u in FAMILIES[f].units if u]
    if not unit:
        return f"{text} has no unit; write {_examples(families)}"
    same = next((u for u in known if u.lower() == unit.lower()), None)
    same = known[0] if len(known) == 1 else same
    hint = f"; did you mean {same!r}?" if same else nearest(unit, known)
    return f"unknown unit {unit!r} in {text!r}{hint}"


def _examples(families: tuple[str, ...]) -> str:
    return " or ".join(
        f"{FAMILIES[f].name} such as {FAMILIES[f].example!r}" for f in families
    )


def _shown(value: object) -> str:
    text = (
        repr(value)
        if not isinstance(value, int) or abs(value) < 10**30
        else "a huge number"
    )
    return text if len(text) <= 60 else f"{text[:57]}…"


# -- as text ------------------------------------------------------------------------


def show(amount: Fraction | float, family: str) -> str:
    """An amount for people: 620 M, 1.65 MB, 12.3 ms, 91.2 %, 0.50 pp.

    Counts and bytes show four digits, so that values near a limit stay apart.
    """
    number = float(amount)
    if family in ("share", "percent"):
        return f"{100 * number:.4g} %"
    if family == "points":
        return f"{100 * number:.3g} pp"
    if family == "time":
        return f"{number:.4g} ms"
    suffix = "B" if family == "bytes" else ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.4g} {prefix}{suffix}"
    return f"{number:.4g} {suffix}".strip()


def written(amount: Fraction, family: str) -> str:
    """The shortest spelling that `parse` reads back, at or above the amount."""
    if family in ("share", "percent"):
        return f"{math.floor(amount * 1000) / 10:g}%"
    base = FAMILIES[family].units
    suffix = "B" if family == "bytes" else ""
    for prefix in ("G", "M", "k"):
        unit = prefix + suffix
        factor = Fraction(base[unit]) if unit in base else Fraction(1)
        if amount >= factor > 1:
            digits = max(0, 2 - int(math.log10(float(amount / factor))))
            scaled = math.ceil(amount / factor * 10**digits) / 10**digits
            return f"{scaled:.{digits}f}{unit}"
    return (
        f"{math.ceil(amount)}{suffix}" if family != "time" else f"{float(amount):.3g}ms"
    )
