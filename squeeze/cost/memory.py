"""Memory for activations: by liveness alone, and as onnxruntime plans it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from squeeze.model import node_name
from squeeze.shapes import Shapes

# ops whose CPU kernels run in onnxruntime on the memory of their first input when
# nobody else needs it: tried one by one with onnxruntime 1.31, Add and Mul don't
IN_PLACE = frozenset(
    """Cast Celu Clip Elu HardSigmoid LeakyRelu LogSoftmax Relu ScatterElements
    ScatterND Selu Shrink Sigmoid Softmax Softplus Softsign Tanh
    ThresholdedRelu""".split()
)
# ops that only show their input's memory under another shape
VIEWS = frozenset("Flatten Identity Reshape Squeeze Unsqueeze".split())
# ops that onnxruntime runs as several: how many of their outputs they hold besides
SCRATCH = {"HardSwish": 1, "Mish": 1}
ALIGNMENT = 256  # bytes that onnxruntime's arena rounds each allocation up to


@dataclass(frozen=True)
class RuntimePeak:
    """Most bytes of activations at once as onnxruntime needs them, and the node there.

    `in_place` names the nodes that write where they read.
    """

    bytes: int
    layer: str
    in_place: tuple[str, ...]


def value_bytes(value: ir.Value, shapes: Shapes) -> int:
    """Bytes of a value's elements; 0 where its shape or type is unknown."""
    shape, dtype = shapes.of(value), shapes.dtype(value)
    if shape is None or dtype is None or dtype == ir.DataType.STRING:
        return 0
    return (prod(shape) * dtype.bitwidth + 7) // 8


def last_uses(nodes: list[ir.Node]) -> dict[ir.Value, int]:
    """Index of the last node that reads each value, uses inside bodies included."""
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in reads(node):
            last[value] = index
    return last


def reads(node: ir.Node) -> Iterable[ir.Value]:
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from reads(inner)


def live_bytes(graph: ir.Graph, shapes: Shapes) -> dict[ir.Node, int]:
    """Bytes of live activations at each node, in the graph's order.

    Inputs of the graph, intermediates and outputs still needed, and the node's
    outputs. Nothing is reused in place; weights are not counted.
    """
    nodes = list(graph)
    last = last_uses(nodes)
    last.update(dict.fromkeys(graph.outputs, len(nodes)))
    live = sum(value_bytes(v, shapes) for v in graph.inputs if v in last)
    dying: dict[int, list[ir.Value]] = {}
    for value, index in last.items():
        if value.const_value is None:
            dying.setdefault(index, []).append(value)
    found = {}
    for index, node in enumerate(nodes):
        live += sum(value_bytes(v, shapes) for v in node.outputs)
        found[node] = live
        live -= sum(value_bytes(v, shapes) for v in dying.get(index, ()))
        live -= sum(value_bytes(v, shapes) for v in node.outputs if v not in last)
    return found


def peak_activation_bytes(graph: ir.Graph, shapes: Shapes) -> tuple[int, str]:
    """The largest sum of live activations, and the first node that has it."""
    peak, where = 0, ""
    for node, live in live_bytes(graph, shapes).items():
        if live > peak:
            peak, where = live, node_name(node)
    return peak, where


def runtime_peak(graph: ir.Graph, shapes: Shapes) -> RuntimePeak:
    """Liveness as onnxruntime plans it: in its order, views free, buffers reused.

    Inputs belong to the caller and are left out. A kernel that allows it writes where
    it reads, when nobody reads that later and the shapes agree; else a buffer of the
    same shape that fell free is taken, and stays allocated until then (the sequential
    planner of core/framework/allocation_planner.cc).
    """
    nodes = runtime_order(graph)
    plan = _Plan(graph, nodes, shapes)
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for buffer, (first, last, size) in plan.spans().items():
        if buffer in plan.planned:
            starts[first] = starts.get(first, 0) + size
            ends[last] = ends.get(last, 0) + size
    live, peak, where = 0, 0, ""
    for index, node in enumerate(nodes):
        live += starts.get(index, 0)
        scratch = SCRATCH.get(node.op_type, 0) * value_bytes(node.outputs[0], shapes)
        if live + scratch > peak:
            peak, where = live + scratch, node_name(node)
        live -= ends.get(index, 0)
    return RuntimePeak(peak, where, tuple(plan.in_place))


