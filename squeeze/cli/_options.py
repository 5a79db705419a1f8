"""Options that several commands share, each said once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class ShapeType(click.ParamType):
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


def seed(function: F) -> F:
    return click.option(
        "--seed", default=0, show_default=True, help="Seed of everything random."
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


def shapes_of(pairs: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return dict(pairs)


def print_json(document: Mapping[str, Any]) -> None:
    """One document on stdout; figures that JSON lacks (NaN, Infinity) become null."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def print_tables(tables: Sequence[Any], as_markdown: bool) -> None:
    """Tables on the terminal, or in Markdown."""
    from squeeze.report import table

    if as_markdown:
        click.echo("\n".join(table.markdown(t) for t in tables), nl=False)
        return
    console = table.console()
    for one in tables:
        table.show(one, console)
