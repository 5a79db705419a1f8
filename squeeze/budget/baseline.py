"""Baselines: what models cost when someone last agreed to it.

A baseline file is JSON made to be reviewed: sorted, one line per layer, so that a
pull request that changes it shows which layers changed and by how much.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squeeze import __version__
from squeeze.budget import files
from squeeze.budget.metrics import COSTS, LAYER_METRICS, METRICS
from squeeze.budget.subject import Costs, LayerCosts
from squeeze.errors import RuleError, SqueezeError, UsageError

SCHEMA = 1
EXTRAS = ("accuracy", "agreement", "predicted_latency")


@dataclass(frozen=True)
class Entry:
    """One model in a baseline: its costs, and what was measured on its outputs."""

    costs: Costs
    sha256: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        return self.costs.totals.get(metric, self.measured.get(metric))


Baseline = Mapping[str, Entry]


def read(path: Path) -> dict[str, Entry]:
    """A baseline file. RuleError where it isn't one; UsageError where there is none."""
    if not path.exists() and not path.is_symlink():
        raise UsageError(
            f"{path}: no such baseline; write it with: squeeze check --update-baseline"
        )
    document = files.read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict):
        raise RuleError(f"{path}: not a baseline of squeeze check (it has no models)")
    if document.get("schema") != SCHEMA:
        raise RuleError(
            f"{path}: schema {str(document.get('schema'))[:20]}, this squeeze reads "
            f"{SCHEMA}; write it again with: squeeze check --update-baseline"
        )
    return {
        name: _entry(table, f"{path}: model {name!r}")
        for name, table in document["models"].items()
    }


def _entry(table: Any, where: str) -> Entry:
    if not isinstance(table, dict):
        raise RuleError(f"{where}: must be a table")
    totals = {n: _whole(table[n], f"{where}: {n}") for n in COSTS if n in table}
    layers = table.get("layers", {})
    shapes = table.get("input_shapes", {})
    if not isinstance(layers, dict) or not isinstance(shapes, dict):
        raise RuleError(f"{where}: layers and input_shapes must be tables")
    costs = Costs(
        totals,
        {name: _layer(row, f"{where}: layer {name!r}") for name, row in layers.items()},
        input_shapes={
            name: tuple(_whole(d, f"{where}: input_shapes") for d in dims)
            for name, dims in shapes.items()
            if isinstance(dims, list)
        },
        peak_layer=str(table.get("peak_layer", "")),
    )
    measured = {n: _number(table[n], f"{where}: {n}") for n in EXTRAS if n in table}
    return Entry(costs, str(table.get("sha256", "")), measured)


def _layer(row: Any, where: str) -> LayerCosts:
    if not isinstance(row, dict):
        raise RuleError(f"{where}: must be a table")
    costs = {n: _whole(row.get(n, 0), f"{where}: {n}") for n in LAYER_METRICS}
    return LayerCosts(str(row.get("op", "")), costs)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**30:
        raise RuleError(
            f"{where}: {str(value)[:40]} is not a whole number of at least 0"
        )
    return value


def _number(value: Any, where: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < 1e30
    ):
        raise RuleError(f"{where}: {str(value)[:40]} is not a number of at least 0")
    return float(value)


# -- writing ------------------------------------------------------------------------


def text(baseline: Baseline) -> str:
    """The file's text: models and layers sorted by name, one line each layer."""
    blocks = [_block(name, baseline[name]) for name in sorted(baseline)]
    models = "{\n" + ",\n".join(blocks) + "\n  }" if blocks else "{}"
    tool = json.dumps(f"squeeze {__version__}")
    head = f'"schema": {SCHEMA},\n  "tool": {tool},\n  "models": {models}'
    return f"{{\n  {head}\n}}\n"


