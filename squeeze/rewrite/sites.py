"""Sites: convolutions with what surrounds them, where a block can go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from squeeze.cost.ops import CONTRACTIONS
from squeeze.model import node_name
from squeeze.shapes import Shapes, is_dynamic

Sizes = np.ndarray  # (n,) int64: the size in hand first, then others it must fit
CONVOLUTIONS = ("Conv", "QLinearConv", "ConvInteger")
ACTIVATIONS = frozenset(
    """Relu LeakyRelu Clip Sigmoid Tanh HardSigmoid HardSwish Elu Selu Celu Softplus
    Softsign ThresholdedRelu Gelu Mish PRelu Swish""".split()
)
GATES = ("Sigmoid", "HardSigmoid")  # x · gate(x): SiLU and HardSwish, as exported


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a site. `stride` is the convolution's times the pool's.

    `sizes` and `targets` run over every input size that the axis must work for: one
    where it is static, several periods of the strides where it is dynamic.
    """

    sizes: Sizes
    targets: Sizes
    kernel: int
    dilation: int
    stride: int
    pads: tuple[int, int]

    @property
    def span(self) -> int:
        """Input positions from a window's first to its last, both included."""
        return (self.kernel - 1) * self.dilation + 1


@dataclass(frozen=True)
class Pool:
    """A max-pool behind the convolution, and the axes as they are with it absorbed."""

    node: ir.Node
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Site:
    """A standard convolution with its BatchNormalization, activation and pool.

    Axes are named d, h, w from the left of the last ones, so 1-D has w only.
    """

    conv: ir.Node
    batch_norm: ir.Node | None
    activation: tuple[ir.Node, ...]
    pool: Pool | None
    absorbed: bool
    cin: int
    cout: int
    group: int
    axes: tuple[Axis, ...]
    first: bool

    @property
    def name(self) -> str:
        return node_name(self.conv)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """What a block at this site replaces, in order."""
        tail = (self.pool.node,) if self.pool and self.absorbed else ()
        normed = (self.batch_norm,) if self.batch_norm else ()
        return (self.conv, *normed, *self.activation, *tail)

    @property
    def input(self) -> ir.Value:
        value = self.conv.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]

    @property
    def dtype(self) -> ir.DataType:
        weight = self.conv.inputs[1]
        assert weight is not None and weight.const_value is not None
        return weight.const_value.dtype

    @property
    def same_shape(self) -> bool:
        return self.cin == self.cout and all(
            np.array_equal(a.sizes, a.targets) for a in self.axes
        )

    def with_pool(self, absorb: bool) -> Site:
        """This site with its pool taken in, where there is one."""
        if not absorb or self.pool is None:
            return self
        return replace(self, axes=self.pool.axes, absorbed=True)


@dataclass(frozen=True)
class Candidate:
    """A convolution: a site, or the reason why it can't be one."""

    node: ir.Node
    name: str
    site: Site | None
    reason: str = ""


def find(model: ir.Model, shapes: Shapes) -> list[Candidate]:
    """Every convolution of the model, in graph order, those in bodies last."""
    preceded = _preceded(model.graph)
    dynamic = is_dynamic(model)
    found: list[Candidate] = []
    for node in model.graph:
        if node.op_type in CONVOLUTIONS and node.domain in ("", "ai.onnx"):
            reason = _refusal(node, shapes)
            site = None
            if not reason:
                site, reason = _site(node, shapes, dynamic, node not in preceded)
            found.append(Candidate(node, node_name(node), site, reason))
    for node in _inner_nodes(model.graph):
        if node.op_type in CONVOLUTIONS:
            reason = "inside a subgraph (If, Loop or Scan)"
            found.append(Candidate(node, node_name(node), None, reason))
    return found


def _inner_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                body = attribute.as_graph()
                yield from body
                yield from _inner_nodes(body)


