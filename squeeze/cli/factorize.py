"""squeeze factorize"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _amounts as amounts
from squeeze.cli import _options as options
from squeeze.cli import _training as training


@click.command("factorize", short_help="Low-rank layers, fully connected and others.")
@options.model_argument
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of each layer's energy to keep. Default: 0.99.",
)
@click.option(
    "--rank",
    type=amounts.Amount("evbmf"),
    help="Ranks: a number, a share of the full rank (25%), or evbmf.",
)
@click.option(
    "--macs", type=amounts.Amount(), help="MACs of the whole model: 50%, 600M."
)
@click.option("--params", type=amounts.Amount(), help="Parameters of the whole model.")
@click.option(
    "--method",
    type=click.Choice(["auto", "pca", "spatial", "tucker", "separable", "any"]),
    default="auto",
    help="For convolutions; auto takes the best low rank per layer, any the best.",
)
@click.option(
    "--round-to",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Ranks are multiples of this.",
)
@click.option("--allow-costlier", is_flag=True, help="Also where it costs more.")
@options.selecting
@options.fitting
@training.distilling
@options.rewriting
def command(model: Path, **given: Any) -> None:
    """Replace MODEL's layers by products of thinner ones.

    Give one of --energy, --rank, --macs and --params. With --data the factors are
    fitted to what the layers see, in network order.
    """
    from squeeze.rewrite.factorize import factorize

    with options.fit_data(given) as data:
        result = factorize(
            model,
            energy=given["energy"],
            rank=amounts.number(given["rank"]),
            macs=amounts.number(given["macs"]),
            params=amounts.number(given["params"]),
            method=given["method"],
            only=given["only"],
            skip=given["skip"],
            round_to=given["round_to"],
            allow_costlier=given["allow_costlier"],
            data=data,
            options=options.run_options(model, "factorized", given),
        )
    options.print_result(result, given)
