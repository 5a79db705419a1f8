"""squeeze width"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from squeeze.cli import _amounts as amounts
from squeeze.cli import _options as options
from squeeze.cli import _training as training


@click.command("width", short_help="Thin every layer.")
@options.model_argument
@click.option(
    "--multiplier",
    "multipliers",
    type=amounts.ShareType(),
    multiple=True,
    required=True,
    help="Channels to leave, in (0, 1]: floor(α · channels). Several give a table.",
)
@click.option(
    "--keep",
    type=click.Choice(["best", "first"]),
    default="best",
    show_default=True,
    help="Which channels stay.",
)
@click.option(
    "--init",
    type=click.Choice(["keep", "random"]),
    default="keep",
    show_default=True,
    help="random: fresh weights, to train from scratch.",
)
@amounts.looking_at_data
@options.selecting
@amounts.round_to
@training.distilling
@options.rewriting
def command(model: Path, multipliers: tuple[Fraction, ...], **given: Any) -> None:
    """Thin every layer of MODEL to floor(multiplier · channels) (MobileNets §3.3).

    The network's inputs and outputs stay. With data, what is left is refitted by least
    squares. With several multipliers, a table is printed and nothing is written.
    """
    from squeeze.rewrite.width import Width, table, width

    plans = [
        Width(
            multiplier=multiplier,
            keep=given["keep"],
            fresh=given["init"] == "random",
            only=given["only"],
            skip=given["skip"],
            round_to=given["round_to"] or 1,
            refit=not given["no_refit"],
        )
        for multiplier in multipliers
    ]
    run_options = options.run_options(model, "width", given)
    if len(plans) == 1:
        result = width(model, plans[0], amounts.samples(given), run_options)
        options.print_result(result, given)
        return
    from squeeze.report import channels

    rows = [
        (float(p.multiplier), totals) for p, totals in table(model, plans, run_options)
    ]
    if given["as_json"]:
        options.print_json(channels.widths_json(str(model), rows))
    else:
        options.print_tables(
            [channels.widths_table(str(model), rows)], given["as_markdown"]
        )
