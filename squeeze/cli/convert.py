"""squeeze convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _amounts as amounts
from squeeze.cli import _options as options
from squeeze.cli import _training as training


@click.command("convert", short_help="Replace standard convolutions by a block.")
@options.model_argument
@click.option("--to", required=True, metavar="BLOCK", help="A block, or a .toml file.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the block; `squeeze rules BLOCK` lists them. Repeatable.",
)
@options.selecting
@click.option(
    "--keep-first/--no-keep-first",
    default=None,
    help="Leave the layers that nothing precedes. Default: the block's.",
)
@click.option(
    "--pool",
    type=click.Choice(["keep", "absorb"]),
    help="Whether a max-pool behind a convolution becomes part of the block.",
)
@click.option("--allow-costlier", is_flag=True, help="Also where the block costs more.")
@click.option(
    "--fit",
    type=click.Choice(["auto", "weights", "data", "none"]),
    default="auto",
    help="What new weights are fitted to. auto: --data if given, else the old weights.",
)
@click.option(
    "--macs",
    type=amounts.Amount(),
    help="MACs of the whole model: 50%, 600M. Chooses the sites and the multiplier.",
)
@options.fitting
@training.distilling
@options.rewriting
def command(model: Path, to: str, settings: tuple[str, ...], **given: Any) -> None:
    """Replace MODEL's standard convolutions by a block.

    Every convolution gets one line: taken, with its cost before and after, or refused
    with the reason.
    """
    from squeeze.rewrite.convert import convert

    with options.fit_data(given) as data:
        result = convert(
            model,
            to,
            settings=options.assignments(settings),
            only=given["only"],
            skip=given["skip"],
            keep_first=given["keep_first"],
            pool=given["pool"],
            allow_costlier=given["allow_costlier"],
            fit=given["fit"],
            data=data,
            macs=amounts.number(given["macs"]),
            options=options.run_options(model, Path(to).stem, given),
        )
    options.print_result(result, given)
