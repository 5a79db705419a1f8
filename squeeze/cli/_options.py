"""Options that several commands share, each said once."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class ShapeType(click.ParamType):  # type: ignore[type-arg]
    """NAME:1,3,224,224, split at the last colon; the name may be left out."""

    name = "name:1,3,224,224"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        name, _, dims = str(value).rpartition(":")
        try:
            shape = tuple(int(d) for d in dims.split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1 or max(shape) >= 2**31:
            self.fail(f"{value!r} is not a shape; write input:1,3,224,224", param, ctx)
        return name, shape


def model_argument(function: F) -> F:
    """MODEL, or `model` of squeeze.toml."""
    return click.argument("model", type=click.Path(path_type=Path))(function)


def input_shape(function: F) -> F:
    return click.option(
        "--input-shape",
        "input_shapes",
        type=ShapeType(),
        multiple=True,
        help="Shape of a dynamic input, for the analysis only. Repeatable.",
    )(function)


def as_json(function: F) -> F:
    return click.option(
        "--json", "as_json", is_flag=True, help="One JSON document on stdout."
    )(function)


def as_markdown(function: F) -> F:
    return click.option(
        "--markdown", "as_markdown", is_flag=True, help="Tables in Markdown."
    )(function)


def writable(
    context: click.Context, parameter: click.Parameter, value: Path | None
) -> Path | None:
    """Before hours of work, not after: there must be a place for the file."""
    if value is not None:
        from squeeze.model import check_output

        check_output(value)
    return value


def as_html(function: F) -> F:
    return click.option(
        "--html",
        "html",
        type=click.Path(path_type=Path),
        callback=writable,
        metavar="FILE",
        help="Also write the report as one HTML page.",
    )(function)


def seed(function: F) -> F:
    return click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed of everything random.",
    )(function)


def rewriting(function: F) -> F:
    """What every command that writes a model takes."""
    options = [
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path),
            help="Where to write. Default: beside the input.",
        ),
        click.option("--dry-run", is_flag=True, help="Plan and report, write nothing."),
        click.option("--no-bench", is_flag=True, help="Leave latency out."),
        click.option("--no-simplify", is_flag=True, help="Don't run onnxsim first."),
        seed,
        input_shape,
        as_html,
        as_markdown,
        as_json,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def selecting(function: F) -> F:
    """--only and --skip over layer names."""
    for name, verb in (("--skip", "Leave"), ("--only", "Touch only")):
        function = click.option(
            name,
            multiple=True,
            metavar="PATTERN",
            help=f"{verb} layers of this name: a glob, or re:REGEX. Repeatable.",
        )(function)
    return function


def shapes_of(
    pairs: Sequence[tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[int, ...]]:
    return dict(pairs)


def print_json(document: Mapping[str, Any]) -> None:
    """One document on stdout; figures that JSON lacks (NaN, Infinity) become null."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (
        value != value or value in (float("inf"), -float("inf"))
    ):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def report(
    tables: Sequence[Any],
    document: Callable[[], Mapping[str, Any]],
    given: Mapping[str, Any],
    title: str,
) -> None:
    """One report in the form asked for: tables, Markdown or JSON; HTML to a file."""
    if given.get("html"):
        from squeeze.report import html

        html.write(given["html"], title, tables, _finite(document()))
    if given["as_json"]:
        print_json(document())
    else:
        print_tables(tables, given["as_markdown"])


def images() -> Any:
    """How images become inputs: `[data]` of squeeze.toml in the working directory."""
    from squeeze.calibrate.data import Images
    from squeeze.cli import _config

    table = _config.read(Path.cwd()).get("data", {})
    size = table.get("size")
    return Images(
        size=(size, size) if isinstance(size, int) else tuple(size) if size else None,
        mean=tuple(table.get("mean", ())),
        std=tuple(table.get("std", ())),
        layout=table.get("layout", "nchw"),
    )


def print_tables(tables: Sequence[Any], as_markdown: bool) -> None:
    """Tables on the terminal, or in Markdown."""
    from squeeze.report import table

    if as_markdown:
        click.echo("\n".join(table.markdown(t) for t in tables), nl=False)
        return
    console = table.console()
    for one in tables:
        table.show(one, console)


# -- what every rewriting command does around its one call --------------------------


def run_options(model: Path, suffix: str, given: Mapping[str, Any]) -> Any:
    """`rewrite.run.Options` from the options of `rewriting`."""
    from squeeze.cli import _progress, _training
    from squeeze.rewrite.run import Options, default_output

    output = given["output"] or default_output(model, suffix)
    return Options(
        output=output,
        dry_run=given["dry_run"],
        bench=not given["no_bench"],
        simplify=not given["no_simplify"],
        seed=given["seed"],
        input_shapes=shapes_of(given["input_shapes"]),
        command=command_line(),
        train=_training.trainer(model, output, given),
        bar=_progress.bar,
    )


def command_line() -> str:
    """This command without where it wrote: the same options give the same bytes."""
    kept: list[str] = []
    skip = False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith(("-o", "--output", "--resume")):
            kept.append(argument)
        skip = not skip and argument in ("-o", "--output")
    return " ".join(["squeeze", *kept])


def assignments(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a dictionary."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--set")
        found[name.strip()] = value.strip()
    return found


def print_result(result: Any, given: Mapping[str, Any]) -> None:
    """A rewrite's report: tables, Markdown or JSON; warnings on stderr."""
    from squeeze.report import distilled, rewrites

    trained = result.trained if given.get("html") else None
    report(
        [
            *rewrites.tables(result),
            *([distilled.epochs_table(trained)] if trained else []),
        ],
        lambda: rewrites.result_json(result),
        given,
        f"{Path(result.input).name}, rewritten",
    )
    for warning in rewrites.warnings(result):
        if given["as_json"] or warning not in result.notes:
            click.echo(f"squeeze: {warning}", err=True)


def fitting(function: F) -> F:
    """--data and what goes with it, for what fits weights."""
    options = [
        click.option(
            "--data",
            metavar="DATA",
            help="Samples to fit to: .npz, a folder, or python:module:function.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="How many of them to fit to, drawn by seed.",
        ),
        click.option(
            "--eval-data",
            metavar="DATA",
            help="Samples to measure the result on. Default: the last fifth of --data.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@contextlib.contextmanager
def fit_data(given: Mapping[str, Any]) -> Iterator[Any]:
    """`FitData` from the options of `fitting`, with progress on a terminal."""
    from squeeze.cli import _progress
    from squeeze.rewrite.fit.source import FitData

    with contextlib.ExitStack() as stack:
        shown: dict[str, Callable[[float], None]] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                stack.close()
                shown[what] = stack.enter_context(_progress.bar(what))
            shown[what](done / max(total, 1))
            if done >= total:
                stack.close()
                shown.clear()

        yield FitData(
            data=given["data"],
            samples=given["samples"],
            evaluation=given["eval_data"],
            images=images(),
            seed=given["seed"],
            progress=progress,
        )
