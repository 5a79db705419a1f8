"""Defaults from squeeze.toml, or [tool.squeeze] of pyproject.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from squeeze.budget.files import CONFIGS, read_toml
from squeeze.errors import RuleError, nearest


def read(folder: Path) -> dict[str, Any]:
    """The configuration of a folder; empty where there is none."""
    for name, keys in CONFIGS:
        file = folder / name
        if file.is_file():
            try:
                table: Any = read_toml(file)
            except RuleError:
                if not keys:
                    raise
                continue
            for key in keys:
                table = table.get(key, {}) if isinstance(table, dict) else {}
            if table and isinstance(table, dict):
                return dict(table)
    return {}


def defaults(folder: Path, command: click.Command) -> dict[str, Any]:
    """What the configuration says for a command, by click's parameter names.

    `model` and `data.path` go to the commands that have them; the command's own table
    holds options as they are typed, without the dashes.
    """
    table = read(folder)
    spelled = {
        option.lstrip("-"): parameter.name or ""
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    found: dict[str, Any] = {}
    data = table.get("data")
    for name, value in (
        ("model", table.get("model")),
        ("data", data.get("path") if isinstance(data, dict) else None),
    ):
        if value is not None and name in spelled:
            found[spelled[name]] = value
    own = table.get(command.name or "", {})
    if isinstance(own, list):  # [[check]] is the gate's own
        return found
    if not isinstance(own, dict):
        raise RuleError(f"squeeze.toml: {command.name} must be a table")
    for key, value in own.items():
        if key not in spelled:
            where = f"squeeze.toml: [{command.name}] {key}"
            raise RuleError(f"{where}: unknown key{nearest(key, spelled)}")
        flipped = key.startswith("no-") and isinstance(value, bool)
        positive = key.removeprefix("no-") in spelled
        found[spelled[key]] = not value if flipped and positive else value
    return found
