"""Which channels must go together: labels moved through the graph by a table of ops.

Every axis of every value carries one label per index (`labels`). Each use of a
constant brings fresh labels; the rows of `table` move and join them. What ends up
joined is a *unit*; units that compete with one another, through the output axes of
the layers that make them, form a *family*; a *sink* is a place where a contraction
sums over a unit, so that its channel can vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from squeeze.cost import ops
from squeeze.model import constant, node_name, opset
from squeeze.rewrite.channels.labels import Labels
from squeeze.rewrite.channels.prepare import Prepared
from squeeze.shapes import Shapes

Array = NDArray[Any]
Axes = tuple[Array, ...]


class Barrier(Exception):
    """Raised by a row that can't follow its node; the message is the reason."""


@dataclass(frozen=True)
class Contraction:
    """A node that multiplies and sums.

    `letters` are the labels that its MACs are proportional to, `vanishing` the letters
    it sums over, `places` the (operand, axis) of every letter. `macs` at full size.
    """

    node: ir.Node
    macs: int
    letters: Mapping[str, Array]
    vanishing: frozenset[str]
    places: Mapping[str, tuple[tuple[int, int], ...]]
    padded: bool = False


@dataclass(frozen=True)
class Sink:
    """A sum over channels: `labels` are those of its letter, read at `places`."""

    node: ir.Node
    labels: Array
    places: tuple[tuple[int, int], ...]
    padded: bool


@dataclass(frozen=True)
class Producer:
    """An axis of a weight that makes channels: the layer's outputs."""

    node: ir.Node
    operand: int
    axis: int
    labels: Array


@dataclass(frozen=True)
class Statistic:
    """A node that reads a statistic over channels: removal under it is inexact."""

    node: ir.Node
    labels: Array


@dataclass(frozen=True)
class Blocked:
    """A node that no channel is followed through, and why."""

    name: str
    op: str
    reason: str


