"""squeeze compare"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options
from squeeze.cli._progress import bar


@click.command("compare", short_help="Costs and output differences of two models.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--data", help="Inputs to compare on. Default: random ones.")
@click.option(
    "--samples", type=click.IntRange(min=1), help="Draw that many samples of --data."
)
@click.option("--layers", is_flag=True, help="Show where the error arises.")
@click.option("--top", type=click.IntRange(min=1), help="Only the worst layers.")
@click.option("--bench", is_flag=True, help="Time both as well.")
@options.seed
@options.input_shape
@options.as_html
@options.as_markdown
@options.as_json
def command(base: Path, new: Path, **given: Any) -> None:
    """Compare NEW with BASE: what each costs, and how far their outputs differ.

    Both run on the same inputs. With labelled data: the accuracy of both, and their
    difference with a 95 % interval. Values that share a name are compared by --layers.
    """
    from squeeze.measure import cases, fidelity, latency, trace
    from squeeze.report import compare as report

    shapes = options.shapes_of(given["input_shapes"])
    pair = [cases.load(path, shapes) for path in (base, new)]
    data = _data(pair[0], given)
    with bar("comparing") as progress:
        found = fidelity.compare_outputs(
            base,
            new,
            data,
            shapes=pair[0].shapes,
            seed=given["seed"],
            progress=progress,
        )
    values = trace.differences(*pair, data, given["seed"]) if given["layers"] else []
    timed = None
    if given["bench"]:
        with bar("timing") as progress:
            timed = latency.bench(
                cases.candidates(pair, seed=given["seed"]),
                latency.Settings(seed=given["seed"]),
                progress,
            )
    result = report.Report(pair[0], pair[1], found, tuple(values), timed)
    options.report(
        report.tables(result, given["top"]),
        lambda: report.compare_json(result),
        given,
        "squeeze compare",
    )


def _data(case: Any, given: dict[str, Any]) -> Any:
    if not given["data"]:
        return None
    from squeeze.calibrate.data import open_data

    data = open_data(given["data"], case.model, case.shapes, options.images())
    return data.sample(given["samples"], given["seed"]) if given["samples"] else data
