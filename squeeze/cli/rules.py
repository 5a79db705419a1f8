"""squeeze rules"""

from __future__ import annotations

from pathlib import Path

import click

from squeeze.cli import _options as options


@click.command("rules", short_help="List, show and validate blocks and devices.")
@click.argument("name", required=False)
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Validate a block of your own.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="With NAME."
)
@options.as_markdown
@options.as_json
def command(
    name: str | None,
    checked: Path | None,
    settings: tuple[str, ...],
    as_markdown: bool,
    as_json: bool,
) -> None:
    """List the blocks, show one as built on an example, or validate a file.

    NAME is a block or a .toml file of your own; rules/README.md teaches writing one.
    """
    from squeeze.report import blocks as report
    from squeeze.rewrite import blocks, explain

    if checked is not None:
        click.echo(explain.check(blocks.load(str(checked.absolute()))))
        return
    if name is None:
        listed = report.listing()
        if as_json:
            options.print_json(report.listing_json(listed))
        else:
            options.print_tables([report.listing_table(listed)], as_markdown)
        return
    rule = blocks.load(name)
    shown = report.shown(rule, rule.settings(options.assignments(settings)))
    if as_json:
        options.print_json(report.shown_json(shown))
    else:
        options.print_tables(report.shown_tables(shown), as_markdown)
