"""Building a block at a site: a fragment of real nodes with new weights.

Kernels, pads and dilations follow from the site. A layer that strides picks its pads
so that the site's output size comes out, at every size the site must work for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import onnx_ir as ir

from squeeze.cost.layers import count
from squeeze.rewrite.blocks import ALL_AXES, AXIS_NAMES, NAMED_ACTIVATIONS, Layer, Rule
from squeeze.rewrite.expressions import Value
from squeeze.rewrite.plan import Cost
from squeeze.rewrite.sites import Site, Sizes, windows
from squeeze.shapes import Shapes


class Refused(Exception):
    """The block can't go here; the message is the reason that the report prints."""


@dataclass(frozen=True)
class Fragment:
    """A built block: nodes from `input` to `output`, and what they cost.

    `settings` are the parameters it was built with.
    """

    nodes: tuple[ir.Node, ...]
    input: ir.Value
    output: ir.Value
    weights: tuple[ir.Value, ...]
    cost: Cost
    settings: Mapping[str, Value]
    shapes: Shapes


@dataclass(frozen=True)
class _State:
    """A value inside the block: its channels and its size on each axis."""

    value: ir.Value
    channels: int
    sizes: tuple[Sizes, ...]


def build(
    rule: Rule, site: Site, settings: Mapping[str, Value], seed: int = 0
) -> Fragment:
    """The block at this site; Refused with the reason where it doesn't fit."""
    names = rule.names(site, settings)
    if reason := rule.refusal(names):
        raise Refused(reason)
    builder = _Builder(site, names, f"{site.name}/{rule.name}", seed)
    present = [one for one in rule.layers if one.when is None or one.when(names)]
    for index, layer in enumerate(present, 1):
        builder.layer(layer, present[index:])
    return builder.finish(settings)


