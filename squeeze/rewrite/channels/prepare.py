"""What happens to a graph before its channels are traced.

Shape arithmetic that is the same for every input is made constant (or pruning would
change what is computed from it, attention's √D for one), names for weights are looked
through, and channel shuffles become one Gather each, which labels follow exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from squeeze import shapes as shaping
from squeeze.errors import SqueezeError
from squeeze.model import add_initializer, node_name
from squeeze.shapes import Shapes

Array = NDArray[Any]
SIZED = ("Shape", "Size", "Reshape", "Expand")  # what reads or holds sizes
SHUFFLE_ELEMENTS = 2**24  # a permutation is recognised on its indices


@dataclass(frozen=True)
class Prepared:
    """A model ready for tracing, with its shapes at two choices of the input shapes.

    A dimension that differs between `shapes` and `probe` is dynamic.
    """

    model: ir.Model
    shapes: Shapes
    probe: Shapes
    notes: tuple[str, ...] = ()


def prepare(model: ir.Model, shapes: Shapes) -> Prepared:
    """Get `model` ready, in place. Outputs stay what they were for every input."""
    _look_through(model.graph)
    probe = _probe(model, shapes)
    _fold(model, shapes, probe)  # what is left keeps its shapes
    gathered = _gather_shuffles(model, shapes, probe)
    if gathered:
        shapes = shaping.infer(model, shapes.inputs)
        probe = shaping.infer(model, probe.inputs)
    return Prepared(model, shapes, probe)


def _look_through(graph: ir.Graph) -> None:
    """Identity of a weight is that weight: exporters alias equal ones so."""
    for node in list(graph):
        if node.op_type == "Identity" and not node.domain:
            value, out = node.inputs[0], node.outputs[0]
            if (
                value is not None
                and value.is_initializer()
                and not out.is_graph_output()
            ):
                out.replace_all_uses_with(value)
                graph.remove(node, safe=True)


def _probe(model: ir.Model, shapes: Shapes) -> Shapes:
    """Shapes with every dynamic dimension of the inputs at another size.

    The same shapes where no node cares which dimensions are dynamic.
    """
    if not any(node.op_type in SIZED for node in model.graph):
        return shapes
    batch_only: dict[str, tuple[int, ...]] = {}
    all_of_them: dict[str, tuple[int, ...]] = {}
    for value in model.graph.inputs:
        if value.name in shapes.inputs:
            sizes = shapes.inputs[value.name]
            own = list(value.shape) if value.shape is not None else [None] * len(sizes)
            open_ = [not isinstance(d, int) for d in own]
            first = [
                n + 1 if o and i == 0 else n
                for i, (n, o) in enumerate(zip(sizes, open_, strict=True))
            ]
            rest = [
                2 * n if o and i else n
                for i, (n, o) in enumerate(zip(first, open_, strict=True))
            ]
            batch_only[value.name], all_of_them[value.name] = tuple(first), tuple(rest)
    for inputs in (all_of_them, batch_only):
        try:
            return shaping.infer(model, inputs)
        except SqueezeError:
            continue
    return shapes


def _fold(model: ir.Model, shapes: Shapes, probe: Shapes) -> None:
    """Make constant what is computed from shapes alone and never changes."""
    if not any(node.op_type in ("Shape", "Size") for node in model.graph):
        return
    one, two = shaping.fold(model, shapes), shaping.fold(model, probe)
    for node in list(model.graph):
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        out = node.outputs[0]
        array, other = one.get(out.name or ""), two.get(out.name or "")
        if array is None or other is None or not np.array_equal(array, other):
            continue
        if _from_weights(out):
            continue
        add_initializer(model.graph, ir.Tensor(array, name=out.name), replaces=out)
        model.graph.remove(node, safe=True)


def _from_weights(value: ir.Value) -> bool:
    """Whether weights enter a constant: those stay as they are (they may be tied)."""
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if one.const_value is not None:
            if one.const_value.dtype.is_floating_point() and one.const_value.size > 1:
                return True
        elif (node := one.producer()) is not None and node.op_type not in (
            "Shape",
            "Size",
        ):
            fresh = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
    return False


# -- channel shuffles -------------------------------------------------------------


def _gather_shuffles(model: ir.Model, shapes: Shapes, probe: Shapes) -> int:
    """Reshape–Transpose–Reshape that permutes one axis → Gather with that order."""
    count = 0
    for node in list(model.graph):
        chain = _chain(node)
        if chain is None:
            continue
        found = _permutation(chain, shapes)
        other = _permutation(chain, probe)
        if found is None or other is None or found[0] != other[0]:
            continue
        if not np.array_equal(found[1], other[1]):
            continue
        _replace(model.graph, chain, *found)
        count += 1
    return count


def _chain(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    nodes = [node]
    for op in ("Transpose", "Reshape"):
        out = nodes[-1].outputs[0]
        users = out.uses()
        if out.is_graph_output() or len(users) != 1:
            return None
        ((user, index),) = users
        if user.op_type != op or index != 0 or user.domain:
            return None
        nodes.append(user)
    return (nodes[0], nodes[1], nodes[2]) if node.op_type == "Reshape" else None


def _permutation(
    chain: tuple[ir.Node, ir.Node, ir.Node], shapes: Shapes
) -> tuple[int, Array] | None:
    """(axis, order) if the chain only reorders one axis."""
    source, middle = shapes.of(chain[0].inputs[0]), shapes.of(chain[0].outputs[0])
    target = shapes.of(chain[2].outputs[0])
    if source is None or middle is None or source != target:
        return None
    if prod(source) > SHUFFLE_ELEMENTS or prod(source) == 0:
        return None
    index = np.arange(prod(source), dtype=np.int32).reshape(source)
    order = chain[1].attributes.get_ints("perm", None)
    if order is None:
        return None
    moved = index.reshape(middle).transpose(order).reshape(source)
    for axis, n in enumerate(source):
        line = np.moveaxis(moved, axis, 0).reshape(n, -1)[:, 0] // prod(
            source[axis + 1 :]
        )
        is_order = n > 1 and sorted(line) == list(range(n))
        moves = is_order and (line != np.arange(n)).any()
        if moves and np.array_equal(index.take(line, axis), moved):
            return axis, line.astype(np.int64)
    return None


def _replace(
    graph: ir.Graph, chain: tuple[ir.Node, ir.Node, ir.Node], axis: int, order: Array
) -> None:
    last = chain[2]
    name = f"{node_name(last)}_order"
    while name in graph.initializers:
        name += "_"
    indices = add_initializer(graph, ir.Tensor(order, name=name))
    gather = ir.node(
        "Gather", [chain[0].inputs[0], indices], {"axis": axis}, name=node_name(last)
    )
    graph.insert_before(last, gather)
    out, new = last.outputs[0], gather.outputs[0]
    outputs = [i for i, v in enumerate(graph.outputs) if v is out]
    known, shape, kind = out.name, out.shape, out.type
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    for node in chain[::-1]:
        graph.remove(node, safe=True)
    new.name, new.shape, new.type = known, shape, kind
    assert all(graph.outputs[i] is new for i in outputs)
