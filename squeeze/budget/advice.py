"""What to do about a limit that is exceeded: the layers that weigh most, a command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from squeeze.budget.metrics import METRICS
from squeeze.budget.subject import Costs
from squeeze.budget.verdict import Share

SHOWN = 3
# whose layers explain a metric: what they weigh of this one
WEIGHED_BY = {
    "file_size": "weight_size",
    "latency": "macs",
    "predicted_latency": "macs",
    **{name: name for name, metric in METRICS.items() if metric.per_layer},
}
DENSE = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Case:
    """A limit exceeded: `keep` is the share of the value that is within it."""

    model: str
    costs: Costs
    keep: Fraction
    data: str
    reference: str


def heaviest(metric: str, costs: Costs) -> tuple[Share, ...]:
    """The layers that weigh most in a metric; for peak memory the layer of the peak."""
    if metric == "peak_memory" and costs.peak_layer:
        peak = costs.totals.get("peak_memory", 0)
        return (Share(costs.peak_layer, peak, 1.0),)
    by = WEIGHED_BY.get(metric)
    if by is None:
        return ()
    rows = [(layer.costs[by], name) for name, layer in costs.layers.items()]
    total = sum(amount for amount, _ in rows)
    rows.sort(key=lambda row: (-row[0], row[1]))
    return tuple(Share(name, a, a / total) for a, name in rows[:SHOWN] if a)


def remedy(metric: str, case: Case) -> str:
    """The squeeze command that would bring the model under, or nothing."""
    return COMMANDS[metric](case) if metric in COMMANDS else ""


def layer_remedy(metric: str, layer: str, case: Case) -> str:
    """Low rank for the one layer that is over, where that metric falls with it."""
    option = {"macs": "--macs", "flops": "--macs"}.get(metric, "--params")
    text = _rewrite("factorize", option)(case)
    return f"{text} --only {shlex.quote(layer)}" if text else ""


def _percent(case: Case) -> str:
    """What may remain, rounded down; empty where no rewrite leaves so little."""
    percent = math.floor(case.keep * 1000) / 10
    return f"{percent:g}%" if percent >= 1 else ""


def _rewrite(command: str, option: str) -> Callable[[Case], str]:
    def text(case: Case) -> str:
        target = _percent(case)
        if not target:
            return ""
        model, data = shlex.quote(case.model), shlex.quote(case.data)
        return f"squeeze {command} {model} {option} {target} --data {data}"

    return text


def _parameters(case: Case) -> str:
    """Low rank where fully connected layers weigh most, else fewer channels."""
    first = heaviest("params", case.costs)[:1]
    dense = any(case.costs.layers[s.layer].op in DENSE for s in first)
    return _rewrite("factorize" if dense else "prune", "--params")(case)


def _memory(case: Case) -> str:
    """Activations grow with the square of the resolution (MobileNets §3.4)."""
    image = any(
        len(s) == 4 and min(s[2:]) > 1 for s in case.costs.input_shapes.values()
    )
    multiplier = math.floor(math.sqrt(case.keep) * 100) / 100
    if not image or multiplier < 0.1:
        return ""
    return f"squeeze resolution {shlex.quote(case.model)} --multiplier {multiplier:g}"


def _distil(case: Case) -> str:
    model, teacher = shlex.quote(case.model), shlex.quote(case.reference)
    return (
        f"squeeze distill {model} --teacher {teacher} --data {shlex.quote(case.data)}"
    )


COMMANDS: dict[str, Callable[[Case], str]] = {
    "macs": _rewrite("shrink", "--macs"),
    "flops": _rewrite("shrink", "--macs"),
    "predicted_latency": _rewrite("shrink", "--macs"),
    "latency": _rewrite("prune", "--latency"),
    "params": _parameters,
    "weight_size": _parameters,
    "file_size": _parameters,
    "peak_memory": _memory,
    "accuracy": _distil,
    "agreement": _distil,
}
