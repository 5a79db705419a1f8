"""squeeze shrink"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _amounts as amounts
from squeeze.cli import _options as options
from squeeze.cli import _training as training


@click.command("shrink", short_help="The best mixture of methods for a target.")
@options.model_argument
@click.option(
    "--macs", type=amounts.Amount(), required=True, help="MACs to leave: 50%, 300M."
)
@click.option(
    "--with",
    "methods",
    default="prune,factorize,convert",
    show_default=True,
    help="Methods to choose from, separated by commas.",
)
@click.option(
    "--round-to",
    type=amounts.RoundType(),
    default=8,
    show_default=True,
    help="Channels and ranks are multiples of this.",
)
@options.selecting
@options.fitting
@training.distilling
@options.rewriting
def command(model: Path, **given: Any) -> None:
    """Bring MODEL to a target by the mixture that keeps its outputs best.

    Pruning goes part of the way, then every layer takes the best of low rank,
    depthwise-separable, or nothing. Mixtures are fitted to --data (no labels needed)
    and judged on samples of it that they were not fitted to.
    """
    from squeeze.rewrite.shrink import Goal, shrink

    goal = Goal(
        macs=given["macs"],
        methods=frozenset(m.strip() for m in given["methods"].split(",") if m.strip()),
        only=tuple(given["only"]),
        skip=tuple(given["skip"]),
        round_to=given["round_to"],
    )
    with options.fit_data(given) as data:
        result = shrink(model, goal, data, options.run_options(model, "shrunk", given))
    options.print_result(result, given)
