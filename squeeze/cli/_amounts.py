"""Amounts as users write them, and the options of commands that look at data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from squeeze.rewrite.plan import Limit
    from squeeze.rewrite.samples import Samples

F = TypeVar("F", bound=Callable[..., Any])
PREFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
MOST = 10**18  # more than any model costs


class ShareType(click.ParamType):  # type: ignore[type-arg]
    """A share as an exact decimal: 0.29 is 29/100, and so is 29%."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        if isinstance(value, Fraction):
            return value
        text = str(value).strip()
        try:
            if text.endswith("%"):
                return Fraction(text[:-1].strip()) / 100
            return Fraction(text)
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not a share; write 0.5 or 50%", param, ctx)


class Amount(click.ParamType):  # type: ignore[type-arg]
    """A count with a prefix (600M), a share of what there is (50%), or one of `words`.

    With `zero`, any amount from 0 up: a threshold; with `unit`, so many of that unit.
    """

    name = "amount"

    def __init__(self, *words: str, zero: bool = False, unit: str = "") -> None:
        self.words, self.zero, self.unit = words, zero, unit

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Limit | str:
        from squeeze.rewrite.plan import Limit

        if isinstance(value, Limit):
            return value
        text = str(value).strip()
        if text in self.words:
            return text
        try:
            found = _read(text.removesuffix(self.unit).strip())
        except (ValueError, ZeroDivisionError):
            found = None
        if problem := self._problem(found):
            self.fail(f"{text!r} {problem}", param, ctx)
        assert found is not None
        return found

    def _problem(self, found: Limit | None) -> str:
        """What is wrong with an amount, "" if nothing is."""
        if self.zero or self.unit:
            example = f"80% or 5{self.unit}" if self.unit else "50% or 600M"
            if found is None:
                return f"is not an amount; write {example}"
            return "is negative" if found.value < 0 else ""
        most = 1 if found is not None and found.is_share else MOST
        if found is None or not 0 < found.value <= most:
            also = f", or {' or '.join(self.words)}" if self.words else ""
            return f"is not a count or a share; write 600M or 50%{also}"
        if not found.is_share and found.value < 1:
            return f"is less than one; write {100 * float(found.value):g}% for a share"
        return ""


def _read(text: str) -> Limit:
    """Raises ValueError (or ZeroDivisionError) for what is no number."""
    from squeeze.rewrite.plan import Limit

    if text.endswith("%"):
        return Limit(Fraction(text[:-1].strip()) / 100, True)
    factor = PREFIXES.get(text[-1:], 1)
    digits = text[:-1] if factor > 1 else text
    return Limit(Fraction(digits.strip()) * factor, False)


def number(limit: Limit | str | None) -> Any:
    """An amount as the Python API takes it; words and None stay."""
    return limit if limit is None or isinstance(limit, str) else limit.number


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """HxW, or one number for both."""

    name = "hxw"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().replace("×", "x").split("x")
        if not 1 <= len(parts) <= 2 or not all(p.strip().isdecimal() for p in parts):
            self.fail(f"{value!r} is not a size; write 192 or 192x160", param, ctx)
        height, width = int(parts[0]), int(parts[-1])
        return height, width


class RoundType(click.ParamType):  # type: ignore[type-arg]
    """A number of channels, or `native`: what the processor adds at once."""

    name = "n|native"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if value == "native":
            from squeeze.rewrite.channels.native import vector_floats

            return vector_floats()
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = 0
        if number < 1:
            self.fail(f"{value!r} is not a count; write 8, 16 or native", param, ctx)
        return number


def looking_at_data(function: F) -> F:
    """--data, --samples, --eval-data and --no-refit."""
    options = [
        click.option("--data", help="What to calibrate on; see the README."),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            help="How many to use, drawn by seed.  [default: 512; all to count]",
        ),
        click.option(
            "--eval-data", help="What to evaluate on: nothing is fitted to it."
        ),
        click.option(
            "--no-refit",
            is_flag=True,
            help="Repair means and spreads alone, not by least squares.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def samples(given: Mapping[str, Any]) -> Samples:
    """`rewrite.prune.Samples` from the options of `looking_at_data`."""
    from squeeze.cli._options import images
    from squeeze.rewrite.samples import Samples

    return Samples(given["data"], given["eval_data"], given["samples"], images())


def round_to(function: F) -> F:
    return click.option(
        "--round-to",
        type=RoundType(),
        help="Keep multiples of this many channels.",
    )(function)
