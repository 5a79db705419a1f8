"""squeeze check"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from squeeze.budget.metrics import METRICS
from squeeze.cli import _options as options
from squeeze.cli._progress import bar
from squeeze.errors import SqueezeError, UsageError

if TYPE_CHECKING:
    from squeeze.budget.config import Budget
    from squeeze.budget.verdict import Report

DEFAULT_FILE = Path("squeeze.toml")
FLAGS = {  # option → (metric, bound)
    (
        f"{bound.split('_')[0]}-{metric.name}"
        + "".join(f"-{part}" for part in bound.split("_")[1:])
    ).replace("_", "-"): (metric.name, bound)
    for metric in METRICS.values()
    for bound in metric.limits
}
SHARED = ("baseline", "reference", "data", "device", "ignore_op", "input_shapes")


def limits(function: Callable[..., Any]) -> Callable[..., Any]:
    """--max-macs 600M and friends: one option per metric and bound."""
    for flag, (name, bound) in reversed(FLAGS.items()):
        metric = METRICS[name]
        words = {
            "max": f"Most {metric.title} allowed.",
            "min": f"Least {metric.title} allowed.",
            "max_increase": f"Most {metric.title} may grow.",
            "max_drop": f"Most {metric.title} may fall.",
        }
        function = click.option(f"--{flag}", metavar="LIMIT", help=words[bound])(
            function
        )
    return function


@click.command("check", short_help="Hold models to their budget: the CI gate.")
@click.argument("models", nargs=-1, type=click.Path())
@click.option(
    "--budget", type=click.Path(path_type=Path), help="Default: squeeze.toml."
)
@limits
@click.option("--baseline", help="A baseline file (.json), or a model.")
@click.option("--reference", help="Model for latency, agreement and accuracy.")
@click.option("--data", help="Samples for accuracy and agreement.")
@click.option("--device", help="Machine for the predicted latency.")
@click.option(
    "--ignore-op", multiple=True, help="An op that costs nothing. Repeatable."
)
@options.input_shape
@click.option("--update-baseline", is_flag=True, help="Write what the models cost now.")
@click.option(
    "--init", "propose", is_flag=True, help="Write limits of today, plus 5 %."
)
@click.option("--why", is_flag=True, help="Show the layers that changed.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML there.")
@click.option(
    "--gitlab", type=click.Path(path_type=Path), help="Write code quality there."
)
@click.option("--markdown-file", type=click.Path(path_type=Path), help="And Markdown.")
@options.as_html
@options.as_markdown
@options.as_json
@click.pass_context
def command(
    context: click.Context,
    /,
    models: tuple[str, ...],
    budget: Path | None,
    update_baseline: bool,
    propose: bool,
    why: bool,
    junit: Path | None,
    gitlab: Path | None,
    markdown_file: Path | None,
    html: Path | None,
    as_markdown: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Hold MODELS to the limits of squeeze.toml, or to those given as options.

    Limits take units: 600M, 20MB, 8MiB, 20ms, 90%, 0.5pp. Exit status: 0 within
    budget, 1 over, 2 wrong configuration or missing file, 3 not measurable.
    """
    if propose:
        return _propose(models, budget or DEFAULT_FILE)
    for file in (junit, gitlab, markdown_file):
        if file is not None:
            _check_output(file)
    chosen, given = _budget(context, models, budget, flags)
    if update_baseline:
        return _update(chosen, given, why, as_json)
    from squeeze.budget import gate

    with bar("checking"):
        report = gate.run(chosen, given)
    _write_files(report, chosen, junit, gitlab, markdown_file)
    if html is not None:
        _write_page(report, why, html)
    _annotate(report, chosen)
    _print(report, why, as_markdown, as_json)
    return report.status


def _check_output(file: Path) -> None:
    from squeeze.model import check_output

    check_output(file)


# -- the budget ---------------------------------------------------------------------


def _budget(
    context: click.Context,
    models: Sequence[str],
    file: Path | None,
    flags: dict[str, Any],
) -> tuple[Budget, Sequence[str]]:
    """The budget, and which of its models to check (all of them if empty)."""
    from squeeze.budget import config

    table = _flag_limits(flags)
    if table and file is not None:
        raise UsageError("limits as options and --budget: choose one of them")
    if table:
        models = models or _default_models()
        shared = {key: flags[key] for key in SHARED}
        return config.Budget((_flag_check(table, models, shared),)), ()
    given = [
        key
        for key in SHARED
        if context.get_parameter_source(key) is click.core.ParameterSource.COMMANDLINE
    ]
    found = file or config.find(Path())
    if found is None:
        raise UsageError(
            "nothing to hold models to: no [[check]] in squeeze.toml or "
            "pyproject.toml; write one with: squeeze check --init, or pass a limit: "
            "--max-macs 600M"
        )
    if given:
        name = "--input-shape" if given[0] == "input_shapes" else f"--{given[0]}"
        name = name.replace("_", "-")
        raise UsageError(
            f"{name} goes with limits given as options; for those of {found}, write "
            "it there"
        )
    return config.load(found), models


