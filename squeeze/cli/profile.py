"""squeeze profile"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options


@click.command("profile", short_help="What a model costs, layer by layer.")
@options.model_argument
@click.option(
    "--sort",
    type=click.Choice(["graph", "macs", "flops", "params", "elements", "name"]),
    default="graph",
    help="Order of the layers.",
)
@click.option("--top", type=click.IntRange(min=1), help="Show only that many layers.")
@click.option("--by", type=click.Choice(["op", "kind"]), help="Sum over ops or kinds.")
@click.option(
    "--device",
    metavar="NAME|FILE",
    help="Predict the time per layer on a device; see rules/README.md.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Layers as CSV.")
@options.input_shape
@options.as_html
@options.as_markdown
@options.as_json
def command(
    model: Path,
    sort: str,
    top: int | None,
    by: str | None,
    device: str | None,
    as_csv: bool,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    **given: Any,
) -> None:
    """What MODEL costs, layer by layer: MACs, FLOPs, parameters and memory.

    Kinds are those of MobileNets, Table 2. "in ÷ out" is the flow of data of EffNet,
    Table 1, marked where a layer compresses it 4 times or more.
    """
    from squeeze.measure import cases
    from squeeze.report import costs, devices, table

    case = cases.load(model, options.shapes_of(input_shapes))
    result = case.costs
    found = _predicted(case, device) if device else None
    layers = list(result.layers)
    if sort != "graph":
        layers.sort(key=costs.SORTS[sort])
    shown = layers[:top]
    if as_csv:
        click.echo(table.csv_text(costs.CSV_COLUMNS, costs.csv_rows(shown)), nl=False)
        return
    body = (
        costs.grouped_table(result, by)
        if by
        else costs.layers_table(result, shown, len(layers) - len(shown))
    )
    tables = [body, costs.totals_table(result)]
    if found:
        tables.append(devices.prediction_table(found, top))
    options.report(
        tables, lambda: costs.profile_json(result, found), given, "squeeze profile"
    )


def _predicted(case: Any, name: str) -> Any:
    from squeeze.cost import device

    constants = device.load(name)
    return device.predict(case.model.graph, case.shapes, case.costs, constants)
