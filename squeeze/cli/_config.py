"""Defaults from squeeze.toml, or [tool.squeeze] of pyproject.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from squeeze.budget.files import CONFIGS, read_toml
from squeeze.errors import RuleError


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


def defaults(folder: Path) -> dict[str, Any]:
    """click's default map: a table per command, `model` and `data.path` to all."""
    table = read(folder)
    shared: dict[str, Any] = {}
    if "model" in table:
        shared["model"] = table["model"]
    if isinstance(table.get("data"), dict) and "path" in table["data"]:
        shared["data"] = table["data"]["path"]
    commands = [f.stem for f in Path(__file__).parent.glob("[a-z]*.py")]
    return {
        name: {**shared, **_options(table.get(name, {}), name)} for name in commands
    }


def _options(table: Any, name: str) -> dict[str, Any]:
    if isinstance(table, list):  # [[check]] is the gate's own
        return {}
    if not isinstance(table, dict):
        raise RuleError(f"squeeze.toml: {name} must be a table: [{name}]")
    return {key.replace("-", "_"): value for key, value in table.items()}
