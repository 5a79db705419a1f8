"""squeeze resolution"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from squeeze.cli import _amounts as amounts
from squeeze.cli import _options as options


@click.command("resolution", short_help="Give the network a smaller input.")
@options.model_argument
@click.option(
    "--multiplier",
    type=amounts.ShareType(),
    help="Share of height and width to leave, to the nearest pixel.",
)
@click.option("--size", type=amounts.SizeType(), help="The new size: 192, or 192x160.")
@click.option(
    "--adapt",
    type=click.Choice(["refuse", "pool"]),
    default="refuse",
    show_default=True,
    help="Where a fully connected layer reads a whole map: pool to its old grid.",
)
@click.option(
    "--resize-input", is_flag=True, help="Keep the input; put a Resize in front."
)
@options.rewriting
def command(
    model: Path,
    multiplier: Fraction | None,
    size: tuple[int, int] | None,
    adapt: Any,
    resize_input: bool,
    **given: Any,
) -> None:
    """Give MODEL a smaller input (MobileNets §3.4); weights stay as they are."""
    from squeeze.rewrite.resolution import Resolution, resolution

    plan = Resolution(multiplier, size, adapt, resize_input)
    run_options = options.run_options(model, "resolution", given)
    options.print_result(resolution(model, plan, run_options), given)
