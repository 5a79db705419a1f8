"""What each op costs: one row per op.

A row is a function of the op's shapes to `(macs, extra)`, where `extra` are the FLOPs
that are not part of a MAC. FLOPs are 2 × MACs + extra. Conventions: MACs as
torchvision and the MobileNets and EffNet papers count them (padding included, no
bias); one FLOP per bias addition and elementwise output, the window size per pooled
output, the elements read per reduction, 2 per BatchNormalization output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from squeeze.shapes import Shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """A node with the static shapes of what it reads and writes."""

    node: ir.Node
    shapes: Shapes

    def input(self, index: int) -> Shape:
        return self.shapes.need(self.node.inputs[index], self.node)

    @property
    def output(self) -> Shape:
        return self.shapes.need(self.node.outputs[0], self.node)

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def integer(self, name: str, default: int) -> int:
        return self.node.attributes.get_int(name, default) or default

    def string(self, name: str, default: str) -> str:
        return self.node.attributes.get_string(name, default) or default


Cost = tuple[int, int]


def _conv(weight: int, bias: int | None) -> Callable[[Op], Cost]:
    def cost(op: Op) -> Cost:
        kernel = op.input(weight)  # (Cout, Cin / group, *k)
        out = prod(op.output)
        biased = bias is not None and op.has(bias)
        return out * prod(kernel[1:]), out if biased else 0

    return cost


def _conv_transpose(op: Op) -> Cost:
    kernel = op.input(1)  # (Cin, Cout / group, *k)
    return prod(op.input(0)) * prod(kernel[1:]), prod(op.output) if op.has(2) else 0


def _gemm(op: Op) -> Cost:
    m, n = op.output
    a = op.input(0)
    k = a[0] if op.node.attributes.get_int("transA", 0) else a[1]
    return m * n * k, m * n if op.has(2) else 0


def _matmul(op: Op) -> Cost:
    return prod(op.output) * op.input(0)[-1], 0


def _einsum(op: Op) -> Cost:
    equation = op.string("equation", "").replace(" ", "")
    operands = equation.split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for index, labels in enumerate(operands):
        shape = op.input(index)
        head, dots, tail = labels.partition("...")
        letters = list(head) + [
            f"…{i}" for i in range(len(shape) - len(head + tail))
        ] * bool(dots)
        for label, size in zip(letters + list(tail), shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    total = prod(sizes.values())
    return (total, 0) if len(operands) > 1 else (0, total)


def _recurrent(gates: int) -> Callable[[Op], Cost]:
    """Each step multiplies the input and the state by every gate's weights."""

    def cost(op: Op) -> Cost:
        length, batch = op.input(0)[:2]
        directions, rows, width = op.input(1)  # (directions, gates · hidden, input)
        hidden = rows // gates
        steps = length * batch * directions
        return steps * rows * (width + hidden), steps * (2 * rows + 4 * hidden)

    return cost


def _attention(op: Op) -> Cost:
    """Scaled dot products (opset 23): Q·Kᵀ, softmax, ·V."""
    q, k, v = op.input(0), op.input(1), op.input(2)
    if len(q) == 4:
        batch, heads, length, width = q
        keys, values = k[2], v[3]
    else:
        batch, length, packed = q
        heads = op.integer("q_num_heads", 1)
        kv_heads = op.integer("kv_num_heads", heads)
        width, keys, values = packed // heads, k[1], v[2] // kv_heads
    scores = batch * heads * length * keys
    return scores * (width + values), 3 * scores


def _per_output(count: int) -> Callable[[Op], Cost]:
    return lambda op: (0, count * prod(op.output))


def _pool(op: Op) -> Cost:
    window = list(op.node.attributes.get_ints("kernel_shape", ()) or ())
    return 0, prod(op.output) * prod(window)


def _per_input(op: Op) -> Cost:
    return 0, prod(op.input(0))


def _sum(op: Op) -> Cost:
    operands = sum(1 for v in op.node.inputs if v is not None)
    return 0, max(1, operands - 1) * prod(op.output)


def _free(op: Op) -> Cost:
    return 0, 0