@dataclass
class Tracer:
    """State of one trace; the rows of the table work on it."""

    shapes: Shapes
    probe: Shapes
    opset: int
    attention: str = "dims"
    labels: Labels = field(default_factory=Labels)
    axes: dict[ir.Value, Axes] = field(default_factory=dict)
    uses: dict[tuple[ir.Node, int], Axes] = field(default_factory=dict)
    derived: set[ir.Value] = field(default_factory=set)
    contractions: list[Contraction] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    barriers: list[Blocked] = field(default_factory=list)
    groups: dict[ir.Node, Array] = field(default_factory=dict)
    sizes: dict[ir.Value | None, tuple[int, ...] | None] = field(default_factory=dict)

    # -- reading and writing -------------------------------------------------------

    def has(self, node: ir.Node, index: int) -> bool:
        return index < len(node.inputs) and node.inputs[index] is not None

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        if value not in self.sizes:
            self.sizes[value] = self.shapes.of(value)
        shape = self.sizes[value]
        if shape is None:
            raise Barrier("a shape that is unknown")
        return shape

    def is_dynamic(self, value: ir.Value, axis: int) -> bool:
        """Whether the size of an axis depends on the shapes of the inputs."""
        other = self.probe.of(value)
        return other is None or other[axis] != self.shape(value)[axis]

    def is_constant(self, node: ir.Node, index: int) -> bool:
        value = node.inputs[index]
        assert value is not None
        return value.const_value is not None or value in self.derived

    def read(self, node: ir.Node, index: int, pin: Iterable[int] = ()) -> Axes:
        """Labels of an input: fresh ones at every use of a constant.

        Axes in `pin` can't shrink here (kernels): a constant's get no labels there,
        an activation's are protected.
        """
        value = node.inputs[index]
        assert value is not None
        if value.const_value is None:
            if value not in self.axes:
                raise Barrier("a value from outside the graph")
            axes = self.axes[value]
            for axis in pin:
                self.labels.protect(axes[axis], f"read as space by {node_name(node)}")
            return axes
        shape, pinned = self.shape(value), set(pin)
        axes = tuple(
            self.labels.plain(n) if n == 1 or i in pinned else self.labels.fresh(n)
            for i, n in enumerate(shape)
        )
        self.uses[node, index] = axes
        return axes

    def write(self, node: ir.Node, axes: Sequence[Array], index: int = 0) -> None:
        """Set the labels of an output. Axes whose length doesn't fit are a barrier."""
        value = node.outputs[index]
        shape = self.shape(value)
        if tuple(map(len, axes)) != shape:
            raise Barrier(
                f"labels of {[len(a) for a in axes]} for a shape {list(shape)}"
            )
        for labels in axes:
            if len(labels) == 1 and labels[0] > 0:  # no axis may become empty
                self.labels.protect(labels, f"the only channel of {value.name}")
        self.axes[value] = tuple(
            self.labels.plain(1) if len(labels) == 1 else labels for labels in axes
        )
        if all(self.is_constant(node, i) for i, v in enumerate(node.inputs) if v):
            self.derived.add(value)

    def plain(self, value: ir.Value) -> Axes:
        return tuple(self.labels.plain(n) for n in self.shape(value))

    # -- joining -------------------------------------------------------------------

    def broadcast(self, operands: Sequence[Axes]) -> list[Array]:
        """Labels of an elementwise result: operands aligned at the last axis."""
        rank = max(map(len, operands))
        result: list[Array] = [self.labels.plain(1)] * rank
        for axes in operands:
            for axis, labels in enumerate(axes, rank - len(axes)):
                if len(labels) == 1:
                    continue
                if len(result[axis]) == 1:
                    result[axis] = labels
                else:
                    self.labels.unite(result[axis], labels)
        return result

    def statistic(self, node: ir.Node, labels: Array) -> None:
        if labels.any():
            self.statistics.append(Statistic(node, labels))

    def contract(
        self,
        node: ir.Node,
        patterns: Sequence[str | Sequence[str]],
        output: str | Sequence[str],
    ) -> None:
        """Apply an equation of letters (like einsum's) to a node and set its output.

        Equal letters are united; those of the output are carried on; those that
        vanish are sinks; `*` is pinned; `…` stands for leading broadcast axes.
        """
        table: dict[str, Array] = {}
        places: dict[str, list[tuple[int, int]]] = {}
        for index, pattern in enumerate(patterns):
            if not self.has(node, index):
                continue
            rank = len(self.shape(node.inputs[index]))
            names = spell(pattern, rank)
            spatial = [i for i, name in enumerate(names) if name == "*"]
            for axis, labels in enumerate(self.read(node, index, spatial)):
                if axis not in spatial:
                    self._join(table, names[axis], labels)
                    places.setdefault(names[axis], []).append((index, axis))
        shape = self.shape(node.outputs[0])
        carried = spell(output, len(shape))
        out = [
            self.labels.plain(n) if name == "*" else table[name]
            for name, n in zip(carried, shape, strict=True)
        ]
        self.write(node, out)
        self.record(node, table, places, frozenset(table) - frozenset(carried))

    def _join(self, table: dict[str, Array], name: str, labels: Array) -> None:
        known = table.get(name)
        if known is None or len(known) == 1:
            table[name] = labels
        elif len(labels) > 1:
            self.labels.unite(known, labels)

    def record(
        self,
        node: ir.Node,
        letters: Mapping[str, Array],
        places: Mapping[str, Sequence[tuple[int, int]]],
        vanishing: frozenset[str],
    ) -> None:
        """Note a contraction: its sinks, and the axes of weights that it carries."""
        if node.op_type not in ops.CONTRACTIONS:
            return
        cost = ops.cost(node, self.shapes)
        fixed = {k: tuple(v) for k, v in places.items()}
        labelled = {k: v for k, v in letters.items() if v.any()}
        padded = is_padded(node)
        self.contractions.append(
            Contraction(
                node, cost[0] if cost else 0, labelled, vanishing, fixed, padded
            )
        )
        for name in sorted(vanishing & labelled.keys()):
            self.sinks.append(Sink(node, labelled[name], fixed[name], padded))
        for name, labels in labelled.items():
            for operand, axis in fixed[name]:
                sums = any(o == operand for v in vanishing for o, _ in fixed[v])
                if name not in vanishing and sums and self.is_constant(node, operand):
                    self.producers.append(Producer(node, operand, axis, labels))

    def embed(self, node: ir.Node, index: int, axis: int, labels: Array) -> None:
        """Note a table that channels are looked up in, as in an embedding."""
        self.producers.append(Producer(node, index, axis, labels))

    def block(self, node: ir.Node, reason: str) -> None:
        """Follow nothing through a node: protect what it reads, pin what it writes."""
        text = f"{node.op_type} {node_name(node)}: {reason}"
        read = [a for value in captured(node) for a in self.axes.get(value, ())]
        if any((labels > 0).any() for labels in read):
            self.barriers.append(Blocked(node_name(node), node.op_type, reason))
        for index in range(len(node.inputs)):
            read.extend(self.uses.get((node, index), ()))
        for labels in read:
            self.labels.protect(labels, text)
        for value in node.outputs:
            shape = self.shapes.of(value)
            if shape is not None:
                self.axes[value] = tuple(self.labels.pinned(n, text) for n in shape)