def _block(name: str, entry: Entry) -> str:
    lines = [f'"sha256": {json.dumps(entry.sha256)}']
    shapes = {k: list(v) for k, v in sorted(entry.costs.input_shapes.items())}
    lines.append(f'"input_shapes": {json.dumps(shapes, ensure_ascii=False)}')
    lines += [
        f'"{metric}": {json.dumps(value)}'
        for metric in METRICS
        if (value := entry.value(metric)) is not None
    ]
    lines.append(
        f'"peak_layer": {json.dumps(entry.costs.peak_layer, ensure_ascii=False)}'
    )
    rows = [
        f"        {json.dumps(layer, ensure_ascii=False)}: "
        + json.dumps({"op": costs.op, **costs.costs}, ensure_ascii=False)
        for layer, costs in sorted(entry.costs.layers.items())
    ]
    lines.append(
        '"layers": {\n' + ",\n".join(rows) + "\n      }" if rows else '"layers": {}'
    )
    body = ",\n".join(f"      {line}" for line in lines)
    return f"    {json.dumps(name, ensure_ascii=False)}: {{\n{body}\n    }}"


def write(path: Path, baseline: Baseline) -> None:
    """Write the file whole or not at all."""
    write_text(path, text(baseline))


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically; UsageError where it can't be written."""
    path = path.resolve() if path.is_symlink() else path
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file to write")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; make it first")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    except OSError as error:
        raise UsageError(f"{path}: not writable: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(temporary).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise SqueezeError(f"{path}: could not be written: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


# -- what changed -------------------------------------------------------------------


@dataclass(frozen=True)
class LayerChange:
    """A layer before and after; None where it is new or gone."""

    name: str
    before: LayerCosts | None
    after: LayerCosts | None

    @property
    def kind(self) -> str:
        if self.before is None:
            return "new"
        return "removed" if self.after is None else "changed"

    def delta(self, metric: str) -> int:
        return _cost(self.after, metric) - _cost(self.before, metric)


@dataclass(frozen=True)
class ModelChange:
    """A model against its baseline. `kind` is new, removed, changed or unchanged."""

    model: str
    kind: str
    before: Costs | None
    after: Costs | None
    layers: tuple[LayerChange, ...] = ()


def _cost(layer: LayerCosts | None, metric: str) -> int:
    return layer.costs.get(metric, 0) if layer is not None else 0


def compare(model: str, before: Costs | None, after: Costs | None) -> ModelChange:
    """What changed, the layers with the largest change first.

    A layer that only has another name (exporters number them anew) is no change.
    """
    if before is None or after is None:
        return ModelChange(model, "new" if before is None else "removed", before, after)
    layers = _layer_changes(before, after)
    same = not layers and before.totals == after.totals
    return ModelChange(model, "unchanged" if same else "changed", before, after, layers)


def _layer_changes(before: Costs, after: Costs) -> tuple[LayerChange, ...]:
    changed = [
        LayerChange(name, before.layers.get(name), after.layers.get(name))
        for name in {**after.layers, **before.layers}
        if before.layers.get(name) != after.layers.get(name)
    ]
    changed = _without_renamed(changed)
    return tuple(sorted(changed, key=_weight))


def _weight(change: LayerChange) -> tuple[Any, ...]:
    return (*(-abs(change.delta(m)) for m in ("macs", "params", "flops")), change.name)


def _without_renamed(changes: list[LayerChange]) -> list[LayerChange]:
    """Drop pairs of a removed and a new layer of the same op and costs."""
    gone: dict[tuple[Any, ...], list[LayerChange]] = {}
    for change in changes:
        if change.before is not None and change.after is None:
            gone.setdefault(_signature(change.before), []).append(change)
    paired: set[str] = set()
    for change in changes:
        if change.before is None and change.after is not None:
            twins = gone.get(_signature(change.after), [])
            if twins:
                paired |= {change.name, twins.pop().name}
    return [c for c in changes if c.name not in paired]


def _signature(layer: LayerCosts) -> tuple[Any, ...]:
    return (layer.op, *sorted(layer.costs.items()))
