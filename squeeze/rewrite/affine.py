"""The affine part of a layer: where its weights and its bias lie, and changing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from squeeze.model import add_initializer, constant, node_name
from squeeze.rewrite.channels.trace import Array
from squeeze.rewrite.fit.solve import Affine

Place = tuple[ir.Node, int]
Scaled = Callable[[ir.Node, Array, Array], Array]


@dataclass(frozen=True)
class Row:
    """A kind of layer: the axis of its outputs' channels, and its weights scaled."""

    axis: int
    scaled: Scaled


def _first(node: ir.Node, weight: Array, scale: Array) -> Array:
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def _last(node: ir.Node, weight: Array, scale: Array) -> Array:
    return weight * scale


def _gemm(node: ir.Node, weight: Array, scale: Array) -> Array:
    by = _first if node.attributes.get_int("transB", 0) else _last
    return by(node, weight, scale)


def _transposed(node: ir.Node, weight: Array, scale: Array) -> Array:
    """Weights (C, O / groups, *kernel)."""
    groups = node.attributes.get_int("group", 1) or 1
    split = weight.reshape(groups, -1, *weight.shape[1:])
    factors = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (split * factors).reshape(weight.shape)


TABLE = {
    "Conv": Row(1, _first),
    "ConvTranspose": Row(1, _transposed),
    "Gemm": Row(1, _gemm),
    "MatMul": Row(-1, _last),
    "LayerNormalization": Row(-1, _last),
    "GroupNormalization": Row(1, _last),
}
STATISTICS = ("LayerNormalization", "GroupNormalization")  # they read all channels
LAYERS = tuple(op for op in TABLE if op not in STATISTICS)


def affine_axis(node: ir.Node) -> int:
    return TABLE[node.op_type].axis


def why_not(node: ir.Node, channels: int) -> str | None:
    """Why the outputs of a layer can't be scaled and shifted by channel, or None."""
    weight = constant(node, 1)
    if node.op_type not in TABLE:
        return f"{node.op_type} has no weights of its own"
    if weight is None:
        return "its weights are computed while it runs"
    if node.op_type in STATISTICS and weight.shape != (channels,):
        return "it has no scale for each channel"
    if node.op_type == "MatMul" and weight.ndim < 2:
        return "its output has no channels"
    if bias_place(node) is None or node.attributes.get_float("beta", 1.0) == 0:
        return "it has no bias to correct"
    return None


def affine_step(node: ir.Node, index: int) -> tuple[Array, Array] | None:
    """(scale, shift) of a constant added by channel, or a BatchNormalization.

    By channel of input `index`; None for any other node.
    """
    constants = [_constant(v) for v in node.inputs]
    if node.op_type == "Add" and len(node.inputs) == 2:
        other, value = constants[1 - index], node.inputs[1 - index]
        if other is None or value is None or not _flat(value):
            return None
        return np.ones(1), other.reshape(-1)
    if node.op_type == "BatchNormalization" and index == 0:
        scale, bias, mean, variance = constants[1:5]
        if scale is None or bias is None or mean is None or variance is None:
            return None
        factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        return factor, bias - mean * factor
    return None


def _constant(value: ir.Value | None) -> Array | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy().astype(np.float64)


def bias_place(node: ir.Node) -> Place | None:
    """The (node, input) that holds a layer's bias, present or not; None without one.

    A MatMul's is the constant of the Add behind it.
    """
    if node.op_type in TABLE and node.op_type not in ("Gemm", "MatMul"):
        return node, 2
    if node.op_type == "Gemm":
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is None or (given.const_value is not None and _flat(given)):
            return node, 2
        return None
    users = tuple(node.outputs[0].uses())
    if len(users) == 1 and users[0][0].op_type == "Add":
        user, index = users[0]
        other = user.inputs[1 - index]
        if other is not None and other.const_value is not None and _flat(other):
            return user, 1 - index
    return None


def _flat(value: ir.Value) -> bool:
    """Whether a constant is one number per output."""
    assert value.const_value is not None
    shape = value.const_value.shape.numpy()
    return len(shape) > 0 and int(np.prod(shape)) == shape[-1]


def bias_values(place: Place | None, count: int) -> Array:
    if place is None or place[0].op_type == "Add":
        return np.zeros(count)  # an Add behind the layer is no part of its output
    node, index = place
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or value.const_value is None:
        return np.zeros(count)
    array = value.const_value.numpy().astype(np.float64).reshape(-1)
    return np.broadcast_to(array, (count,)).copy()


def store(model: ir.Model, node: ir.Node, fitted: Affine, place: Place | None) -> None:
    """Give a linear layer the weights (O, D) and, at `place`, the bias (O,)."""
    old = constant(node, 1)
    assert old is not None
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    new = fitted.weight.T if transposed else fitted.weight
    _set(model, node, 1, np.ascontiguousarray(new.reshape(old.shape)).astype(old.dtype))
    if place is not None:
        _store_bias(model, place, fitted.bias, old.dtype)


def rescale(model: ir.Model, node: ir.Node, scale: Array, shift: Array) -> None:
    """Make a layer's outputs y into scale · y + shift, by channel (O,)."""
    weight, place = constant(node, 1), bias_place(node)
    assert weight is not None
    assert place is not None
    scaled = TABLE[node.op_type].scaled(node, weight.astype(np.float64), scale)
    beta = node.attributes.get_float("beta", 1.0) or 1.0
    bias = bias_values(place, len(scale)) * scale + shift / beta
    _set(model, node, 1, scaled.astype(weight.dtype))
    _store_bias(model, place, bias, weight.dtype)


def _store_bias(model: ir.Model, place: Place, bias: Array, dtype: Any) -> None:
    user, index = place
    if user.op_type == "Add":
        other = user.inputs[index]
        assert other is not None
        assert other.const_value is not None
        array = other.const_value.numpy()
        bias = array + bias.reshape((1,) * (array.ndim - 1) + (-1,))
    _set(model, user, index, bias.astype(dtype))


def _set(model: ir.Model, node: ir.Node, index: int, array: Array) -> None:
    """A constant of the node's own: others may share the old one."""
    graph = model.graph
    old = node.inputs[index] if len(node.inputs) > index else None
    name = f"{(old.name if old is not None else None) or node_name(node)}_refit"
    while name in graph.initializers:
        name += "_"
    while len(node.inputs) <= index:
        node.resize_inputs(len(node.inputs) + 1)
    node.replace_input_with(index, add_initializer(graph, ir.Tensor(array, name=name)))
    if old is not None and not old.uses() and old.name in graph.initializers:
        graph.initializers.pop(old.name or "")
