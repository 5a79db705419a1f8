"""How to train: the options of `squeeze distill`, and `--distill` elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from squeeze.cli import _options as options

F = TypeVar("F", bound=Callable[..., Any])


def settings(function: F) -> F:
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
        click.option(
            "--mix", is_flag=True, help="Blend pairs of images: for long schedules."
        ),
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


def distilling(function: F) -> F:
    """--distill and --train: train what a rewrite wrote, in the same command."""
    function = click.option(
        "--train",
        "training",
        multiple=True,
        metavar="OPTION=VALUE",
        help="An option of `squeeze distill`, such as epochs=30. Repeatable.",
    )(function)
    return click.option(
        "--distill",
        is_flag=True,
        help="Then train the result to do what MODEL does, on --data.",
    )(function)


def parsed(pairs: Sequence[str], seed: int) -> Any:
    """`recover.Options` from `--train OPTION=VALUE`, as `squeeze distill` takes them.

    Raises click.UsageError as that command would.
    """

    @click.command("--train", add_help_option=False)
    @settings
    def command(**given: Any) -> None: ...

    try:
        context = command.make_context("--train", _arguments(pairs))
    except click.UsageError as error:
        raise click.UsageError(f"--train: {error.format_message()}") from error
    return read({**context.params, "seed": seed})


def _arguments(pairs: Sequence[str]) -> list[str]:
    """OPTION=VALUE pairs as words of a command line; a flag has no value."""
    words = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        words += [f"--{name.strip()}", *([value.strip()] if equals else [])]
    return words


def trainer(model: Path, output: Path, given: Mapping[str, Any]) -> Any:
    """What `rewrite.run.Options.train` takes; None without --distill.

    Refuses before anything else is done what could not be trained afterwards.
    """
    wanted = given.get("distill") or given.get("distill_between")
    if given.get("training") and not wanted:
        raise click.UsageError("--train goes with --distill; add it")
    if not wanted:
        return None
    if given["data"] is None:
        raise click.UsageError("--distill learns from inputs: pass --data")
    if given["dry_run"]:
        raise click.UsageError("--dry-run writes nothing that --distill could train")
    from squeeze import recover

    recover.require_torch()
    chosen = parsed(given["training"], given["seed"])
    if not given.get("distill"):
        return None
    files = recover.Files(
        output,
        model,
        given["data"],
        output=output,
        evaluation=given["eval_data"],
        input_shapes=options.shapes_of(given["input_shapes"]),
        images=options.images(),
        command=options.command_line(),
    )
    if files.checkpoint.is_file():
        raise click.UsageError(
            f"{files.checkpoint}: left by an interrupted run; go on with "
            f"`{_resuming(files, given)}`, or delete it to start anew"
        )

    def train() -> Any:
        with progress() as shown:
            return recover.distill_files(files, chosen, progress=shown)

    return train


def between(model: Path, given: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What `prune` calls between its rounds: the pruned model in, trained out."""
    from squeeze import model as models
    from squeeze import shapes as shaping
    from squeeze.calibrate.data import open_data
    from squeeze.recover import distill

    chosen = parsed(given["training"], given["seed"])
    teacher = models.load(model)
    known = shaping.infer(teacher, options.shapes_of(given["input_shapes"]))
    data, judged = (
        open_data(spec, teacher, known, options.images()) if spec else None
        for spec in (given["data"], given["eval_data"])
    )
    assert data is not None

    def train(student: Any) -> Any:
        with progress() as shown:
            done = distill(
                student, teacher, data, chosen, evaluation=judged, progress=shown
            )
        for warning in done.warnings:
            click.echo(f"squeeze: between rounds: {warning}", err=True)
        return done.model

    return train


def _resuming(files: Any, given: Mapping[str, Any]) -> str:
    """The command that goes on where this one was interrupted."""
    words = [str(files.student), "--teacher", str(files.teacher)]
    words += ["--data", given["data"], "-o", str(files.writes)]
    words += ["--eval-data", given["eval_data"]] if given["eval_data"] else []
    words += ["--seed", str(given["seed"])] if given["seed"] else []
    for name, shape in given["input_shapes"]:
        words += ["--input-shape", f"{name}:{','.join(map(str, shape))}"]
    words += _arguments(given["training"])
    return shlex.join(["squeeze", "distill", *words, "--resume"])


_OPTIONS = (
    "epochs minutes batch learning_rate temperature feature_weight label_weight l1 "
    "batch_norm device precision patience loss seed"
).split()


def read(given: Mapping[str, Any]) -> Any:
    """`recover.Options` from the options of `settings`."""
    from squeeze.recover import Options

    chosen = {name: given[name] for name in _OPTIONS if given[name] is not None}
    return Options(**chosen, augment=not given["no_augment"], mix=given["mix"])


@contextmanager
def progress() -> Iterator[Callable[[Any], None]]:
    """A bar on stderr with loss, held-out figures and time left; quiet in a pipe."""
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
            text = ", ".join([f"{progress.phase}: loss {progress.loss:.4f}", *words])
            left = f"{_minutes(progress.seconds_left)} left"
            bar.update(task, completed=progress.done, description=text, left=left)

        yield report


def _minutes(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
