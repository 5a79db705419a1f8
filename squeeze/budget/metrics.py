"""What can be limited: one row per metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["profile", "outputs", "latency", "device"]


@dataclass(frozen=True)
class Metric:
    """How a metric is limited.

    `limits` maps each limit's key to the families of units it accepts; `options` are
    the other keys. `cost` is the field of `cost.Totals` (and of `cost.Layer` where
    `per_layer`). `level` is the default.
    """

    name: str
    title: str
    family: str
    limits: dict[str, tuple[str, ...]]
    source: Source
    level: str = "error"
    cost: str = ""
    per_layer: bool = False
    options: tuple[str, ...] = field(default=())


def _cost(
    name: str, title: str, family: str, cost: str, per_layer: bool = False
) -> Metric:
    limits = {"max": (family,), "max_increase": ("percent", family)}
    return Metric(
        name, title, family, limits, "profile", cost=cost, per_layer=per_layer
    )


_ALL = [
    _cost("macs", "MACs", "count", "macs", per_layer=True),
    _cost("flops", "FLOPs", "count", "flops", per_layer=True),
    _cost("params", "parameters", "count", "params", per_layer=True),
    _cost("weight_size", "weights", "bytes", "weight_bytes", per_layer=True),
    _cost("file_size", "file size", "bytes", "file_bytes"),
    _cost("peak_memory", "peak memory", "bytes", "peak_activation_bytes"),
    Metric(
        "predicted_latency",
        "predicted latency",
        "time",
        {"max": ("time",), "max_increase": ("percent", "time")},
        "device",
        options=("device",),
    ),
    Metric(
        "latency",
        "latency",
        "percent",
        {"max_increase": ("percent",)},
        "latency",
        level="warn",
        options=("reference", "seconds"),
    ),
    Metric(
        "accuracy",
        "accuracy",
        "share",
        {"min": ("share",), "max_drop": ("points",)},
        "outputs",
        options=("data", "reference"),
    ),
    Metric(
        "agreement",
        "agreement",
        "share",
        {"min": ("share",)},
        "outputs",
        options=("data", "reference"),
    ),
]

METRICS: dict[str, Metric] = {m.name: m for m in _ALL}
LAYER_METRICS = {m.name: m for m in _ALL if m.per_layer}
COSTS = {m.name: m for m in _ALL if m.source == "profile"}
LEVELS = ("error", "warn")