def _preceded(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that some layer with weights comes before."""
    after: set[ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and (producer in after or _has_weights(producer)):
                after.add(node)
    return after


def _has_weights(node: ir.Node) -> bool:
    return node.op_type in CONTRACTIONS and any(
        _constant(v) or _dequantized(v) for v in node.inputs[1:]
    )


def _constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _refusal(node: ir.Node, shapes: Shapes) -> str:
    if node.op_type != "Conv" or any(_dequantized(v) for v in node.inputs[:2]):
        return "quantised; convert the float model, then quantise"
    if not all(v is None or _constant(v) for v in node.inputs[1:]):
        return "its weights are not constant"
    if node.inputs[0] is None or shapes.of(node.inputs[0]) is None:
        return "the shape of its input is unknown; pass --input-shape"
    if shapes.of(node.outputs[0]) is None:
        return "the shape of its output is unknown; pass --input-shape"
    return ""


# -- one site -----------------------------------------------------------------------


def _site(
    conv: ir.Node, shapes: Shapes, dynamic: bool, first: bool
) -> tuple[Site | None, str]:
    weight = shapes.need(conv.inputs[1], conv)
    group = conv.attributes.get_int("group", 1) or 1
    axes, reason = _axes(conv, shapes, dynamic)
    if axes is None:
        return None, reason
    value = conv.outputs[0]
    batch_norm = _batch_norm(value)
    value = batch_norm.outputs[0] if batch_norm else value
    activation = _activation(value)
    value = activation[-1].outputs[0] if activation else value
    site = Site(
        conv=conv,
        batch_norm=batch_norm,
        activation=activation,
        pool=_pool(value, axes, shapes),
        absorbed=False,
        cin=weight[1] * group,
        cout=weight[0],
        group=group,
        axes=axes,
        first=first,
    )
    return site, ""


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    user = uses[0].node
    return user if user.graph is value.graph else None


def _batch_norm(value: ir.Value) -> ir.Node | None:
    user = _only_user(value)
    if user is None or user.op_type != "BatchNormalization" or len(user.outputs) != 1:
        return None
    return user if all(_constant(v) for v in user.inputs[1:]) else None


def _activation(value: ir.Value) -> tuple[ir.Node, ...]:
    """The node, or the gate and its product, that acts on each element alone."""
    user = _only_user(value)
    if user is not None:
        scalars = [v for v in user.inputs if v is not None and v is not value]
        plain = user.op_type in ACTIVATIONS and user.inputs[0] is value
        fits = all(
            v.const_value is not None and v.const_value.size <= 1 for v in scalars
        )
        return (user,) if plain and fits else ()
    users = [u.node for u in value.uses()]
    if len(users) != 2 or value.is_graph_output():
        return ()
    gate = next((u for u in users if u.op_type in GATES), None)
    if gate is None:
        return ()
    product = _only_user(gate.outputs[0])
    if product in users and product is not None and product.op_type == "Mul":
        return gate, product
    return ()


# -- geometry -----------------------------------------------------------------------


def windows(
    sizes: Sizes, span: int, stride: int, pads: tuple[int, int], ceil: bool = False
) -> Sizes:
    """Output sizes of a sliding window (ONNX Conv and MaxPool)."""
    padded = sizes + sum(pads) - span
    if not ceil:
        return padded // stride + 1
    out = -(-padded // stride) + 1
    return out - ((out - 1) * stride >= sizes + pads[0])


def _pads(
    node: ir.Node, sizes: Sizes, spans: list[int], strides: list[int], axis: int
) -> tuple[int, int] | None:
    """Explicit pads of one axis; None where `auto_pad` needs others at other sizes."""
    rank = len(spans)
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = node.attributes.get_ints("pads", ()) or [0] * (2 * rank)
        return int(pads[axis]), int(pads[axis + rank])
    if mode == "VALID":
        return 0, 0
    out = -(-sizes // strides[axis])
    total = np.maximum((out - 1) * strides[axis] + spans[axis] - sizes, 0)
    if len(set(total.tolist())) != 1:
        return None
    small, large = int(total[0]) // 2, int(total[0]) - int(total[0]) // 2
    return (large, small) if mode == "SAME_LOWER" else (small, large)


def _axes(
    conv: ir.Node, shapes: Shapes, dynamic: bool
) -> tuple[tuple[Axis, ...] | None, str]:
    kernel = shapes.need(conv.inputs[1], conv)[2:]
    rank = len(kernel)
    if rank not in (1, 2, 3):
        return None, f"a {rank}-D convolution"
    spatial = shapes.need(conv.inputs[0], conv)[2:]
    result = shapes.need(conv.outputs[0], conv)[2:]
    strides = list(conv.attributes.get_ints("strides", ()) or [1] * rank)
    dilations = list(conv.attributes.get_ints("dilations", ()) or [1] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = []
    for i in range(rank):
        sizes = _sizes(spatial[i], strides[i], spans[i], dynamic)
        pads = _pads(conv, sizes, spans, strides, i)
        if pads is None:
            return None, "auto_pad with a stride at a dynamic size has no fixed pads"
        if min(pads) < 0:
            return None, "negative pads"
        targets = windows(sizes, spans[i], strides[i], pads)
        if targets[0] != result[i]:
            return None, f"its output size {result[i]} is not what its attributes give"
        fits = targets > 0
        axes.append(
            Axis(sizes[fits], targets[fits], kernel[i], dilations[i], strides[i], pads)
        )
    return tuple(axes), ""


def _sizes(size: int, stride: int, span: int, dynamic: bool) -> Sizes:
    if not dynamic:
        return np.array([size])
    period = 24 * stride  # holds every pool stride up to 4, and 6, several times
    return np.array([size, *range(span, span + period)])


def _pool(value: ir.Value, axes: tuple[Axis, ...], shapes: Shapes) -> Pool | None:
    """The max-pool that alone reads `value`, if it strides and nothing else."""
    node = _only_user(value)
    if node is None or node.op_type != "MaxPool" or len(node.outputs) != 1:
        return None
    rank = len(axes)
    kernel = list(node.attributes.get_ints("kernel_shape", ()) or [])
    strides = list(node.attributes.get_ints("strides", ()) or [1] * rank)
    dilations = list(node.attributes.get_ints("dilations", ()) or [1] * rank)
    result = shapes.of(node.outputs[0])
    if prod(strides) == 1 or len(kernel) != rank or prod(dilations) != 1 or not result:
        return None
    ceil = bool(node.attributes.get_int("ceil_mode", 0))
    pooled = []
    for i, axis in enumerate(axes):
        pads = _pads(node, axis.targets, kernel, strides, i)
        if pads is None:
            return None
        targets = windows(axis.targets, kernel[i], strides[i], pads, ceil)
        if targets[0] != result[2 + i]:
            return None
        fits = targets > 0
        stride = axis.stride * strides[i]
        pooled.append(
            replace(axis, sizes=axis.sizes[fits], targets=targets[fits], stride=stride)
        )
    return Pool(node, tuple(pooled))