def _flag_limits(flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for flag, (metric, bound) in FLAGS.items():
        value = flags[flag.replace("-", "_")]
        if value is not None:
            table.setdefault(metric, {})[bound] = value
    return table


def _default_models() -> Sequence[str]:
    from squeeze.cli import _config

    model = _config.read(Path.cwd()).get("model")
    if not model:
        raise UsageError(
            "which models? name them: squeeze check MODEL… --max-macs 600M"
        )
    return model if isinstance(model, list) else [model]


def _flag_check(
    table: dict[str, dict[str, Any]], models: Sequence[str], shared: dict[str, Any]
) -> Any:
    """The one check that options describe."""
    from squeeze.budget import config
    from squeeze.cli import _config

    for metric, limit in table.items():
        for key in METRICS[metric].options:
            if shared.get(key):
                limit[key] = shared[key]
    check: dict[str, Any] = {"name": "budget", "model": list(models), **table}
    if shared["baseline"]:
        check["baseline"] = shared["baseline"]
    if shared["ignore_op"]:
        check["ignore_ops"] = list(shared["ignore_op"])
    if shared["input_shapes"]:
        shapes = options.shapes_of(shared["input_shapes"])
        check["input_shape"] = {name: list(dims) for name, dims in shapes.items()}
    data = _config.read(Path.cwd()).get("data")
    return config.one(check, "options", data=data if isinstance(data, dict) else None)


# -- --init and --update-baseline ---------------------------------------------------


def _propose(models: Sequence[str], file: Path) -> int:
    from squeeze.budget import baseline, files, init

    old = ""
    if file.exists():
        if "check" in files.read_toml(file):
            raise UsageError(
                f"{file}: has checks already; edit them, or pass --budget NEW"
            )
        old = files.read_text(file, files.TOML_LIMIT).rstrip() + "\n\n"
    names = init.models_in(Path(), models)
    text = init.proposal(names, Path())
    baseline.write_text(file, old + text)
    click.echo(
        f"{file}: limits for {len(names)} model{'s' * (len(names) != 1)}", err=True
    )
    return 0


def _update(budget: Budget, models: Sequence[str], why: bool, as_json: bool) -> int:
    from squeeze.budget import baseline, gate
    from squeeze.budget.verdict import Report
    from squeeze.report import checks

    updates = gate.updates(budget, models)
    for update in updates:
        baseline.write(update.path, update.content)
    report = Report((), tuple(c for u in updates for c in u.changes))
    if as_json:
        changes = checks.report_json(report)["changes"]
        paths = [str(u.path) for u in updates]
        options.print_json({"schema": 1, "baselines": paths, "changes": changes})
        return 0
    _print_changes(report, why, as_markdown=False)
    for update in updates:
        count = len(update.content)
        click.echo(f"{update.path}: {count} model{'s' * (count != 1)}", err=True)
    return 0


# -- output -------------------------------------------------------------------------


def _write_files(
    report: Report,
    budget: Budget,
    junit: Path | None,
    gitlab: Path | None,
    markdown: Path | None,
) -> None:
    from squeeze.budget.baseline import write_text
    from squeeze.report import checks

    if junit is not None:
        from squeeze.report import junit as junit_report

        write_text(junit, junit_report.document(report))
    if gitlab is not None:
        from squeeze.report import gitlab as gitlab_report

        write_text(gitlab, gitlab_report.document(report, budget.file))
    if markdown is not None:
        write_text(markdown, checks.report_markdown(report))


def _write_page(report: Report, why: bool, file: Path) -> None:
    from squeeze.report import checks
    from squeeze.report import html as page

    tables = [checks.results_table(report), *_changes(report, why)]
    page.write(file, "squeeze check", tables, checks.report_json(report))


def _annotate(report: Report, budget: Budget) -> None:
    """Where GitHub Actions runs it: its annotations and its step summary."""
    from squeeze.report import checks, github

    if not github.running_there():
        return
    for line in github.commands(report, budget.file):
        click.echo(line, err=True)
    problem = github.write_summary(checks.report_markdown(report))
    if problem:
        click.echo(f"squeeze: {problem}", err=True)


def _print(report: Report, why: bool, as_markdown: bool, as_json: bool) -> None:
    """A reader that went away must not turn a failure into a pass."""
    from squeeze.report import checks

    try:
        if as_json:
            options.print_json(checks.report_json(report))
        elif as_markdown:
            click.echo(checks.report_markdown(report, why), nl=False)
        else:
            options.print_tables([checks.results_table(report)], False)
            _print_changes(report, why, as_markdown=False)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise SqueezeError(
            f"the report could not be printed: {error.strerror}"
        ) from error


def _print_changes(report: Report, why: bool, as_markdown: bool) -> None:
    options.print_tables(_changes(report, why), as_markdown)


def _changes(report: Report, why: bool) -> list[Any]:
    """Tables of what changed against the baseline, with the layers if asked."""
    from squeeze.report import checks

    table = checks.changes_table(report)
    tables = [table] if table else []
    return tables + (checks.why_tables(report, every=True) if why else [])