def spell(pattern: str | Sequence[str], rank: int) -> list[str]:
    """One letter per axis: a leading … and a trailing * take what the rank leaves."""
    names = list(pattern)
    if "…" in names:
        head = rank - len(names) + 1
        dots = [f"…{i}" for i in range(head, 0, -1)]
        at = names.index("…")
        return names[:at] + dots + names[at + 1 :]
    if names and names[-1] == "*":
        return names[:-1] + ["*"] * (rank - len(names) + 1)
    return names


def is_padded(node: ir.Node) -> bool:
    """Whether zeros from outside the input enter the node's sums."""
    pads = node.attributes.get_ints("pads", ()) or ()
    automatic = node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET"
    transposed = node.op_type == "ConvTranspose"  # its border sums miss taps
    return any(pads) or automatic.startswith("SAME") or transposed


def captured(node: ir.Node) -> Iterable[ir.Value]:
    """What a node reads, values that its bodies take from outside included."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from captured(inner)
            yield from attribute.as_graph().outputs


def integers(node: ir.Node, index: int, what: str) -> list[int]:
    """Integers of a constant input; a barrier where it is computed."""
    array = constant(node, index)
    if array is None:
        raise Barrier(f"{what} computed while it runs")
    return [int(n) for n in array.reshape(-1)]


# -- the finished trace ---------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Units that compete: `cells` are those that lie on exactly the same axes."""

    index: int
    producers: tuple[Producer, ...]
    cells: tuple[Array, ...]

    @cached_property
    def units(self) -> Array:
        return np.concatenate(self.cells)

    @property
    def name(self) -> str:
        return node_name(self.producers[0].node)


