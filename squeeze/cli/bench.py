"""squeeze bench"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options
from squeeze.cli._progress import bar


@click.command("bench", short_help="onnxruntime latency, models side by side.")
@click.argument("model", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Model to compare all others with. Default: the first of several.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Time to spend on all models together, about.",
)
@click.option("--runs", type=click.IntRange(min=1), help="Timed runs per model.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Threads within an operator. Default: onnxruntime's.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch."
)
@click.option("--provider", default="cpu", show_default=True, help="Where to run.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "processor"]),
    default="wall",
    show_default=True,
    help="processor: of one thread, without what other programs take.",
)
@click.option("--data", help="Inputs to run on. Default: random ones.")
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 0.999),
    default=0.95,
    show_default=True,
    help="Level of the ratio's interval.",
)
@click.option("--layers", is_flag=True, help="Time per layer, from its profiler.")
@click.option("--top", type=click.IntRange(min=1), help="Only the slowest layers.")
@click.option(
    "--calibrate-device",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure this machine's constants into a device file, for profile --device.",
)
@options.seed
@options.input_shape
@options.as_html
@options.as_markdown
@options.as_json
def command(model: tuple[Path, ...], **given: Any) -> None:
    """Time each MODEL in onnxruntime, in turns, in one process.

    Several models are compared with the baseline: the ratio of times, with an interval
    that says whether the difference is more than this machine's noise.
    """
    if given["calibrate_device"]:
        _calibrate(given["calibrate_device"], given)
        if not model:
            return
    if not model:
        raise click.UsageError("missing argument 'MODEL...': name a model to time")
    from squeeze.report import bench as report

    result = _measure(model, given)
    options.report(
        report.tables(result, given["top"]),
        lambda: report.bench_json(result),
        given,
        "squeeze bench",
    )


def _measure(model: tuple[Path, ...], given: dict[str, Any]) -> Any:
    from squeeze import session
    from squeeze.measure import cases, latency, layers
    from squeeze.report.bench import Report

    paths = list(model)
    if given["baseline"]:
        others = [p for p in paths if p != given["baseline"]]
        paths = [given["baseline"], *(others or paths)]
    settings = latency.Settings(
        seconds=given["seconds"],
        runs=given["runs"],
        threads=given["threads"],
        provider=session.provider(given["provider"]),
        seed=given["seed"],
        level=given["confidence"],
        clock=given["clock"],
    )
    shapes = options.shapes_of(given["input_shapes"])
    loaded = [cases.load(path, shapes, given["batch"]) for path in paths]
    candidates = cases.candidates(
        loaded, given["data"], given["seed"], options.images()
    )
    inputs = given["data"] or f"random inputs of seed {given['seed']}"
    if given["layers"]:
        with bar("profiling") as progress:
            timelines = [
                layers.timeline(candidate, case.model, case.costs, settings, progress)
                for candidate, case in zip(candidates, loaded, strict=True)
            ]
        return Report(loaded, settings, inputs, None, timelines)
    with bar("timing") as progress:
        found = latency.bench(candidates, settings, progress)
    return Report(loaded, settings, inputs, found)


def _calibrate(file: Path, given: dict[str, Any]) -> None:
    from squeeze.measure import calibrate
    from squeeze.measure.latency import Settings
    from squeeze.model import check_output

    settings = Settings(threads=given["threads"], clock=given["clock"])

    check_output(file)
    with bar("calibrating") as progress:
        text = calibrate.device_file(settings.threads, progress, clock=settings.clock)
    file.write_text(text, encoding="utf-8")
    click.echo(f"{file}: this machine's constants", err=True)
