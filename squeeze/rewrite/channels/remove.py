"""Removal: slice constants by the masks of their axes, rewrite what encodes sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from squeeze import shapes as shaping
from squeeze.errors import SqueezeError
from squeeze.model import add_initializer, node_name, opset
from squeeze.rewrite.channels.table import TABLE
from squeeze.rewrite.channels.trace import Array, Axes, Trace
from squeeze.shapes import Shapes


@dataclass
class Removal:
    """One removal in progress; the rows of the table call back into it."""

    trace: Trace
    keep: Array
    made: dict[tuple[ir.Value, bytes], ir.Value] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return opset(self.trace.model)

    @property
    def graph(self) -> ir.Graph:
        return self.trace.model.graph

    def mask(self, labels: Array) -> Array:
        return self.trace.mask(labels, self.keep)

    def size(self, labels: Array) -> int:
        return self.trace.size(labels, self.keep)

    def shrinks(self, labels: Array) -> bool:
        return self.size(labels) < len(labels)

    def axes(self, node: ir.Node, index: int) -> Axes:
        """Labels of an input as the trace read them."""
        return axes_of(self.trace, node, index)

    def problem(self, node: ir.Node, why: str) -> SqueezeError:
        return SqueezeError(f"{node.op_type} {node_name(node)!r} can't shrink: {why}")

    def set_int(self, node: ir.Node, name: str, value: int) -> None:
        node.attributes[name] = ir.AttrInt64(name, value)

    def set_input(self, node: ir.Node, index: int, array: Array) -> None:
        """Give a node a constant of its own."""
        while len(node.inputs) <= index:
            node.resize_inputs(len(node.inputs) + 1)
        name = self.name(f"{node_name(node)}_{index}")
        value = add_initializer(self.graph, ir.Tensor(array, name=name))
        node.replace_input_with(index, value)

    def name(self, wanted: str) -> str:
        """A name that no value of the graph has."""
        while wanted in self.graph.initializers or wanted in self._taken:
            wanted += "_"
        self._taken.add(wanted)
        return wanted

    def __post_init__(self) -> None:
        graph = self.graph
        self._taken = {v.name for node in graph for v in node.outputs}
        self._taken |= {v.name for v in graph.inputs}

    def retarget(self, node: ir.Node, sizes: list[int], target: Array | None) -> None:
        """New sizes for Reshape or Expand, dynamic ones left to what they were.

        Chains that compute a target are never edited: with one dynamic dimension the
        target is a constant with −1; otherwise Where(static, sizes, chain).
        """
        out = node.outputs[0]
        old, other = self.trace.shapes.of(out), self.trace.probe.of(out)
        assert old is not None
        dynamic = [
            other is None or a != b for a, b in zip(old, other or old, strict=True)
        ]
        new = np.array(sizes, np.int64)
        if target is not None:
            given = target.reshape(-1).astype(np.int64)
            if node.op_type == "Expand":
                given = np.concatenate(
                    [np.ones(len(new) - len(given), np.int64), given]
                )
                self.set_input(node, 1, np.where(dynamic | (given == 1), given, new))
            else:
                copies = (given == 0) & (not node.attributes.get_int("allowzero", 0))
                self.set_input(node, 1, np.where(dynamic | copies, given, new))
        elif sum(dynamic) <= 1 and node.op_type == "Reshape":
            self.set_input(node, 1, np.where(dynamic, -1, new))
        else:
            self._overlay(node, np.array(dynamic), new)

    def _overlay(self, node: ir.Node, dynamic: Array, sizes: Array) -> None:
        chain = node.inputs[1]
        shape = self.trace.shapes.of(chain)
        if shape is None or shape[0] != len(sizes):
            raise self.problem(node, "its target has another rank")
        static = add_initializer(
            self.graph, ir.Tensor(~dynamic, name=self.name(f"{node_name(node)}_static"))
        )
        fixed = add_initializer(
            self.graph, ir.Tensor(sizes, name=self.name(f"{node_name(node)}_sizes"))
        )
        where = ir.node(
            "Where", [static, fixed, chain], name=self.name(f"{node_name(node)}_target")
        )
        where.outputs[0].name = self.name(f"{node_name(node)}_target_out")
        self.graph.insert_before(node, where)
        node.replace_input_with(1, where.outputs[0])


def axes_of(trace: Trace, node: ir.Node, index: int) -> Axes:
    """Labels of an input, one array per axis; () for what was not read as data."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return ()
    if value.const_value is not None:
        return trace.uses.get((node, index), ())
    return trace.axes.get(value, ())


def remove(trace: Trace, keep: Array) -> Shapes:
    """Take the units that `keep` denies out of the trace's model, in place.

    `keep` is by unit (root label). Returns the new shapes, which are checked against
    the masks' prediction. Raises SqueezeError where an axis would be left empty.
    """
    removal = Removal(trace, keep)
    predicted = _predict(removal)
    for node in list(trace.model.graph):
        row = TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if (
            row is not None
            and row.rewrite is not None
            and node.outputs[0] in trace.axes
        ):
            row.rewrite(removal, node)
    for (node, index), axes in trace.uses.items():
        _slice(removal, node, index, axes)
    _drop_unused(trace.model.graph)
    forget_shapes(trace.model.graph)
    shapes = shaping.infer(trace.model, trace.shapes.inputs)
    _compare(trace, predicted, shapes)
    return shapes


def _predict(removal: Removal) -> dict[str, tuple[int, ...]]:
    predicted = {}
    for value, axes in removal.trace.axes.items():
        sizes = tuple(removal.size(a) for a in axes)
        if any(n == 0 and len(a) > 0 for n, a in zip(sizes, axes, strict=True)):
            raise SqueezeError(f"removal would leave nothing of {value.name!r}")
        predicted[value.name or ""] = sizes
    return predicted


def _compare(
    trace: Trace, predicted: dict[str, tuple[int, ...]], shapes: Shapes
) -> None:
    for name, sizes in predicted.items():
        found = shapes.shapes.get(name)
        if found is not None and found != sizes:
            raise AssertionError(
                f"{name}: {list(found)} after removal, not {list(sizes)}"
            )


def _slice(removal: Removal, node: ir.Node, index: int, axes: Axes) -> None:
    masks = [removal.mask(a) for a in axes]
    value = node.inputs[index]
    if value is None or value.const_value is None or all(m.all() for m in masks):
        return
    key = (value, b"".join(np.packbits(m).tobytes() for m in masks))
    if key not in removal.made:
        array = value.const_value.numpy()
        for axis, mask in enumerate(masks):
            if not mask.all():
                array = array.compress(mask, axis)
        assert value.name is not None
        tensor = ir.Tensor(
            array, dtype=value.const_value.dtype, name=removal.name(value.name)
        )
        removal.made[key] = add_initializer(removal.graph, tensor)
    node.replace_input_with(index, removal.made[key])


def _drop_unused(graph: ir.Graph) -> None:
    """Constants and shape arithmetic that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "")


def forget_shapes(graph: ir.Graph) -> None:
    """Stale shapes make models that no runtime loads; onnx infers them again."""
    outputs = {*graph.outputs}
    for node in graph:
        if node.domain in ("", "ai.onnx"):
            for value in node.outputs:
                if value not in outputs:
                    value.shape = None
