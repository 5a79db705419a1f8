"""How much the outputs feel it when channels of one family go.

An error in one layer is not worth as much as the same error in another: where there is
data, each family's least important channels are silenced once, alone, and the error of
the network's outputs is what they count for (maths: the allocation of a budget must
weight each layer by the effect of a small relative error in it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from squeeze import session
from squeeze.calibrate.data import Data, fixed_batch
from squeeze.cost import profile
from squeeze.model import node_name
from squeeze.rewrite.channels import choose
from squeeze.rewrite.channels.trace import Array, Family, Trace
from squeeze.rewrite.criteria import Reading, readings

SILENCED = 0.1  # share of a family's score that is taken away to see what happens
SAMPLES = 64  # that are looked at
LEAST_SAMPLES = 8
MACS = 10**12  # spent on looking, about
LEAST = 1e-3  # of the largest weight: what the outputs hardly feel is not for free


@dataclass(frozen=True)
class Gate:
    """A factor for every index of an axis that a sink reads: a graph input."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    units: Array


def weighted(
    trace: Trace, families: Sequence[Family], scores: Array, data: Data
) -> Array:
    """`scores` scaled family by family, so that they count in errors of the outputs.

    The error is taken to grow as the lost score to the power `choose.COHERENCE`.
    """
    if len(families) < 2:
        return scores
    silenced = [_least(family, scores) for family in families]
    errors = _errors(trace, silenced, data)
    lost = np.array([scores[units].sum() for units in silenced])
    known = (lost > 0) & np.isfinite(errors) & (errors > 0)
    if not known.any():
        return scores
    weights = np.zeros(len(families))
    weights[known] = errors[known] / lost[known] ** choose.COHERENCE
    weights = np.maximum(weights / weights.max(), LEAST) ** (1 / choose.COHERENCE)
    result = scores.copy()
    for family, weight in zip(families, weights, strict=True):
        result[family.units] *= weight
    return result


def _least(family: Family, scores: Array) -> Array:
    """The units that hold `SILENCED` of the family's score; one at least."""
    units = family.units[np.argsort(scores[family.units], kind="stable")]
    share = np.cumsum(scores[units]) / (scores[units].sum() or 1.0)
    return units[: max(1, int((share <= SILENCED).sum()))]


def _errors(trace: Trace, silenced: Sequence[Array], data: Data) -> Array:
    """Relative squared error of the outputs for each silenced set, alone."""
    gates, model = _gated(trace)
    masks = [trace.full, *(_without(trace, units) for units in silenced)]
    sums = np.zeros((len(masks), 2))
    runner = session.of(model)
    for batch in _few(trace, len(silenced), data):
        then = None
        for row, keep in enumerate(masks):
            now = runner.run(None, {**batch.inputs, **_feeds(gates, keep)})
            then = now if then is None else then
            sums[row] += _gap(then, now)
    return np.asarray(sums[1:, 0] / (sums[1:, 1] + np.finfo(float).tiny))


def _few(trace: Trace, runs: int, data: Data) -> Data:
    """As many samples as the runs may cost, in whole batches where those are fixed."""
    batch = fixed_batch(trace.model) or 1
    macs = profile(trace.model, shapes=trace.shapes).totals.macs // batch
    count = min(max(MACS // max(macs * runs, 1), LEAST_SAMPLES), SAMPLES)
    return data.take(
        np.arange(min(-(-count // batch) * batch, len(data) // batch * batch))
    )


def _without(trace: Trace, units: Array) -> Array:
    keep = trace.full.copy()
    keep[units] = False
    return keep


def _gap(then: Sequence[Any], now: Sequence[Any]) -> tuple[float, float]:
    """Squared error, and squared spread over the samples, of floating outputs."""
    error = spread = 0.0
    for a, b in zip(then, now, strict=True):
        old, new = np.asarray(a), np.asarray(b)
        if old.dtype.kind == "f" and old.ndim:
            old, new = old.astype(np.float64), new.astype(np.float64)
            error += float(((new - old) ** 2).sum())
            spread += float((old**2).sum())
    return error, spread


def _gated(trace: Trace) -> tuple[list[Gate], ir.Model]:
    """The model with a factor, a graph input, on all that sinks read."""
    model = trace.model.clone()
    nodes = dict(zip(trace.model.graph, model.graph, strict=True))
    gates: dict[str, tuple[Gate, ir.Value]] = {}
    for reading in readings(trace):
        gate = _gate(reading, trace)
        if gate.name not in gates:
            value = ir.Value(
                name=gate.name,
                shape=ir.Shape(gate.shape),
                type=ir.TensorType(gate.dtype),
            )
            model.graph.inputs.append(value)
            gates[gate.name] = gate, value
        node = nodes[reading.sink.node]
        for operand, axis in reading.sink.places:
            if axis == reading.axis and _reads(reading, operand):
                name = f"{gate.name}/{node_name(node)}/{operand}"
                product = ir.node(
                    "Mul", [node.inputs[operand], gates[gate.name][1]], name=name
                )
                product.outputs[0].name = name
                model.graph.insert_before(node, product)
                node.replace_input_with(operand, product.outputs[0])
    return [gate for gate, _ in gates.values()], model


def _reads(reading: Reading, operand: int) -> bool:
    return reading.sink.node.inputs[operand] is reading.value


def _gate(reading: Reading, trace: Trace) -> Gate:
    shape = [1] * len(trace.shapes.of(reading.value) or ())
    shape[reading.axis] = len(reading.units)
    kind = trace.shapes.dtype(reading.value) or ir.DataType.FLOAT
    name = f"squeeze/gate/{reading.key}"
    return Gate(name, tuple(shape), kind, reading.units)


def _feeds(gates: Sequence[Gate], keep: Array) -> dict[str, Array]:
    return {
        g.name: keep[g.units].reshape(g.shape).astype(g.dtype.numpy()) for g in gates
    }
