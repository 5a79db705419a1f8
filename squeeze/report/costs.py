"""Costs as JSON and as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from squeeze.cost.device import Prediction
from squeeze.cost.layers import Layer, Profile, Totals
from squeeze.report import devices
from squeeze.report.table import (
    SCHEMA,
    Column,
    Table,
    bar,
    dims,
    ratio,
    share,
    si,
    size,
)


def totals_json(totals: Totals) -> dict[str, Any]:
    """The totals of `profile --json`, as every rewrite prints them too."""
    return {**asdict(totals), "uncounted_ops": list(totals.uncounted_ops)}


def profile_json(
    profile: Profile, prediction: Prediction | None = None
) -> dict[str, Any]:
    """`squeeze profile --json`; a prediction adds times in seconds."""
    layers = []
    times = (
        devices.layers_json(prediction) if prediction else [{}] * len(profile.layers)
    )
    for layer, time in zip(profile.layers, times, strict=True):
        row = {**asdict(layer), "bottleneck": layer.bottleneck, **time}
        layers.append(
            {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}
        )
    return {
        "schema": SCHEMA,
        "model": profile.model,
        **totals_json(profile.totals),
        "peak_layer": profile.peak_layer,
        "runtime_peak_bytes": profile.runtime_peak.bytes,
        "runtime_peak_layer": profile.runtime_peak.layer,
        "reused_in_place": list(profile.runtime_peak.in_place),
        "input_shapes": {k: list(v) for k, v in profile.input_shapes.items()},
        "prediction": devices.prediction_json(prediction) if prediction else None,
        "layers": layers,
    }


def totals_table(profile: Profile) -> Table:
    """One line per cost."""
    t = profile.totals
    rows = [
        ("MACs", si(t.macs), f"{t.macs:,}"),
        ("FLOPs", si(t.flops), f"{t.flops:,}"),
        ("parameters", si(t.params), f"{t.params:,}"),
        ("weights", size(t.weight_bytes), f"{t.weight_bytes:,} B"),
        ("file", size(t.file_bytes), f"{t.file_bytes:,} B"),
        (
            "peak activations",
            size(t.peak_activation_bytes),
            f"{t.peak_activation_bytes:,} B, at {profile.peak_layer or 'the inputs'}",
        ),
    ]
    runtime = profile.runtime_peak
    rows.append(
        (
            "with reuse",
            size(runtime.bytes),
            f"{runtime.bytes:,} B, at {runtime.layer or 'the inputs'}, as onnxruntime "
            f"needs it: {len(runtime.in_place)} nodes work in place",
        )
    )
    inputs = ", ".join(f"{k} {dims(v)}" for k, v in profile.input_shapes.items())
    notes = [uncounted_note(t)] if t.uncounted_ops else []
    columns = [Column("", "left"), Column("total"), Column("exactly", "left")]
    return Table(f"{profile.model} at {inputs}", columns, rows, notes)


def uncounted_note(totals: Totals) -> str:
    """Says which ops have no row in the cost table."""
    return f"not counted (no cost known): {', '.join(totals.uncounted_ops)}"


SORTS: dict[str, Callable[[Layer], Any]] = {
    "macs": lambda layer: -layer.macs,
    "flops": lambda layer: -layer.flops,
    "params": lambda layer: -layer.params,
    "elements": lambda layer: -layer.output_elements,
    "name": lambda layer: layer.name,
}


def layers_table(profile: Profile, layers: Iterable[Layer], hidden: int = 0) -> Table:
    """One row per layer, with shares of the MACs and the flow of data (EffNet §3)."""
    columns = [
        Column("layer", "left"),
        Column("op", "left"),
        Column("kind", "left"),
        Column("output"),
        Column("MACs"),
        Column("share"),
        Column("", "left"),
        Column("params"),
        Column("elements"),
        Column("in ÷ out"),
    ]
    layers = list(layers)
    top = max((layer.macs for layer in layers), default=0)
    rows = [
        (
            layer.name,
            layer.op,
            layer.kind,
            dims(layer.output_shape),
            si(layer.macs),
            share(layer.macs, profile.totals.macs),
            bar(layer.macs, top),
            si(layer.params),
            si(layer.output_elements),
            _flow(layer),
        )
        for layer in layers
    ]
    notes = []
    if any(layer.bottleneck for layer in layers):
        notes.append("! data compressed 4 times or more from one layer to the next")
    if hidden:
        notes.append(f"{hidden} more layers: raise --top")
    return Table("", columns, rows, notes)


def _flow(layer: Layer) -> str:
    if layer.compression is None:
        return ""
    return f"{layer.compression:.3g}{' !' if layer.bottleneck else ''}"


def grouped_table(profile: Profile, by: str) -> Table:
    """MACs and parameters by op or by kind (MobileNets, Table 2)."""
    groups: dict[str, list[Layer]] = {}
    for layer in profile.layers:
        groups.setdefault(str(getattr(layer, by)), []).append(layer)
    t = profile.totals
    rows = [
        (
            name,
            str(len(layers)),
            si(macs := sum(layer.macs for layer in layers)),
            share(macs, t.macs),
            bar(macs, t.macs),
            si(params := sum(layer.params for layer in layers)),
            share(params, t.params),
        )
        for name, layers in sorted(
            groups.items(), key=lambda item: -sum(layer.macs for layer in item[1])
        )
    ]
    columns = [Column(by, "left"), Column("layers"), Column("MACs"), Column("share")]
    columns += [Column("", "left"), Column("params"), Column("share of params")]
    return Table("", columns, rows)


CSV_COLUMNS = (
    "name op kind macs flops params weight_bytes output_shape output_elements "
    "compression"
).split()


def csv_rows(layers: Iterable[Layer]) -> list[list[object]]:
    """Rows under CSV_COLUMNS; shapes as 1×64×32×32."""
    return [
        [
            dims(value) if isinstance(value := getattr(layer, name), tuple) else value
            for name in CSV_COLUMNS
        ]
        for layer in layers
    ]


def before_after(before: Totals, after: Totals) -> list[tuple[str, str, str, str]]:
    """(cost, before, after, what remains) for every deterministic cost."""
    shown = (
        ("MACs", "macs", si),
        ("FLOPs", "flops", si),
        ("parameters", "params", si),
        ("file", "file_bytes", size),
        ("peak activations", "peak_activation_bytes", size),
    )
    return [
        (
            title,
            text(getattr(before, key)),
            text(getattr(after, key)),
            ratio(getattr(after, key), getattr(before, key)),
        )
        for title, key, text in shown
    ]
