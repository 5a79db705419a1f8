"""Repair by least squares what removal broke (He et al. 2017).

Layer by layer in the graph's order: inputs from the shrunken network as it is by then,
targets from the original (Zhang et al. 2015, §3.3; He et al. 2017). Where a layer ends
in a residual sum, the target is the original sum less the shrunken skip, so that every
block repairs the stream. Layers without a closed form get their mean back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.data import Data
from squeeze.calibrate.stats import Collector, Columns, Products, Stats, Wanted
from squeeze.model import add_initializer, node_name
from squeeze.rewrite.channels.trace import Array
from squeeze.rewrite.criteria import GRAM_COLUMNS, columns_of, matrix
from squeeze.rewrite.fit.solve import Affine, regress_towards
from squeeze.shapes import Shapes

PASSES = 8  # a pass over the data is shared by layers that come one after the other
HELD_OUT = 5  # every fifth sample tells whether a refit generalises


@dataclass(frozen=True)
class Network:
    """A model with its shapes."""

    model: ir.Model
    shapes: Shapes


@dataclass(frozen=True)
class Layer:
    """A layer of the shrunken model to refit: `kept` outputs of the original's.

    `total` and `skip` name the residual sum it ends in, if it does.
    """

    node: ir.Node
    kept: Array
    total: str | None = None
    skip: str | None = None

    @property
    def output(self) -> str:
        return self.node.outputs[0].name or ""


@dataclass(frozen=True)
class Refitted:
    """Relative squared errors of a layer's outputs on held-out rows."""

    layer: str
    before: float
    after: float


def refit(
    original: Network,
    shrunken: Network,
    kept: Mapping[str, Array],
    data: Data,
    seed: int = 0,
    passes: int = PASSES,
) -> list[Refitted]:
    """Refit `shrunken.model` in place; `kept` masks the output channels by layer name.

    Needs both models to have the same value names. Returns one entry per layer.
    """
    layers = list(_layers(shrunken, kept))
    results: list[Refitted] = []
    for wave in _waves(layers, passes):
        wanted = {node_name(layer.node): _request(layer) for layer in wave}
        collector = Collector(
            shrunken.model,
            shrunken.shapes,
            wanted,
            others=[(original.model, original.shapes)],
            seed=seed,
        )
        index = np.arange(len(data))
        told = index % HELD_OUT == HELD_OUT - 1
        fitting = collector.over(data.take(index[~told]))
        judging = collector.over(data.take(index[told])) if told.any() else fitting
        for layer in wave:
            name = node_name(layer.node)
            results.append(_solve(shrunken.model, layer, fitting[name], judging[name]))
    return results