def lazy_weight(
    name: str,
    shape: tuple[int, ...],
    dtype: ir.DataType,
    array: Callable[[], np.ndarray],
) -> ir.Value:
    """A weight that takes memory when it is used."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(array().astype(dtype.numpy()), dtype=dtype, name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    return ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(dtype),
        const_value=tensor,
    )


class _Builder:
    """Keeps the fragment while its layers are added in turn."""

    def __init__(
        self, site: Site, names: Mapping[str, Value], prefix: str, seed: int
    ) -> None:
        self.site, self.names, self.prefix, self.seed = site, names, prefix, seed
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        sizes = tuple(axis.sizes for axis in site.axes)
        self.input = self.state(ir.Value(name=f"{prefix}/input"), site.cin, sizes)
        self.previous = self.input
        self.by_id: dict[str, _State] = {}

    # -- parts --

    def state(self, value: ir.Value, channels: int, sizes: tuple[Sizes, ...]) -> _State:
        value.type = ir.TensorType(self.site.dtype)
        self.shapes[value.name or ""] = (1, channels, *(int(s[0]) for s in sizes))
        return _State(value, channels, sizes)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        channels: int,
        sizes: tuple[Sizes, ...],
        domain: str = "",
    ) -> _State:
        name = f"{self.prefix}/{len(self.nodes) + 1}_{op}"
        node = ir.node(op, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}_out"
        self.nodes.append(node)
        return self.state(node.outputs[0], channels, sizes)

    def weight(
        self, array: Callable[[], np.ndarray], shape: tuple[int, ...], role: str
    ) -> ir.Value:
        name = f"{self.prefix}/{len(self.nodes) + 1}.{role}"
        value = lazy_weight(name, shape, self.site.dtype, array)
        self.weights.append(value)
        self.shapes[name] = shape
        return value

    def axes(self, chosen: tuple[str, ...] | str) -> set[int]:
        """Positions of the named axes among the site's."""
        rank = len(self.site.axes)
        letters = AXIS_NAMES[-rank:]
        if chosen == ALL_AXES:
            return set(range(rank))
        missing = [a for a in chosen if a not in letters]
        if missing:
            raise Refused(f"the block needs axis {missing[0]!r}, the site has {rank}")
        return {letters.index(a) for a in chosen}

    # -- layers --

    def layer(self, layer: Layer, later: Sequence[Layer]) -> None:
        sources = [self.source(name) for name in layer.sources]
        if layer.op == "Conv":
            state = self.conv(layer, sources[0], later)
        elif layer.op in ("MaxPool", "AveragePool"):
            state = self.pool(layer, sources[0])
        elif layer.op == "Activation":
            inner = any(one.op == "Conv" for one in later)
            state = self.activation(sources[0], inner, layer.otherwise)
        elif layer.op == "ChannelShuffle":
            state = self.shuffle(sources[0], layer.numbers["group"].integer(self.names))
        elif layer.op == "GlobalAveragePool":
            ones = tuple(np.ones_like(s) for s in sources[0].sizes)
            state = self.node(
                layer.op, [sources[0].value], {}, sources[0].channels, ones
            )
        elif layer.op in NAMED_ACTIVATIONS:
            numbers = {k: float(e(self.names)) for k, e in layer.attributes.items()}
            state = self.elementwise(layer.op, sources, numbers)
        elif layer.op == "Concat":
            state = self.concat(sources)
        else:
            state = self.elementwise(layer.op, sources, {})
        self.previous = state
        if layer.id:
            self.by_id[layer.id] = state

    def source(self, name: str) -> _State:
        if name == "previous":
            return self.previous
        return self.input if name == "input" else self.by_id[name]

    def conv(self, layer: Layer, source: _State, later: Sequence[Layer]) -> _State:
        out = layer.numbers["out"].integer(self.names)
        group = (
            layer.numbers["group"].integer(self.names)
            if "group" in layer.numbers
            else 1
        )
        if out < 1 or group < 1 or source.channels % group or out % group:
            raise Refused(
                f"{source.channels} channels to {out} don't divide into {group} groups"
            )
        kernel, pads, strides, dilations, sizes = self.geometry(layer, source)
        attributes = dict(
            kernel_shape=kernel,
            pads=[p[0] for p in pads] + [p[1] for p in pads],
            strides=strides,
            dilations=dilations,
            group=group,
        )
        acts = bool(later) and _activates(later[0], bool(self.site.activation), later)
        biased = acts or not any(one.op == "Conv" for one in later)
        parts = out // group if group == source.channels > 1 else 1
        made = [
            self.one_conv(
                source, out // parts, group, kernel, attributes, biased, acts, sizes
            )
            for _ in range(parts)
        ]
        return made[0] if parts == 1 else self.concat(made)

    def one_conv(
        self,
        source: _State,
        out: int,
        group: int,
        kernel: list[int],
        attributes: Mapping[str, Any],
        biased: bool,
        acts: bool,
        sizes: tuple[Sizes, ...],
    ) -> _State:
        """Weights with variance gain / fan-in keep the scale of the activations."""
        shape = (out, source.channels // group, *kernel)
        scale = np.sqrt((2 if acts else 1) / prod(shape[1:]))
        name = f"{self.prefix}/{len(self.nodes) + 1}"
        seed = [self.seed, crc32(name.encode())]

        def drawn() -> np.ndarray:  # the same at every reading of the lazy tensor
            return np.random.default_rng(seed).standard_normal(shape) * float(scale)

        weight = self.weight(drawn, shape, "weight")
        bias = self.weight(lambda: np.zeros(out), (out,), "bias") if biased else None
        inputs = [source.value, weight, *([bias] if bias is not None else [])]
        return self.node("Conv", inputs, attributes, out, sizes)

    def geometry(
        self, layer: Layer, source: _State
    ) -> tuple[
        list[int], list[tuple[int, int]], list[int], list[int], tuple[Sizes, ...]
    ]:
        """Kernel, pads, strides, dilations and output sizes, axis by axis."""
        window, stride = self.axes(layer.window), self.axes(layer.stride)
        if layer.kernel and len(layer.kernel) != len(self.site.axes):
            raise Refused(
                f"kernel has {len(layer.kernel)} sizes, the site has other axes"
            )
        columns = []
        for i, axis in enumerate(self.site.axes):
            kernel = axis.kernel if i in window else 1
            dilation = axis.dilation if i in window else 1
            if layer.kernel:
                kernel = layer.kernel[i].integer(self.names)
            step = axis.stride if i in stride else 1
            pads = axis.pads if i in window else (0, 0)
            span = (kernel - 1) * dilation + 1
            if step > 1:
                pads = _fitting_pads(
                    source.sizes[i], axis.targets, span, step, pads, kernel
                )
            sizes = windows(source.sizes[i], span, step, pads)
            if (sizes < 1).any():
                raise Refused(f"nothing is left of {source.sizes[i].min()} positions")
            columns.append((kernel, pads, step, dilation, sizes))
        kernels, paddings, steps, dilations, results = zip(*columns, strict=True)
        return list(kernels), list(paddings), list(steps), list(dilations), results

    def pool(self, layer: Layer, source: _State) -> _State:
        """Pools by the stride it takes; absent where that is 1."""
        chosen = self.axes(layer.stride)
        strides = [a.stride if i in chosen else 1 for i, a in enumerate(self.site.axes)]
        if prod(strides) == 1:
            return source
        pads, sizes = [], []
        for i, axis in enumerate(self.site.axes):
            fitted = (0, 0)
            if strides[i] > 1:
                fitted = _fitting_pads(
                    source.sizes[i],
                    axis.targets,
                    strides[i],
                    strides[i],
                    (0, 0),
                    strides[i],
                )
            pads.append(fitted)
            sizes.append(windows(source.sizes[i], strides[i], strides[i], fitted))
        attributes = dict(
            kernel_shape=strides,
            strides=strides,
            pads=[p[0] for p in pads] + [p[1] for p in pads],
        )
        return self.node(
            layer.op, [source.value], attributes, source.channels, tuple(sizes)
        )

    def activation(self, source: _State, inner: bool, otherwise: str) -> _State:
        """The site's own; a linear site has none at its end, ReLU or `else` inside."""
        if not self.site.activation:
            if not inner:
                return source
            return self.elementwise(otherwise or "Relu", [source], {})
        entry = self.site.activation[0].inputs[0]
        mapped = {entry: source.value}
        for node in self.site.activation:
            inputs = [mapped.get(v, v) for v in node.inputs]
            state = self.node(
                node.op_type,
                inputs,
                node.attributes,
                source.channels,
                source.sizes,
                node.domain,
            )
            mapped[node.outputs[0]] = state.value
        return state

    def elementwise(
        self, op: str, sources: Sequence[_State], attributes: Mapping[str, Any]
    ) -> _State:
        first = max(sources, key=lambda s: prod(int(n[0]) for n in s.sizes))
        for other in sources:
            gate = all((s == 1).all() for s in other.sizes)
            same = all(
                np.array_equal(a, b)
                for a, b in zip(first.sizes, other.sizes, strict=True)
            )
            if other.channels != first.channels or not (same or gate):
                raise Refused(f"{op} of different shapes")
        values = [s.value for s in sources]
        return self.node(op, values, attributes, first.channels, first.sizes)

    def concat(self, sources: Sequence[_State]) -> _State:
        for other in sources[1:]:
            if any(
                (a != b).any()
                for a, b in zip(sources[0].sizes, other.sizes, strict=True)
            ):
                raise Refused("Concat of different sizes")
        channels = sum(s.channels for s in sources)
        values = [s.value for s in sources]
        return self.node("Concat", values, {"axis": 1}, channels, sources[0].sizes)

    def shuffle(self, source: _State, group: int) -> _State:
        """Channel shuffle (ShuffleNet) as one Gather: it copies whole planes."""
        if group < 1 or source.channels % group:
            raise Refused(
                f"{source.channels} channels don't divide into {group} groups"
            )
        if group == 1:
            return source
        order = np.arange(source.channels).reshape(group, -1).T.reshape(-1)
        name = f"{self.prefix}/{len(self.nodes) + 1}.order"
        indices = ir.Value(
            name=name,
            shape=ir.Shape(order.shape),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.Tensor(order, name=name),
        )
        self.weights.append(indices)
        inputs = [source.value, indices]
        return self.node("Gather", inputs, {"axis": 1}, source.channels, source.sizes)

    # -- the end --

    def finish(self, settings: Mapping[str, Value]) -> Fragment:
        self.check_output()
        shapes = Shapes(self.shapes, {}, {})
        return Fragment(
            nodes=tuple(self.nodes),
            input=self.input.value,
            output=self.previous.value,
            weights=tuple(self.weights),
            cost=Cost(*count(self.nodes, shapes)),
            settings=settings,
            shapes=shapes,
        )

    def check_output(self) -> None:
        end, site = self.previous, self.site
        if not self.nodes:
            raise Refused("the block has no layer at this site")
        got = (end.channels, *(int(s[0]) for s in end.sizes))
        wanted = (site.cout, *(int(a.targets[0]) for a in site.axes))
        if got != wanted:
            texts = ["×".join(str(n) for n in shape) for shape in (got, wanted)]
            raise Refused(
                f"the block's output {texts[0]} differs from the site's {texts[1]}"
            )
        if any(
            (s != a.targets).any() for s, a in zip(end.sizes, site.axes, strict=True)
        ):
            raise Refused("no one set of pads fits every input size")


def _activates(following: Layer, site_acts: bool, later: Sequence[Layer]) -> bool:
    """Whether an activation follows directly."""
    if following.op == "Activation":
        return site_acts or any(one.op == "Conv" for one in later[1:])
    return following.op in NAMED_ACTIVATIONS


def _fitting_pads(
    sizes: Sizes,
    targets: Sizes,
    span: int,
    stride: int,
    pads: tuple[int, int],
    kernel: int,
) -> tuple[int, int]:
    """Pads nearest to `pads` that give the target at every size: only the end moves."""
    if sizes.shape != targets.shape:
        raise Refused("the block changes the size before it strides")
    needed = (targets - 1) * stride + span - sizes - pads[0]
    low, high = int(needed.max()), int(needed.min()) + stride - 1
    low = max(low, 0)
    if low > high:
        raise Refused(
            f"no pads bring {sizes[0]} positions to {targets[0]} with stride {stride}"
            + (" at every size" if len(sizes) > 1 else "")
        )
    end = min(max(pads[1], low), high)
    if end >= max(span, 1) and end > pads[1]:
        raise Refused(f"a whole window of padding would be needed (kernel {kernel})")
    return pads[0], end


# -- putting it in ------------------------------------------------------------------


class Place(Protocol):
    """Nodes in a row that a fragment can replace."""

    @property
    def nodes(self) -> tuple[ir.Node, ...]: ...

    @property
    def input(self) -> ir.Value: ...


def graft(graph: ir.Graph, site: Place, fragment: Fragment) -> None:
    """Replace the site's nodes by the fragment; the output value keeps its name."""
    attach(graph, site, fragment)
    settle(graph, site, fragment)


def attach(graph: ir.Graph, site: Place, fragment: Fragment) -> None:
    """Put the fragment beside the site: it reads the same input, nothing reads it."""
    taken = {v.name for v in graph.initializers.values()}
    nodes = list(graph)
    taken |= {v.name for n in nodes for v in n.outputs} | {v.name for v in graph.inputs}
    for value in (*fragment.weights, *(v for n in fragment.nodes for v in n.outputs)):
        _make_unique(value, taken)
    for value in fragment.weights:
        graph.register_initializer(value)
    fragment.input.replace_all_uses_with(site.input)
    graph.insert_after(site.nodes[-1], fragment.nodes)


def settle(graph: ir.Graph, site: Place, fragment: Fragment) -> None:
    """Let an attached fragment take the site's place."""
    old = site.nodes
    inputs = [v for node in old for v in node.inputs if v is not None]
    last = old[-1]
    graph.remove(fragment.nodes)
    ir.convenience.replace_nodes_and_values(
        graph, last, old, fragment.nodes, [last.outputs[0]], [fragment.output]
    )
    drop_unused(graph, inputs)


def _make_unique(value: ir.Value, taken: set[str | None]) -> None:
    stem, number = value.name, 1
    while value.name in taken:
        number += 1
        value.name = f"{stem}_{number}"
        if value.const_value is not None:
            value.const_value.name = value.name
    taken.add(value.name)


def drop_unused(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    """Take initializers out that nothing reads any more."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "", None)