class _Plan:
    """Which buffer each value lies in; a buffer is named by its first value."""

    def __init__(self, graph: ir.Graph, nodes: list[ir.Node], shapes: Shapes) -> None:
        self.shapes = shapes
        self.vague = _vague(graph, nodes, shapes)
        self.buffer: dict[ir.Value, ir.Value] = {}
        self.planned: set[ir.Value] = set()  # buffers that onnxruntime allocates
        self.in_place: list[str] = []
        self._free: list[ir.Value] = []  # what fell free last comes first
        self._uses: dict[ir.Value, int] = {}
        self._count_uses(graph, nodes)
        self._reads: dict[ir.Value, int] = {}  # last index at which a buffer is in use
        self._starts: dict[ir.Value, int] = {}
        for index, node in enumerate(nodes):
            self._place(index, node)
            self._release(index, node)
        for value in graph.outputs:
            self._reads[self._of(value)] = len(nodes)

    def spans(self) -> dict[ir.Value, tuple[int, int, int]]:
        """(first index, last index, bytes) of every buffer."""
        return {
            buffer: (
                start,
                self._reads.get(buffer, start),
                -(-value_bytes(buffer, self.shapes) // ALIGNMENT) * ALIGNMENT,
            )
            for buffer, start in self._starts.items()
        }

    def _count_uses(self, graph: ir.Graph, nodes: list[ir.Node]) -> None:
        for node in nodes:
            for value in reads(node):
                self._uses[value] = self._uses.get(value, 0) + 1
        for value in (*graph.inputs, *graph.outputs):
            self._uses[value] = self._uses.get(value, 0) + 1  # never reused

    def _of(self, value: ir.Value) -> ir.Value:
        return self.buffer.get(value, value)

    def _place(self, index: int, node: ir.Node) -> None:
        for position, value in enumerate(node.outputs):
            taken = self._taken_over(node, value) if position == 0 else None
            if taken is None:
                taken = self._fallen_free(value)
            if taken is None:
                self._starts[value] = index
                self.planned.add(value)
                self._reads[value] = index
                continue
            self.buffer[value] = taken
            self._uses[taken] = self._uses.get(taken, 0) + self._uses.get(value, 0)
            self._reads[taken] = index

    def _taken_over(self, node: ir.Node, output: ir.Value) -> ir.Value | None:
        """The buffer of the node's first input, shown anew or written in place."""
        value = node.inputs[0] if node.inputs else None
        if value is None:
            return None
        if node.op_type in VIEWS:
            return None if output.is_graph_output() else self._of(value)
        buffer = self._of(value)
        own = buffer in self.planned and self._uses.get(buffer) == 1
        if node.op_type in IN_PLACE and own and self._same(value, output):
            self.in_place.append(node_name(node))
            return buffer
        return None

    def _fallen_free(self, value: ir.Value) -> ir.Value | None:
        for buffer in self._free:
            if self._same(buffer, value):
                self._free.remove(buffer)
                return buffer
        return None

    def _same(self, one: ir.Value, other: ir.Value) -> bool:
        shape = self.shapes.of(one)
        if shape is None or shape != self.shapes.of(other):
            return False
        if one in self.vague or other in self.vague:
            return False
        return value_bytes(one, self.shapes) == value_bytes(other, self.shapes)

    def _release(self, index: int, node: ir.Node) -> None:
        for value in reads(node):
            buffer = self._of(value)
            self._reads[buffer] = index
            self._uses[buffer] -= 1
            if not self._uses[buffer] and buffer in self.planned:
                self._free.insert(0, buffer)
        for value in node.outputs:
            buffer = self._of(value)
            if not self._uses.get(buffer, 0) and buffer not in self._free:
                self._free.insert(0, buffer)


def _vague(graph: ir.Graph, nodes: list[ir.Node], shapes: Shapes) -> set[ir.Value]:
    """Values whose shape is computed while the model runs: equal to no other."""
    if all(v.shape is not None and v.shape.is_static() for v in graph.inputs):
        return set()
    found: set[ir.Value] = set()
    for node in nodes:
        if any(
            value in found or (value.name in shapes.constants and not value.const_value)
            for value in reads(node)
        ):
            found.update(node.outputs)
    return found


def runtime_order(graph: ir.Graph) -> list[ir.Node]:
    """The order that onnxruntime runs in: depth first back from the outputs.

    Its default (ReverseDFSFrom in core/graph/graph.cc) walks from the nodes without
    consumers towards the inputs and leaves each node after all that it reads; inputs
    are entered in the order of their nodes' indices.
    """
    place = {node: index for index, node in enumerate(graph)}
    sources = {
        node: sorted(
            {
                p
                for value in reads(node)
                if (p := value.producer()) is not None and p in place
            },
            key=place.__getitem__,
        )
        for node in place
    }
    leaves = [n for n in place if not any(v.uses() for v in n.outputs)]
    order: list[ir.Node] = []
    done: set[ir.Node] = set()
    stack = [(node, False) for node in leaves]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack += [(p, False) for p in sources[node] if p not in done]
    return order if len(order) == len(place) else list(place)