def _waves(layers: Sequence[Layer], passes: int) -> Iterator[Sequence[Layer]]:
    size = -(-len(layers) // max(1, passes)) if layers else 1
    for start in range(0, len(layers), size):
        yield layers[start : start + size]


def _layers(net: Network, kept: Mapping[str, Array]) -> Iterator[Layer]:
    """Linear layers whose inputs changed, in the graph's order."""
    changed: set[ir.Value] = set()
    for node in net.model.graph:
        touched = any(v in changed for v in node.inputs if v is not None)
        name = node_name(node)
        shrunk = name in kept and not kept[name].all()
        if touched or shrunk:
            changed.update(node.outputs)
        weight = matrix(node)
        if not touched or weight is None or name not in kept:
            continue
        if sum(weight.shape) <= GRAM_COLUMNS:
            total, skip = _residual(node, net.shapes)
            yield Layer(node, kept[name], total, skip)


def _residual(node: ir.Node, shapes: Shapes) -> tuple[str | None, str | None]:
    """The sum that a layer's output goes straight into, and its other summand."""
    users = node.outputs[0].uses()
    if len(users) != 1 or node.outputs[0].is_graph_output():
        return None, None
    ((user, index),) = users
    if user.op_type not in ("Add", "Sum") or len(user.inputs) != 2:
        return None, None
    other = user.inputs[1 - index]
    if other is None or other.const_value is not None or other is node.outputs[0]:
        return None, None
    if other.producer() is None or _comes_after(other, node):
        return None, None
    if shapes.of(other) != shapes.of(node.outputs[0]):
        return None, None
    return user.outputs[0].name, other.name


def _comes_after(value: ir.Value, node: ir.Node) -> bool:
    """Whether a value is computed later: its own layers are not refitted yet."""
    graph, producer = node.graph, value.producer()
    if graph is None or producer is None:
        return False
    for one in graph:
        if one is producer:
            return False
        if one is node:
            return True
    return False


def _request(layer: Layer) -> Wanted:
    """Rows [inputs, shrunken | outputs, original | skip, shrunken]."""
    source = layer.node.inputs[0]
    assert source is not None
    axis = 1 if layer.node.op_type == "Conv" else -1
    columns = [columns_of(layer.node, source)]
    columns.append(Columns(layer.total or layer.output, axis, None, 1))
    if layer.skip:
        columns.append(Columns(layer.skip, axis, None, 0))
    return Products(tuple(columns))


def _targets(layer: Layer, stats: Stats, width: int) -> Stats:
    """Statistics of [inputs | targets]: kept outputs, less the skip in a sum."""
    kept = np.flatnonzero(layer.kept)
    picked = stats.columns(np.concatenate([np.arange(width), width + kept]))
    if not layer.skip:
        return picked
    size = len(stats.sums["sum"])
    outputs = len(layer.kept)
    change = np.zeros((width + len(kept), size))
    change[np.arange(width), np.arange(width)] = 1
    rows = width + np.arange(len(kept))
    change[rows, width + kept] = 1
    change[rows, width + outputs + np.arange(len(kept))] = -1
    return Stats(
        stats.count,
        {
            "sum": change @ stats.sums["sum"],
            "product": change @ stats.sums["product"] @ change.T,
        },
    )


def _solve(model: ir.Model, layer: Layer, fitting: Stats, judging: Stats) -> Refitted:
    weight = matrix(layer.node)
    assert weight is not None
    width = weight.shape[1]
    place = _bias(layer.node)
    one, two = (_targets(layer, s, width) for s in (fitting, judging))
    if place is None:  # nowhere to put a bias: fit through the origin
        one, two = (_uncentred(s) for s in (one, two))
    bias = _bias_values(place, len(weight))
    start = Affine(weight, bias)
    trial = regress_towards(one, width, weight)
    before, after = start.error(two), trial.error(two)
    if after >= before:
        return Refitted(node_name(layer.node), before, before)
    _store(model, layer.node, regress_towards(one + two, width, weight), place)
    return Refitted(node_name(layer.node), before, after)


def _uncentred(stats: Stats) -> Stats:
    return Stats(stats.count, {**stats.sums, "sum": np.zeros_like(stats.sums["sum"])})


# -- where weights and biases lie ---------------------------------------------------

Place = tuple[ir.Node, int]


def _bias(node: ir.Node) -> Place | None:
    """The (node, input) that holds a layer's bias, present or not; None without one.

    A MatMul's is the constant of the Add behind it.
    """
    if node.op_type == "Conv":
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


def _bias_values(place: Place | None, count: int) -> Array:
    if place is None or place[0].op_type == "Add":
        return np.zeros(count)  # an Add behind the layer is no part of its output
    node, index = place
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or value.const_value is None:
        return np.zeros(count)
    array = value.const_value.numpy().astype(np.float64).reshape(-1)
    return np.broadcast_to(array, (count,)).copy()


def _store(model: ir.Model, node: ir.Node, fitted: Affine, place: Place | None) -> None:
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    old = value.const_value.numpy()
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    new = fitted.weight.T if transposed else fitted.weight
    _set(model, node, 1, np.ascontiguousarray(new.reshape(old.shape)).astype(old.dtype))
    if place is None:
        return
    user, index = place
    bias = fitted.bias
    if user.op_type == "Add":
        other = user.inputs[index]
        assert other is not None
        assert other.const_value is not None
        array = other.const_value.numpy()
        bias = array + bias.reshape((1,) * (array.ndim - 1) + (-1,))
    _set(model, user, index, bias.astype(old.dtype))


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
