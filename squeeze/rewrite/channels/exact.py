"""Removals that change nothing: channels that are always 0, or always one number.

A channel goes if at every sink what reads it is 0 on the data. A constant v ≠ 0 goes
with `bias += W[:, c]·v` where every sink is an unpadded layer with weights: padding
would put zeros beside the constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import session
from squeeze.calibrate.data import Data
from squeeze.rewrite.channels.trace import Array, Sink, Trace
from squeeze.shapes import Shapes

Key = tuple[str, int]  # value name, axis


@dataclass(frozen=True)
class Extremes:
    """Least and largest value of every index of an axis over the data."""

    low: Array
    high: Array


@dataclass(frozen=True)
class Exact:
    """By unit: may it go, and is it a constant other than 0 that a bias must take."""

    removable: Array
    constant: Array
    extremes: Mapping[Key, Extremes]


def exact(trace: Trace, data: Data) -> Exact:
    """Look at every sink on the data."""
    places = _places(trace)
    wanted = sorted({k for keys in places for k in keys})
    found = extremes(trace.model, trace.shapes, wanted, data)
    zero, constant = trace.full.copy(), trace.full.copy()
    for sink, keys in zip(trace.sinks, places, strict=True):
        units = trace.units(sink.labels)
        per = [_per_letter(found[k], len(units)) for k in keys]
        dead = np.zeros(len(units), bool)
        for low, high in per:
            dead |= (low == 0) & (high == 0)
        dead |= _unread(sink, len(units))
        _deny(zero, units, ~dead)
        steady = np.zeros(len(units), bool)
        if not sink.padded and len(per) == 1 and takes_bias(sink):
            steady = per[0][0] == per[0][1]
        _deny(constant, units, ~(steady | dead))
    read = np.zeros(len(zero), bool)
    for sink in trace.sinks:
        read[trace.units(sink.labels)] = True
    fine = read & ~trace.inexact
    fine[0] = False
    return Exact((zero | constant) & fine, constant & ~zero & fine, found)


def _unread(sink: Sink, size: int) -> Array:
    """Indices that the sink's weights multiply by nothing but 0."""
    unread = np.zeros(size, bool)
    for operand, axis in sink.places:
        value = sink.node.inputs[operand]
        if value is not None and value.const_value is not None:
            weight = value.const_value.numpy()
            other = tuple(i for i in range(weight.ndim) if i != axis)
            unread |= ~weight.any(other)
    return unread


def _deny(flags: Array, units: Array, condition: Array) -> None:
    flags[units[condition]] = False


def _places(trace: Trace) -> list[list[Key]]:
    """The activation operands of every sink."""
    return [
        [
            (value.name or "", axis)
            for operand, axis in sink.places
            if (value := sink.node.inputs[operand]) is not None
            and value.const_value is None
        ]
        for sink in trace.sinks
    ]


def _per_letter(found: Extremes, size: int) -> tuple[Array, Array]:
    """Extremes by the sink's letter: of a grouped layer over the groups as well."""
    low = found.low.reshape(-1, size).min(0)
    high = found.high.reshape(-1, size).max(0)
    return low, high


def takes_bias(sink: Sink) -> bool:
    """Whether a constant input channel can be put into this layer's bias."""
    node = sink.node
    if node.op_type == "Conv":
        weight = node.inputs[1]
        plain = (node.attributes.get_int("group", 1) or 1) == 1
        return plain and weight is not None and weight.const_value is not None
    if node.op_type == "Gemm":
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        flat = bias is None or (
            bias.const_value is not None and len(bias.const_value.shape) == 1
        )
        unit = all(node.attributes.get_float(k, 1.0) == 1.0 for k in ("alpha", "beta"))
        return flat and unit and weight is not None and weight.const_value is not None
    return False


def fold_constants(trace: Trace, keep: Array, found: Exact) -> None:
    """Put what the constant channels that `keep` denies contribute into biases.

    Before removal, in place. Changes no output on the data.
    """
    for sink in trace.sinks:
        units = trace.units(sink.labels)
        going = found.constant[units] & ~keep[units]
        if not going.any():
            continue
        node = sink.node
        (axis_of_weight,) = [a for o, a in sink.places if o == 1]
        key = next(
            (v.name or "", a)
            for o, a in sink.places
            if (v := node.inputs[o]) and o == 0
        )
        values = np.where(going, found.extremes[key].low, 0).astype(np.float64)
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        array = weight.const_value.numpy().astype(np.float64)
        columns = np.moveaxis(array, axis_of_weight, -1) @ values
        extra = columns.reshape(len(columns), -1).sum(1)
        _add_to_bias(trace, node, extra)


def _add_to_bias(trace: Trace, node: ir.Node, extra: Array) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    old = node.inputs[2] if len(node.inputs) > 2 else None
    bias = extra
    if old is not None and old.const_value is not None:
        bias = bias + old.const_value.numpy()
    graph, name = trace.model.graph, f"{node.name or node.outputs[0].name}_bias"
    while name in graph.initializers:
        name += "_"
    kind = weight.const_value.numpy().dtype
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    value = models.add_initializer(graph, ir.Tensor(bias.astype(kind), name=name))
    node.replace_input_with(2, value)
    if (node, 2) not in trace.uses:
        labels = trace.axes[node.outputs[0]][1]
        assert isinstance(trace.uses, dict)
        trace.uses[node, 2] = (labels,)


# -- looking ----------------------------------------------------------------------


def extremes(
    model: ir.Model, shapes: Shapes, keys: list[Key], data: Data
) -> dict[Key, Extremes]:
    """Least and largest values over the data, by value name and axis."""
    if not keys:
        return {}
    work = model.clone()
    by_name = {v.name: v for node in work.graph for v in node.outputs}
    outputs: list[ir.Value] = []
    old = models.opset(work) < 18
    for name, axis in keys:
        value = by_name.get(name) or next(
            v for v in work.graph.inputs if v.name == name
        )
        rank = len(shapes.of(value) or ())
        outputs += _reduced(work.graph, value, rank, axis % rank, old)
    work.graph.outputs.clear()
    work.graph.outputs.extend(outputs)
    runner = session.of(work, optimize=False)
    results = None
    for batch in data:
        arrays = [np.asarray(a) for a in runner.run(None, batch.inputs)]
        if results is None:
            results = arrays
        else:
            for i, array in enumerate(arrays):
                merge = np.minimum if i % 2 == 0 else np.maximum
                results[i] = merge(results[i], array)
    assert results is not None
    return {
        key: Extremes(results[2 * i], results[2 * i + 1]) for i, key in enumerate(keys)
    }


def _reduced(
    graph: ir.Graph, value: ir.Value, rank: int, axis: int, old: bool
) -> list[ir.Value]:
    """ReduceMin and ReduceMax of a value over all axes but one."""
    found = []
    for op in ("ReduceMin", "ReduceMax"):
        axes = [i for i in range(rank) if i != axis]
        inputs: list[ir.Value] = [value]
        attributes: dict[str, object] = {"keepdims": 0}
        if old:
            attributes["axes"] = axes
        else:
            name = f"squeeze/axes/{len(graph.initializers)}"
            tensor = ir.Tensor(np.array(axes, np.int64), name=name)
            inputs.append(models.add_initializer(graph, tensor))
        node = ir.node(op, inputs, attributes)  # type: ignore[arg-type]
        node.outputs[0].name = f"squeeze/{op}/{value.name}/{axis}"
        node.outputs[0].type = value.type or ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        found.append(node.outputs[0])
    return found
