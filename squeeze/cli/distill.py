"""squeeze distill"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options


def _training(function: Callable[..., None]) -> Callable[..., None]:
    """How to train: every option has a default that works unattended."""
    given = [
        click.option(
            "--epochs", type=click.IntRange(min=1), help="Passes over the data."
        ),
        click.option(
            "--minutes",
            type=click.FloatRange(min=0, min_open=True),
            help="Train for that long instead.",
        ),
        click.option("--batch", type=click.IntRange(min=1), help="Samples per update."),
        click.option(
            "--learning-rate",
            type=click.FloatRange(min=0, min_open=True),
            help="The highest of the schedule.",
        ),
        click.option(
            "--loss",
            type=click.Choice(["auto", "soft", "mse"]),
            default="auto",
            help="Soft targets for class scores, mean squared error for others.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0, min_open=True),
            help="Of the soft targets.",
        ),
        click.option(
            "--feature-weight",
            type=click.FloatRange(min=0),
            help="Weight of the replaced sites' outputs in the loss.",
        ),
        click.option(
            "--label-weight",
            type=click.FloatRange(min=0),
            help="Weight of the labels, where the data has them.",
        ),
        click.option(
            "--l1",
            type=click.FloatRange(min=0),
            help="Weight of the mean activation: lets channels die.",
        ),
        click.option(
            "--batch-norm/--no-batch-norm",
            default=None,
            help="Normalise behind convolutions while training.",
        ),
        click.option("--no-augment", is_flag=True, help="Use images as they are."),
        click.option("--no-mix", is_flag=True, help="Don't blend pairs of images."),
        click.option(
            "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"
        ),
        click.option(
            "--precision",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
        ),
        click.option(
            "--patience",
            type=click.IntRange(min=1),
            help="Stop after that many epochs without gain.",
        ),
    ]
    for option in reversed(given):
        function = option(function)
    return function


@click.command("distill", short_help="Train a smaller network to do what MODEL does.")
@click.argument("student", type=click.Path(path_type=Path))
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    help="The original. Default: `model` of squeeze.toml.",
)
@click.option(
    "--data", metavar="DATA", help="Inputs to learn from; labels are optional."
)
@click.option(
    "--eval-data",
    metavar="DATA",
    help="To judge by. Default: the last fifth of --data, 2000 at most.",
)
@_training
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write. Default: STUDENT.distilled.onnx.",
)
@options.seed
@options.input_shape
@options.as_html
@options.as_markdown
@options.as_json
def command(
    student: Path, teacher: Path | None, data: str | None, **given: Any
) -> None:
    """Train STUDENT to give the outputs of the original, on inputs of DATA.

    Replaced sites learn one by one first, then the whole network. Names, opset, inputs
    and outputs stay. An interrupted run goes on with --resume.
    """
    from squeeze import recover
    from squeeze.report import distilled

    recover.require_torch()
    files = _files(student, teacher, data, given)
    with _progress() as progress:
        done = recover.distill_files(
            files, _settings(given), resume=given["resume"], progress=progress
        )
    paths = {
        "input": str(student),
        "teacher": str(files.teacher),
        "output": str(files.writes),
    }
    summary = distilled.summary_table(done, f"{student} → {files.writes}")
    options.report(
        [summary, *([distilled.epochs_table(done)] if given["html"] else [])],
        lambda: distilled.distilled_json(done, paths),
        given,
        "squeeze distill",
    )
    if given["as_json"]:  # the table holds them already
        for warning in [*([done.stopped] if done.stopped else []), *done.notes]:
            click.echo(f"squeeze: {warning}", err=True)


def _files(
    student: Path, teacher: Path | None, data: str | None, given: dict[str, Any]
) -> Any:
    from squeeze.cli._config import read
    from squeeze.recover import Files

    config = read(Path.cwd())
    if teacher is None and "model" in config:
        teacher = Path(config["model"])
    if teacher is None:
        raise click.UsageError("name the original: --teacher MODEL")
    if data is None:
        raise click.UsageError(
            "distillation needs inputs: --data D (.npz, a folder of images, …)"
        )
    return Files(
        student,
        teacher,
        data,
        output=given["output"],
        evaluation=given["eval_data"],
        input_shapes=options.shapes_of(given["input_shapes"]),
        images=options.images(),
        command=" ".join(
            a
            for a in ["squeeze", *options._without_output(sys.argv[1:])]
            if a != "--resume"
        ),
    )


_NUMBERS = (
    "epochs minutes batch learning_rate temperature feature_weight label_weight l1 "
    "batch_norm device precision patience loss seed"
).split()


def _settings(given: dict[str, Any]) -> Any:
    from squeeze.recover import Options

    chosen = {name: given[name] for name in _NUMBERS if given[name] is not None}
    return Options(**chosen, augment=not given["no_augment"], mix=not given["no_mix"])


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """A bar on a terminal, a line per epoch elsewhere; both on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn

    from squeeze.report import distilled, table

    console = table.console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, left="")
        words: list[str] = []

        def report(progress: Any) -> None:
            if progress.finished is not None:
                words[:] = distilled.score_words(progress.finished.score)
                if not console.is_terminal:
                    left = _minutes(progress.seconds_left)
                    line = f"{distilled.epoch_line(progress.finished)}, {left} left"
                    click.echo(line, err=True)
            text = ", ".join([f"{progress.phase}: loss {progress.loss:.4f}", *words])
            left = f"{_minutes(progress.seconds_left)} left"
            bar.update(task, completed=progress.done, description=text, left=left)

        yield report


def _minutes(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