@dataclass(frozen=True)
class Trace:
    """Labels of a whole graph. A unit is known by its root label."""

    model: ir.Model
    shapes: Shapes
    probe: Shapes
    root: Array
    why: Mapping[int, str]
    axes: Mapping[ir.Value, Axes]
    uses: Mapping[tuple[ir.Node, int], Axes]
    contractions: tuple[Contraction, ...]
    sinks: tuple[Sink, ...]
    producers: tuple[Producer, ...]
    statistics: tuple[Statistic, ...]
    barriers: tuple[Blocked, ...]
    groups: Mapping[ir.Node, Array]
    notes: tuple[str, ...] = ()

    def units(self, labels: Array) -> Array:
        """The unit of each label; 0 where it is pinned or protected."""
        return self._unit[np.maximum(labels, 0)]

    @cached_property
    def _unit(self) -> Array:
        unit = self.root.copy()
        protected = np.zeros(len(unit), bool)
        protected[list(self.why)] = True
        unit[protected[np.maximum(unit, 0)]] = 0
        return unit

    @cached_property
    def inexact(self) -> Array:
        """By unit: whether a statistic over channels reads it."""
        found = np.zeros(len(self.root), bool)
        for statistic in self.statistics:
            found[self.units(statistic.labels)] = True
        found[0] = False
        return found

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Free units that a layer makes, joined where one layer makes both."""
        made = [np.unique(self.units(p.labels)) for p in self.producers]
        made = [units[units > 0] for units in made]
        counts = [len(units) for units in made]
        units = np.concatenate([*made, np.zeros(0, np.int64)])
        owners = np.repeat(np.arange(len(made)), counts)
        joined = Labels()
        joined.fresh(len(self.root))
        joined.unite(units, np.repeat([u[0] if len(u) else 0 for u in made], counts))
        order = np.lexsort((owners, units))
        units, owners = units[order], owners[order]
        starts = np.flatnonzero(np.diff(units, prepend=-1))
        bounds = pairwise([*starts.tolist(), len(owners)])
        makers_of = [owners[a:b].tobytes() for a, b in bounds]
        first, units = owners[starts], units[starts]
        names, roots = units.tolist(), joined.find(units).tolist()
        cells: dict[int, dict[bytes, list[int]]] = {}
        for i in np.lexsort((units, first)).tolist():
            cells.setdefault(roots[i], {}).setdefault(makers_of[i], []).append(names[i])
        makers: dict[int, list[Producer]] = {}
        for producer, own in zip(self.producers, made, strict=True):
            if len(own):
                root = int(joined.find(own[:1])[0])
                makers.setdefault(root, []).append(producer)
        return tuple(
            Family(i, tuple(makers[root]), tuple(np.array(c) for c in groups.values()))
            for i, (root, groups) in enumerate(cells.items())
        )

    @cached_property
    def full(self) -> Array:
        """The mask that keeps every unit."""
        return np.ones(len(self.root), bool)

    def mask(self, labels: Array, keep: Array) -> Array:
        """Which indices of an axis stay, `keep` by unit."""
        kept: Array = keep[self.units(labels)]
        return kept

    def size(self, labels: Array, keep: Array) -> int:
        return int(self.mask(labels, keep).sum())

    @cached_property
    def total(self) -> int:
        """MACs of the whole model, the nodes that nothing is known of included."""
        costs = (ops.cost(node, self.shapes) for node in self.model.graph)
        return sum(cost[0] for cost in costs if cost)

    @cached_property
    def _traced(self) -> int:
        return sum(c.macs for c in self.contractions)

    @cached_property
    def weights(self) -> tuple[tuple[int, Axes], ...]:
        """(elements, labels) of every weight that counts as a parameter, once each."""
        found: dict[ir.Value, tuple[int, Axes]] = {}
        for (node, index), axes in self.uses.items():
            value = node.inputs[index]
            skipped = index in ops.ARITHMETIC_INPUTS.get(node.op_type, ())
            if value is None or value.const_value is None or skipped:
                continue
            tensor = value.const_value
            if tensor.size > 1 and tensor.dtype.is_floating_point():
                found.setdefault(value, (tensor.size, axes))
        return tuple(found.values())

    def params(self, keep: Array) -> int:
        """Parameters that would remain of the weights that labels reach."""
        return sum(prod(self.size(a, keep) for a in axes) for _, axes in self.weights)

    def macs(self, keep: Array) -> int:
        """MACs of the whole model that would remain."""
        total = self.total - self._traced
        for c in self.contractions:
            kept = prod(self.size(v, keep) for v in c.letters.values())
            total += c.macs * kept // max(1, prod(len(v) for v in c.letters.values()))
        return total


def trace(prepared: Prepared, attention: str = "dims") -> Trace:
    """Trace a prepared model, which is not changed."""
    from squeeze.rewrite.channels.table import TABLE

    model, shapes = prepared.model, prepared.shapes
    tracer = Tracer(shapes, prepared.probe, opset(model), attention)
    for value in model.graph.inputs:
        shape = shapes.of(value)
        if shape is not None:
            reason = f"network input {value.name}"
            tracer.axes[value] = tuple(tracer.labels.pinned(n, reason) for n in shape)
    for node in model.graph:
        row = TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if row is None:
            tracer.block(node, "no way through this op is known")
            continue
        try:
            row.trace(tracer, node)
        except Barrier as barrier:
            tracer.block(node, str(barrier))
    for value in model.graph.outputs:
        for labels in tracer.axes.get(value, ()):
            tracer.labels.protect(labels, f"network output {value.name}")
    _protect_shape_readers(model, tracer)
    return Trace(
        model=model,
        shapes=shapes,
        probe=prepared.probe,
        root=tracer.labels.roots(),
        why=tracer.labels.reasons(),
        axes=tracer.axes,
        uses=tracer.uses,
        contractions=tuple(tracer.contractions),
        sinks=tuple(tracer.sinks),
        producers=tuple(tracer.producers),
        statistics=tuple(tracer.statistics),
        barriers=tuple(tracer.barriers),
        groups=tracer.groups,
        notes=prepared.notes,
    )


# where a shape computed at run time may end: removal overrides these targets
OVERRIDDEN = {("Reshape", 1), ("Expand", 1)}
ARITHMETIC = frozenset(
    """Gather Slice Concat Cast Squeeze Unsqueeze Add Sub Mul Div Mod Identity Where
    Equal ConstantOfShape ReduceProd Reshape Min Max Neg Range Floor Ceil""".split()
)


def _protect_shape_readers(model: ir.Model, tracer: Tracer) -> None:
    """A `Shape` that is not constant may only tell Reshape and Expand their targets."""
    for node in model.graph:
        if node.op_type in ("Shape", "Size") and not node.domain:
            value = node.inputs[0]
            if value is not None and not _ends_in_targets(node):
                for labels in tracer.axes.get(value, ()):
                    tracer.labels.protect(
                        labels, f"its size is read by {node_name(node)}"
                    )


def _ends_in_targets(node: ir.Node) -> bool:
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        for value in current.outputs:
            if value.is_graph_output():
                return False
            for user, index in value.uses():
                if (user.op_type, index) in OVERRIDDEN and not user.domain:
                    continue
                if user.op_type not in ARITHMETIC or user.domain:
                    return False
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
    return True
