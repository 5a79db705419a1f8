"""squeeze profile"""

from __future__ import annotations

from pathlib import Path

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
@click.option("--csv", "as_csv", is_flag=True, help="Layers as CSV.")
@options.input_shape
@options.as_markdown
@options.as_json
def command(
    model: Path,
    sort: str,
    top: int | None,
    by: str | None,
    as_csv: bool,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    as_markdown: bool,
    as_json: bool,
) -> None:
    """What MODEL costs, layer by layer: MACs, FLOPs, parameters and memory.

    Kinds are those of MobileNets, Table 2. "in ÷ out" is the flow of data of EffNet,
    Table 1, marked where a layer compresses it 4 times or more.
    """
    from squeeze.cost import profile
    from squeeze.report import costs, table

    result = profile(model, options.shapes_of(input_shapes))
    layers = list(result.layers)
    if sort != "graph":
        layers.sort(key=costs.SORTS[sort])
    shown = layers[:top]
    if as_json:
        options.print_json(costs.profile_json(result))
    elif as_csv:
        click.echo(table.csv_text(costs.CSV_COLUMNS, costs.csv_rows(shown)), nl=False)
    else:
        body = (
            costs.grouped_table(result, by)
            if by
            else costs.layers_table(result, shown, len(layers) - len(shown))
        )
        options.print_tables([body, costs.totals_table(result)], as_markdown)
