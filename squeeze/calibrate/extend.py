"""A copy of one or two graphs, extended by what statistics need of them.

onnxruntime keeps activations of convolutional networks in a layout of its own, and
bringing a large one back costs as much as a cheap layer. What is added here is chosen
to cost little beside it (measured on the CIFAR-10 sample network):

- Rows at sampled positions go through a Transpose to channels last, which is fused
  into the way back, and one Gather of whole channel vectors.
- Sums over all positions are global average pools, in onnxruntime's own layout. How
  many are positive is the same of Clip(x · 3e38, 0, 1), which is a fused convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from squeeze import model as models
from squeeze.calibrate.wanted import Columns, Moments, Window
from squeeze.errors import SqueezeError
from squeeze.shapes import Shapes

Array = np.ndarray
STEEP = np.float32(3e38)  # makes every positive number at least 1, but denormal ones


@dataclass(frozen=True)
class Feed:
    """A graph input with flat indices of the rows to take: (N, positions, taps).

    `grid` positions there are per sample, `taken` of them are sampled; `stride` rows a
    sample has. With a window, a position is the window's on an input of `size`.
    """

    name: str
    grid: int
    taken: int
    stride: int
    window: Window | None = None
    size: tuple[int, ...] = ()

    def index(self, uniform: Array) -> tuple[Array, Array | None]:
        """Stratified positions, one in each of `taken` equal stretches of the grid.

        `uniform` (N, ≥ taken) in [0, 1). Also says which taps are inside, where some
        may not be.
        """
        cells = np.arange(self.taken) + uniform[:, : self.taken]
        positions = np.minimum(
            (cells * self.grid / self.taken).astype(np.int64), self.grid - 1
        )
        start = np.arange(len(uniform))[:, None, None] * self.stride
        if self.window is None:
            return positions[:, :, None] + start, None
        taps, inside = self.window.taps(positions, self.size)
        return taps + start, inside if self.window.padded else None


@dataclass(frozen=True)
class Rows:
    """An output with `taken` rows per sample, columns (taps, channels).

    Its `feed` is "" where every row there is is taken.
    """

    output: str
    feed: str
    taken: int
    taps: int
    channels: int

    @property
    def width(self) -> int:
        return self.taps * self.channels


@dataclass(frozen=True)
class Sums:
    """An output (…, channels) to be summed over all but channels, times `scale`.

    `whole` ones are counts: what float32 left of them is rounded away.
    """

    output: str
    channels: int
    scale: int
    whole: bool

    def of(self, array: Array) -> Array:
        """(channels,) in float64."""
        rows = array.reshape(-1, self.channels).astype(np.float64) * self.scale
        return np.asarray((np.rint(rows) if self.whole else rows).sum(0))


def merged(parts: Sequence[ir.Model]) -> tuple[ir.Model, list[dict[str, ir.Value]]]:
    """All parts in one model, from the same inputs; and values by name, per part.

    What a part computes from the same values by the same weights as the first does is
    computed once.
    """
    base = models.copy(parts[0])
    names = [_values(base.graph)]
    for number, part in enumerate(parts[1:], 1):
        other = part.clone().graph
        named = _values(other)
        same = _twins(other, base.graph, names[0])
        own = [node for node in other if any(v not in same for v in node.outputs)]
        _detach(other, own, same)
        for node in own:
            node.name = f"{node.name}/{number}" if node.name else None
        for value in named.values():
            if value not in same:
                value.name = f"{value.name}/{number}"
        weights = [v for v in other.initializers.values() if v not in same]
        other.initializers.clear()
        for value in weights:
            base.graph.initializers.add(value)
        base.graph.extend(own)
        names.append({name: same.get(value, value) for name, value in named.items()})
    return base, names


def _twins(
    other: ir.Graph, base: ir.Graph, values: dict[str, ir.Value]
) -> dict[ir.Value, ir.Value]:
    """Values of the other graph that the base computes as well."""
    same = {}
    for value in other.inputs:
        if value.name not in values:
            raise ValueError(f"the models differ in input {value.name!r}")
        same[value] = values[value.name]
    for name, value in other.initializers.items():
        twin = base.initializers.get(name)
        if twin is not None and twin.const_value is value.const_value:
            same[value] = twin
    known = {key: node for node in base if (key := _key(node, {})) is not None}
    for node in other:
        twin_node = known.get(_key(node, same))
        if twin_node is not None and len(twin_node.outputs) == len(node.outputs):
            same.update(zip(node.outputs, twin_node.outputs, strict=True))
    return same


def _key(node: ir.Node, same: dict[ir.Value, ir.Value]) -> Any:
    """Equal for nodes that compute the same; None where that can't be told."""
    plain = (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    attributes = sorted(node.attributes.items())
    if not node.inputs or any(a.type in plain for _, a in attributes):
        return None
    inputs = tuple(v if v is None else same.get(v, v) for v in node.inputs)
    settings = tuple((name, str(a.value)) for name, a in attributes)
    return node.domain, node.op_type, inputs, settings


def _detach(
    graph: ir.Graph, own: Sequence[ir.Node], same: dict[ir.Value, ir.Value]
) -> None:
    """Take all nodes out; the own ones read what is the same elsewhere."""
    graph.outputs.clear()
    for old, new in same.items():
        ir.convenience.replace_all_uses_with(old, new)
    kept = set(own)
    graph.remove([n for n in graph if n not in kept], safe=True)
    graph.remove(own)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [v for node in graph for v in node.outputs]
    return {v.name: v for v in values if v.name}


@dataclass
class Extension:
    """Adds outputs to a merged graph; equal requests share what they need."""

    parts: tuple[ir.Model, list[dict[str, ir.Value]]]
    shapes: Sequence[Shapes]
    feeds: dict[Any, Feed] = field(default_factory=dict)
    outputs: list[ir.Value] = field(default_factory=list)
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def graph(self) -> ir.Graph:
        return self.parts[0].graph

    def grid(self, columns: Columns) -> int:
        """How many positions a sample has."""
        shape = self._shape(columns.value, columns.model)
        if columns.axis == 1 and len(shape) > 2:
            size = shape[2:]
            return prod(columns.window.grid(size) if columns.window else size)
        return prod(shape[:-1]) // self._samples()

    def width(self, columns: Columns) -> int:
        """How many columns these are."""
        shape = self._shape(columns.value, columns.model)
        taps = prod(columns.window.kernel) if columns.window else 1
        return taps * shape[columns.axis if len(shape) > 2 else -1]

    def rows(self, columns: Columns, positions: int) -> Rows:
        """Channel vectors at so many sampled positions, or at all there are."""
        value = self.parts[1][columns.model][columns.value]
        taken = min(self.grid(columns), positions)
        key = (value, columns.axis, columns.window, taken)
        if key not in self.made:
            self.made[key] = self._rows(columns, value, taken)
        made: Rows = self.made[key]
        return made

    def _rows(self, columns: Columns, value: ir.Value, taken: int) -> Rows:
        shape = self._shape(columns.value, columns.model)
        grid = self.grid(columns)
        spatial = columns.axis == 1 and len(shape) > 2
        channels = shape[1] if spatial else shape[-1]
        feed: Feed | None = None
        if (window := columns.window) is not None:
            feed = self._feed(grid, taken, prod(shape[2:]), window, shape[2:])
        elif taken < grid:
            feed = self._feed(grid, taken, grid)
        if spatial:
            value = self._channels_last(value, len(shape))
        flat = self.add("Reshape", [value, self.constant(np.array([-1, channels]))])
        if feed is not None:
            flat = self.add("Gather", [flat, self._value(feed)], axis=0)
        name = self._emit(self._as_float(flat, columns.value, columns.model))
        taps = prod(window.kernel) if window else 1
        return Rows(name, feed.name if feed else "", taken, taps, channels)

    def _channels_last(self, value: ir.Value, rank: int) -> ir.Value:
        """Shared: several windows may read one value."""
        if ("last", value) not in self.made:
            perm = [0, *range(2, rank), 1]
            self.made["last", value] = self.add("Transpose", [value], perm=perm)
        found: ir.Value = self.made["last", value]
        return found

    def _feed(self, grid: int, taken: int, stride: int, *where: Any) -> Feed:
        """One for all values of the same geometry."""
        key = (grid, taken, stride, *where)
        if key not in self.feeds:
            name = f"squeeze/rows/{len(self.feeds)}"
            self.feeds[key] = Feed(name, grid, taken, stride, *where)
            value = ir.Value(
                name=name,
                shape=ir.Shape([f"{name}/{axis}" for axis in range(3)]),
                type=ir.TensorType(ir.DataType.INT64),
            )
            self.graph.inputs.append(value)
            self.made[name] = value
        return self.feeds[key]

    def _value(self, feed: Feed) -> ir.Value:
        found: ir.Value = self.made[feed.name]
        return found

    # sums over all positions

    def sums(self, wanted: Moments) -> dict[str, Sums]:
        """By kind: an output to be summed over the batch."""
        return {kind: self._sums(kind, wanted) for kind in wanted.kinds}

    def rows_per_sample(self, wanted: Moments) -> int:
        shape = self._shape(wanted.value, wanted.model)
        return prod(shape) // shape[wanted.axis % len(shape)] // self._samples()

    def _sums(self, kind: str, wanted: Moments) -> Sums:
        source = self.parts[1][wanted.model][wanted.value]
        key = (kind, source, wanted.axis)
        if key not in self.made:
            shape = self._shape(wanted.value, wanted.model)
            axis = wanted.axis % len(shape)
            value = self._as_float(source, wanted.value, wanted.model)
            value = self._kind(kind, value, shape, axis)
            scale = 1
            if axis == 1 and len(shape) > 2:
                value, scale = self.add("GlobalAveragePool", [value]), prod(shape[2:])
            elif others := [a for a in range(min(axis, 1), len(shape)) if a != axis]:
                value = self._reduced(value, others)
            self.made[key] = Sums(
                self._emit(value), shape[axis], scale, kind == "positive"
            )
        found: Sums = self.made[key]
        return found

    def _kind(
        self, kind: str, value: ir.Value, shape: Sequence[int], axis: int
    ) -> ir.Value:
        """What is to be summed."""
        if kind == "square":
            return self.add("Mul", [value, value])
        if kind == "sum":
            return value
        if axis != 1 or len(shape) != 4:
            return self._cast(
                self.add("Greater", [value, self.constant(np.float32(0))])
            )
        weight = self.constant(np.full((shape[1], 1, 1, 1), STEEP))
        steep = self.add("Conv", [value, weight], group=shape[1])
        if models.opset(self.parts[0]) < 11:
            return self.add("Clip", [steep], min=0.0, max=1.0)
        bounds = [self.constant(np.float32(b)) for b in (0, 1)]
        return self.add("Clip", [steep, *bounds])

    # small parts

    def _samples(self) -> int:
        """The batch that shapes were inferred at."""
        return next(iter(self.shapes[0].inputs.values()))[0]

    def _shape(self, value: str, model: int) -> tuple[int, ...]:
        found = self.shapes[model].shapes.get(value)
        if not found:
            raise SqueezeError(
                f"the shape of {value!r} is unknown: no statistics; pass --input-shape"
            )
        return found

    def _as_float(self, value: ir.Value, name: str, model: int) -> ir.Value:
        """As float32; `name` is of the value that has its type."""
        if self.shapes[model].types.get(name) == ir.DataType.FLOAT:
            return value
        return self._cast(value)

    def _cast(self, value: ir.Value) -> ir.Value:
        return self.add("Cast", [value], to=ir.DataType.FLOAT.value)

    def _emit(self, value: ir.Value) -> str:
        if value.name in self.parts[1][0] or not value.name:  # stays what it is
            value = self.add("Identity", [value])
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.outputs.append(value)
        return value.name or ""

    def constant(self, array: Array | np.generic) -> ir.Value:
        array = np.asarray(array)
        array = array.astype(np.int64) if array.dtype.kind in "iu" else array
        name = f"squeeze/constant/{len(self.graph.initializers)}"
        return models.add_initializer(self.graph, ir.Tensor(array, name=name))

    def add(self, op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(op, list(inputs), attributes)
        self.graph.append(node)
        value = node.outputs[0]
        value.name = f"squeeze/{op}/{len(self.graph)}"
        return value

    def _reduced(self, value: ir.Value, axes: list[int]) -> ir.Value:
        """The axes of ReduceSum are an input since opset 13."""
        if models.opset(self.parts[0]) >= 13:
            axes_input = self.constant(np.array(axes))
            return self.add("ReduceSum", [value, axes_input], keepdims=0)
        return self.add("ReduceSum", [value], axes=axes, keepdims=0)

    def finish(self) -> ir.Model:
        """The graph with these outputs alone, and nothing that they don't need."""
        model = self.parts[0]
        model.graph.outputs.clear()
        model.graph.outputs.extend(self.outputs)
        passes.RemoveUnusedNodesPass()(model)
        return model
