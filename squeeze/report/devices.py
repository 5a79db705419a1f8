"""Predicted times as JSON and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from squeeze import rules
from squeeze.cost import device
from squeeze.cost.device import Device, LayerTime, Prediction
from squeeze.report.table import (
    SCHEMA,
    Column,
    Table,
    bar,
    milliseconds,
    share,
    si,
    size,
)


def listing() -> list[Device]:
    """Every device that squeeze ships."""
    return [device.load(name) for name in rules.names("devices")]


def listing_json(listed: Sequence[Device]) -> dict[str, Any]:
    """Every constant of every device."""
    return {"devices": [asdict(one) for one in listed]}


def listing_table(listed: Sequence[Device]) -> Table:
    """One line per device, with the four constants that each has."""
    columns = [Column("device", "left"), Column("what it is", "left")]
    columns += [Column("internal memory"), Column("bandwidth")]
    columns += [Column("matrix"), Column("elementwise")]
    rows = [
        [
            one.name,
            one.description,
            size(one.internal_memory),
            f"{size(one.bandwidth)}/s",
            f"{si(one.matrix)}FLOP/s",
            f"{si(one.elementwise)}op/s",
        ]
        for one in listed
    ]
    return Table("", columns, rows, ["`squeeze rules DEVICE` shows one in full"])


def device_json(found: Device) -> dict[str, Any]:
    """Every constant of one device."""
    return {"schema": SCHEMA, **asdict(found)}


def device_table(found: Device) -> Table:
    """Every constant of one device, those of its tables one by one."""
    columns = [Column("constant", "left"), Column("value", "left")]
    rows = []
    for key, value in asdict(found).items():
        if key in ("name", "description", "source"):
            continue
        if isinstance(value, dict):
            rows += [[f"{key}: {name}", si(one)] for name, one in value.items()]
        elif isinstance(value, (int, float)):
            rows.append([key, si(value)])
        else:
            rows.append([key, value if isinstance(value, str) else ", ".join(value)])
    notes = [f"source: {' '.join(found.source.split())}"] if found.source else []
    return Table(f"{found.name}: {found.description}", columns, rows, notes)


def prediction_json(found: Prediction) -> dict[str, Any]:
    """Totals of a prediction, in seconds; its layers go into the profile's."""
    return {
        "device": asdict(found.device),
        "total_s": found.total_s,
        "compute_s": sum(layer.compute_s for layer in found.layers),
        "movement_s": sum(layer.movement_s for layer in found.layers),
        "moved_bytes": sum(x.moved_bytes for x in (*found.layers, *found.moving)),
        "moving_s": found.moving_s,
        "dominating": [layer.name for layer in found.dominating()],
    }


def layers_json(found: Prediction) -> list[dict[str, Any]]:
    """One object per layer, without the name and op that the profile has."""
    rows = [asdict(layer) for layer in found.layers]
    return [{k: v for k, v in r.items() if k not in ("name", "op")} for r in rows]


def prediction_table(found: Prediction, top: int | None = None) -> Table:
    """Time per layer, what binds it, and where the internal memory is exceeded."""
    columns = [
        Column("layer", "left"),
        Column("op", "left"),
        Column("compute"),
        Column("moved"),
        Column("movement"),
        Column("time"),
        Column("share"),
        Column("", "left"),
        Column("binds", "left"),
        Column("held"),
    ]
    layers: Iterable[LayerTime] = found.layers
    if top is not None:
        layers = sorted(layers, key=lambda layer: -layer.time_s)[:top]
    longest = max((layer.time_s for layer in found.layers), default=0.0)
    rows = [
        [
            layer.name,
            layer.op,
            milliseconds(layer.compute_s * 1e3),
            size(layer.moved_bytes),
            milliseconds(layer.movement_s * 1e3),
            milliseconds(layer.time_s * 1e3),
            share(layer.time_s, found.total_s),
            bar(layer.time_s, longest),
            layer.binds,
            size(layer.held_bytes) + (" !" if layer.exceeded else ""),
        ]
        for layer in layers
    ]
    if found.moving and top is None:
        rows.append(_moving_row(found))
    return Table(_title(found), columns, rows, _notes(found))


def _moving_row(found: Prediction) -> list[str]:
    """One line for the nodes that compute nothing but move data."""
    outside = sum(layer.moved_bytes for layer in found.moving)
    spent = milliseconds(found.moving_s * 1e3)
    ops = ", ".join(sorted({layer.op for layer in found.moving}))
    row = [f"{len(found.moving)} nodes that only move data", ops, "", size(outside)]
    row += [spent, spent, share(found.moving_s, found.total_s)]
    return [*row, "", "movement", ""]


def _title(found: Prediction) -> str:
    device = found.device
    time = milliseconds(found.total_s * 1e3)
    return f"{time} predicted on {device.name}: {device.description or 'your device'}"


def _notes(found: Prediction) -> list[str]:
    dominating = found.dominating()
    part = sum(layer.time_s for layer in dominating)
    notes = [
        f"{len(dominating)} of {len(found.layers) + len(found.moving)} layers take "
        f"{share(part, found.total_s)} of the time: "
        + ", ".join(layer.name for layer in dominating[:5])
        + (" …" if len(dominating) > 5 else "")
    ]
    if any(layer.exceeded for layer in found.layers):
        limit = size(found.device.internal_memory)
        notes.append(f"! more than the internal memory of {limit}")
    return notes
