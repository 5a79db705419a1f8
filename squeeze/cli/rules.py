"""squeeze rules"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.cli import _options as options


@click.command("rules", short_help="List, show and validate blocks and devices.")
@click.argument("name", required=False)
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Validate a block or a device of your own.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="With a block."
)
@options.as_html
@options.as_markdown
@options.as_json
def command(
    name: str | None, checked: Path | None, settings: tuple[str, ...], **given: Any
) -> None:
    """List the blocks and devices, show one, or validate a file.

    NAME is a block, which is shown as built on an example, a device, or a .toml file
    of your own; rules/README.md teaches writing one.
    """
    from squeeze import rules

    if checked is not None:
        click.echo(_check(str(checked.absolute())))
    elif name is None:
        _list(given)
    elif rules.kind(name) == "devices":
        _show_device(name, given)
    else:
        _show_block(name, settings, given)


def _check(file: str) -> str:
    from squeeze import rules
    from squeeze.cost import device
    from squeeze.rewrite import blocks, explain

    if rules.kind(file) == "devices":
        return f"{device.load(file).name}: a device that profile --device can use"
    return explain.check(blocks.load(file))


def _list(given: dict[str, Any]) -> None:
    from squeeze.report import blocks, devices

    listed, machines = blocks.listing(), devices.listing()
    options.report(
        [blocks.listing_table(listed), devices.listing_table(machines)],
        lambda: {**blocks.listing_json(listed), **devices.listing_json(machines)},
        given,
        "squeeze rules",
    )


def _show_block(name: str, settings: tuple[str, ...], given: dict[str, Any]) -> None:
    from squeeze.report import blocks as report
    from squeeze.rewrite import blocks

    rule = blocks.load(name)
    shown = report.shown(rule, rule.settings(options.assignments(settings)))
    options.report(
        report.shown_tables(shown),
        lambda: report.shown_json(shown),
        given,
        f"squeeze rules {name}",
    )


def _show_device(name: str, given: dict[str, Any]) -> None:
    from squeeze.cost import device
    from squeeze.report import devices as report

    found = device.load(name)
    options.report(
        [report.device_table(found)],
        lambda: report.device_json(found),
        given,
        f"squeeze rules {name}",
    )
