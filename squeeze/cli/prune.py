"""squeeze prune"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from squeeze.cli import _amounts as amounts
from squeeze.cli import _options as options
from squeeze.cli import _training as training

CRITERIA = "activations apoz mean outlier l1 l2 energy reconstruction".split()


@click.command("prune", short_help="Remove the channels that matter least.")
@options.model_argument
@click.option(
    "--threshold",
    type=amounts.Amount(zero=True),
    help="Remove channels active at most so often (sample × position), or this share; "
    "0 changes no output on the data. With other criteria: the score itself.",
)
@click.option(
    "--ratio", type=amounts.ShareType(), help="Share to remove from each layer."
)
@click.option("--macs", type=amounts.Amount(), help="MACs to leave: 50% or 300M.")
@click.option("--params", type=amounts.Amount(), help="Parameters to leave.")
@click.option(
    "--latency",
    type=amounts.Amount(unit="ms"),
    help="Measured latency to leave: 80% or 5ms.",
)
@click.option(
    "--by",
    type=click.Choice(CRITERIA),
    help="What matters; l1 and l2 need no data.  [default: activations for "
    "--threshold, else energy with data, l2 without]",
)
@amounts.looking_at_data
@options.selecting
@click.option(
    "--min-channels",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Leave every layer at least so many.",
)
@amounts.round_to
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --threshold: prune and refit again, until nothing more goes.",
)
@click.option(
    "--distort",
    type=float,
    default=0.0,
    help="Between rounds, add rand·(1 − var(weights)) times this to the weights.",
)
@click.option(
    "--distill-between",
    is_flag=True,
    help="Between rounds, train what is left to do what MODEL does (--train l1=0.1 "
    "lets more channels die).",
)
@click.option(
    "--attention",
    type=click.Choice(["dims", "heads"]),
    default="dims",
    show_default=True,
    help="What goes from attention: dimensions of every head, or whole heads.",
)
@click.option("--explain", is_flag=True, help="List what could go and what can't.")
@training.distilling
@options.rewriting
def command(model: Path, explain: bool, **given: Any) -> None:
    """Remove the channels of MODEL that matter least, and repair what that broke.

    With --threshold 0 and data, only what changes no output goes. With a target the
    choice is made over all layers at once. With data, what is left is refitted by
    least squares; no labels are needed.
    """
    from squeeze.rewrite.prune import Plan, cyclic, prune

    if explain:
        return _explain(model, given)
    plan = Plan(
        by=given["by"],
        threshold=given["threshold"],
        ratio=_ratio(given["ratio"]),
        macs=given["macs"],
        params=given["params"],
        latency=given["latency"],
        only=given["only"],
        skip=given["skip"],
        min_channels=given["min_channels"],
        round_to=given["round_to"],
        refit=not given["no_refit"],
        rounds=given["rounds"],
        distort=given["distort"],
        attention=given["attention"],
    )
    run_options = options.run_options(model, "pruned", given)
    if given["distill_between"] and (given["rounds"] < 2 or not cyclic(plan)):
        raise click.UsageError(
            "--distill-between trains between rounds: it goes with --rounds of at "
            "least 2 and --threshold, or --by outlier; --distill trains afterwards"
        )
    between = training.between(model, given) if given["distill_between"] else None
    result = prune(model, plan, amounts.samples(given), run_options, between)
    options.print_result(result, given)


def _ratio(ratio: Fraction | None) -> Fraction | None:
    if ratio is not None and not 0 <= ratio < 1:
        raise click.BadParameter(
            f"{float(ratio):g} must be at least 0 and below 1", param_hint="--ratio"
        )
    return ratio


def _explain(model: Path, given: dict[str, Any]) -> None:
    from squeeze.report import channels
    from squeeze.rewrite.channels.explain import explain

    found = explain(
        model,
        options.shapes_of(given["input_shapes"]),
        simplify=not given["no_simplify"],
        attention=given["attention"],
    )
    if given["as_json"]:
        options.print_json(channels.explanation_json(found))
    else:
        options.print_tables(channels.tables(found), given["as_markdown"])
