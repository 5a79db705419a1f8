"""squeeze distill"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options
from squeeze.cli import _training as training


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
@training.settings
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
    with training.progress() as progress:
        done = recover.distill_files(
            files, training.read(given), resume=given["resume"], progress=progress
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
        for warning in done.warnings:
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
        command=options.command_line(),
    )