ELEMENTWISE = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr
BitwiseXor Ceil Celu Clip Cos Cosh CumSum DequantizeLinear Div Elu Equal Erf Exp Floor
Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less
LessOrEqual Log Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear DynamicQuantizeLinear
Reciprocal Relu Resize Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt
Sub Tan Tanh ThresholdedRelu Upsample Where Xor Bernoulli Swish
""".split()

REDUCTIONS = """
ArgMax ArgMin GlobalAveragePool GlobalLpPool GlobalMaxPool ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare TopK NonMaxSuppression
""".split()

FREE = """
Cast CastLike Concat Constant ConstantOfShape DepthToSpace Dropout Expand EyeLike
Flatten Gather GatherElements GatherND Identity NonZero OneHot Optional Pad
RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reshape
ReverseSequence Scatter ScatterElements ScatterND SequenceAt SequenceConstruct
SequenceEmpty SequenceInsert Shape Size Slice SpaceToDepth Split SplitToSequence
ConcatFromSequence Squeeze Tile Transpose Trilu Unique Unsqueeze Compress
""".split()

# what normalising, scaling and shifting one element takes
NORMALIZATION = {
    "BatchNormalization": 2,
    "Softmax": 3,
    "LogSoftmax": 3,
    "Hardmax": 1,
    "LayerNormalization": 7,
    "RMSNormalization": 4,
    "InstanceNormalization": 7,
    "GroupNormalization": 7,
    "MeanVarianceNormalization": 5,
    "LpNormalization": 3,
}


def _lrn(op: Op) -> Cost:
    return 0, prod(op.output) * (op.integer("size", 1) + 3)


TABLE: dict[str, Callable[[Op], Cost]] = {
    "Conv": _conv(1, 2),
    "ConvInteger": _conv(1, None),
    "QLinearConv": _conv(3, 8),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "Attention": _attention,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "LRN": _lrn,
    "Sum": _sum,
    "Mean": _sum,
    "Max": _sum,
    "Min": _sum,
    **{op: _per_output(1) for op in ELEMENTWISE},
    **{op: _per_output(n) for op, n in NORMALIZATION.items()},
    **dict.fromkeys(REDUCTIONS, _per_input),
    **dict.fromkeys(FREE, _free),
}

# ops whose cost is their MACs: the layers of a network
CONTRACTIONS = frozenset(
    """Conv ConvInteger QLinearConv ConvTranspose Gemm MatMul MatMulInteger
    QLinearMatMul Einsum LSTM GRU RNN Attention""".split()
)

# inputs that are numbers of the op itself, not weights: index → never a parameter
ARITHMETIC_INPUTS: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),
    "Clip": frozenset({1, 2}),
    "Pad": frozenset({1, 2, 3}),
    "Resize": frozenset({1, 2, 3}),
    "Upsample": frozenset({1}),
    "Reshape": frozenset({1}),
    "Expand": frozenset({1}),
    "Tile": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Range": frozenset({0, 1, 2}),
    "OneHot": frozenset({1, 2}),
}

# integer inputs that hold quantised weights
QUANTISED_INPUTS: dict[str, frozenset[int]] = {
    "DequantizeLinear": frozenset({0}),
    "QLinearConv": frozenset({3, 8}),
    "QLinearMatMul": frozenset({0, 3}),
    "ConvInteger": frozenset({1}),
    "MatMulInteger": frozenset({0, 1}),
}


def full_name(node: ir.Node) -> str:
    """The op as reports name it: with its domain, where that is not ONNX's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def cost(node: ir.Node, shapes: Shapes) -> Cost | None:
    """(MACs, FLOPs) of a node; None where the table has no row for its op."""
    if node.domain not in ("", "ai.onnx"):
        return None
    row = TABLE.get(node.op_type)
    if row is None:
        return None
    macs, extra = row(Op(node, shapes))
    return macs, 2 * macs + extra


def kind(node: ir.Node, shapes: Shapes) -> str:
    """Layer kinds of MobileNets, Table 2: 1×1, depthwise, grouped, k×k, FC, other."""
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose"):
        weight = 3 if node.op_type == "QLinearConv" else 1
        shape = shapes.need(node.inputs[weight], node)
        group = node.attributes.get_int("group", 1) or 1
        cin = shape[0] if node.op_type == "ConvTranspose" else shape[1] * group
        if group > 1:
            return "depthwise" if group == cin else "grouped"
        return "×".join(str(k) for k in shape[2:])
    if node.op_type in ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "Einsum"):
        constant = any(v is not None and v.const_value is not None for v in node.inputs)
        return "FC" if constant else "matmul"
    return "other"
