"""Amounts as users write them, and the options of commands that look at data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from squeeze.rewrite.samples import Samples

F = TypeVar("F", bound=Callable[..., Any])
PREFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


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


class LimitType(click.ParamType):  # type: ignore[type-arg]
    """An amount with a prefix (600M), or a share of what there is (50%)."""

    name = "amount"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        from squeeze.rewrite.prune import Limit

        if isinstance(value, Limit):
            return value
        text = str(value).strip()
        try:
            if text.endswith("%"):
                found = Limit(Fraction(text[:-1].strip()) / 100, True)
            else:
                number = text.removesuffix("ms").strip()
                factor = PREFIXES.get(number[-1:], 1)
                digits = number[:-1] if number[-1:] in PREFIXES else number
                found = Limit(Fraction(digits.strip()) * factor, False)
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not an amount; write 50% or 600M", param, ctx)
        if found.value < 0:
            self.fail(f"{value!r} is negative", param, ctx)
        return found


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
