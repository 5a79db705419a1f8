"""squeeze compare"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options
from squeeze.cli._progress import bar


@click.command("compare", short_help="Costs and output differences of two models.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", nargs=-1, required=True, type=click.Path(path_type=Path))
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
def command(base: Path, new: tuple[Path, ...], **given: Any) -> None:
    """Compare NEW with BASE: what each costs, and how far their outputs differ.

    Both run on the same inputs. With labelled data: the accuracy of both, and their
    difference with a 95 % interval. Values that share a name are compared by --layers.
    Several NEW are each compared with BASE.
    """
    from squeeze.measure import cases
    from squeeze.report import compare as report

    shapes = options.shapes_of(given["input_shapes"])
    first = cases.load(base, shapes)
    data = _data(first, given)
    results = [_compared(first, cases.load(p, shapes), data, given) for p in new]
    options.report(
        [table for result in results for table in report.tables(result, given["top"])],
        lambda: report.documents(results),
        given,
        "squeeze compare",
    )


def _compared(base: Any, new: Any, data: Any, given: dict[str, Any]) -> Any:
    from squeeze.measure import cases, fidelity, latency, trace
    from squeeze.report.compare import Report

    seed = given["seed"]
    with bar(f"comparing {new.path.name}") as progress:
        found = fidelity.compare_outputs(
            base.path,
            new.path,
            data,
            shapes=base.shapes,
            seed=seed,
            progress=progress,
        )
    values: list[Any] = []
    if given["layers"]:
        with bar("comparing values"):
            values = trace.differences(base, new, data, seed)
    if not given["bench"]:
        return Report(base, new, found, values)
    with bar(f"timing {new.path.name}") as progress:
        timed = latency.bench(
            cases.candidates([base, new], seed=seed),
            latency.Settings(seed=seed),
            progress,
        )
    return Report(base, new, found, values, timed)


def _data(case: Any, given: dict[str, Any]) -> Any:
    if not given["data"]:
        return None
    from squeeze.calibrate.data import open_data

    data = open_data(given["data"], case.model, case.shapes, options.images())
    return data.sample(given["samples"], given["seed"]) if given["samples"] else data
