"""Channels: what goes together, and removal proven against the silenced original."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.rewrite.channels import choose, prepare, trace
from squeeze.rewrite.channels.trace import Trace
from tests.builders import Net, residual_chain
from tests.rewrite import channels_proof as proof

EXACT, ALIVE = 1e-5, 0.1
Build = Callable[[Net], str]


def finish(net: Net, value: str, opset: int = 17) -> ir.Model:
    """A net whose output is `value`, as every command loads it."""
    net.value = value
    shape = net.model(opset)
    return models.normalize(ir.from_proto(shape))


def halve(
    seed: int = 1, share: Fraction = Fraction(1, 2)
) -> Callable[[Trace], np.ndarray]:
    """Keep a random half of every cell."""

    def keep(trace: Trace) -> np.ndarray:
        scores = np.random.default_rng(seed).random(len(trace.root))
        return choose.thin(trace, trace.families, scores, choose.share(share))

    return keep


def proven(model: ir.Model, shape: tuple[int, ...], **options: object) -> Trace:
    """T1 (T2 where statistics are read) and power; returns the trace."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    name = model.graph.inputs[0].name
    error, change, trace, _ = proof.prove(model, {name: x}, halve(), **options)
    assert error < EXACT
    assert change > ALIVE
    return trace


# -- one graph for each topology ----------------------------------------------------


def residual(net: Net) -> str:
    a = net.conv(3, 8)
    b = net.node("Relu", a)
    c = net.conv(8, 8, source=b)
    d = net.node("Add", c, b)
    return net.conv(8, 4, source=net.node("Relu", d))


def projection(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    b = net.conv(8, 12, source=a)
    c = net.conv(8, 12, (1, 1), source=a)
    return net.conv(12, 4, source=net.node("Relu", net.node("Add", b, c)))


def dense(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 6))
    b = net.node("Relu", net.conv(6, 4, source=a))
    c = net.node("Concat", a, b, axis=1)
    d = net.node("Relu", net.conv(10, 4, source=c))
    e = net.node("Concat", c, d, axis=1)
    net.value = e
    return net.conv(14, 4, source=net.batch_norm(14))


def inception(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    parts = [net.conv(8, 4, (1, 1), source=a), net.conv(8, 6, source=a)]
    parts.append(net.node("MaxPool", a, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    return net.conv(18, 4, source=net.node("Concat", *parts, axis=1))


def squeeze_excite(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    pooled = net.node("GlobalAveragePool", a)
    low = net.node("Relu", net.conv(8, 4, (1, 1), source=pooled))
    gate = net.node("Sigmoid", net.conv(4, 8, (1, 1), source=low))
    return net.conv(8, 4, source=net.node("Mul", a, gate))


def shuffle(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    sizes = net.weight(np.array([4, 4]))
    net.nodes.append(helper.make_node("Split", [a, sizes], ["left", "right"], axis=1))
    b = net.node("Relu", net.conv(4, 4, source="right"))
    c = net.node("Concat", "left", b, axis=1)
    d = net.node("Reshape", c, net.weight(np.array([0, 2, 4, 8, 8])))
    e = net.node("Transpose", d, perm=[0, 2, 1, 3, 4])
    f = net.node("Reshape", e, net.weight(np.array([0, 8, 8, 8])))
    return net.conv(8, 4, source=f)


def depthwise(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 6))
    b = net.node("Relu", net.conv(6, 12, source=a, group=6))
    return net.conv(12, 4, (1, 1), source=b)


def grouped(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 16))
    b = net.node("Relu", net.conv(16, 16, source=a, group=8))
    c = net.node("Relu", net.conv(16, 12, source=b, group=2))
    return net.conv(12, 4, source=c)


def flatten(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    net.value = net.node("Flatten", a)
    net.value = net.node("Relu", net.gemm(8 * 64, 10))
    return net.gemm(10, 5)


def transposed(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    w = net.weight(net.rng.standard_normal((8, 6, 2, 2)) / 3)
    b = net.node(
        "ConvTranspose", a, w, net.weight(net.rng.standard_normal(6)), strides=[2, 2]
    )
    c = net.node("Relu", b)
    w = net.weight(net.rng.standard_normal((6, 2, 3, 3)) / 3)
    d = net.node("ConvTranspose", c, w, group=2)
    return net.conv(4, 4, source=net.node("Relu", d))


def nhwc(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 8))
    b = net.node("Transpose", a, perm=[0, 2, 3, 1])
    c = net.node("MatMul", b, net.weight(net.rng.standard_normal((8, 12)) / 3))
    d = net.node("Add", c, net.weight(net.rng.standard_normal(12)))
    e = net.node("Transpose", net.node("Relu", d), perm=[0, 3, 1, 2])
    return net.conv(12, 4, source=e)


def scales(net: Net) -> str:
    a = net.conv(3, 8)
    b = net.node("PRelu", a, net.weight(net.rng.uniform(0.1, 0.4, (8, 1, 1))))
    c = net.node("Mul", b, net.weight(net.rng.uniform(0.5, 2, (1, 8, 1, 1))))
    d = net.node("Clip", c, net.weight(np.float32(-1)), net.weight(np.float32(3)))
    return net.conv(8, 4, source=d)


def shared(net: Net) -> str:
    w = net.weight(net.rng.standard_normal((8, 8, 3, 3)) / 6)
    a = net.node("Relu", net.conv(3, 8))
    b = net.node("Relu", net.node("Conv", a, w, pads=[1, 1, 1, 1]))
    c = net.node("Relu", net.node("Conv", b, w, pads=[1, 1, 1, 1]))
    return net.conv(8, 4, source=c)


def group_norm(net: Net) -> str:
    a = net.conv(3, 8)
    b = net.node(
        "InstanceNormalization", a, net.weight(np.full(8, 1.5)), net.weight(np.ones(8))
    )
    return net.conv(8, 4, source=net.node("LRN", net.node("Relu", b), size=3))


def padded(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 6))
    b = net.node("Pad", a, net.weight(np.array([0, 2, 0, 0, 0, 2, 0, 0])))
    c = net.node("Slice", b, *(net.weight(np.array([n])) for n in (1, 9, 1)))
    return net.conv(8, 4, source=c)


def tied_output(net: Net) -> str:
    """A value that is read on and is an output as well."""
    a = net.node("Relu", net.conv(3, 8))
    b = net.node("Relu", net.conv(8, 6, source=a))
    net.extra = b
    return net.conv(6, 4, source=b)


def depth_space(net: Net) -> str:
    a = net.node("Relu", net.conv(3, 16))
    b = net.node("DepthToSpace", a, blocksize=2, mode="CRD")
    c = net.node("SpaceToDepth", net.conv(4, 6, source=b), blocksize=2)
    return net.conv(24, 4, source=c)


IMAGES: list[Build] = [
    residual,
    projection,
    dense,
    inception,
    squeeze_excite,
    shuffle,
    depthwise,
    grouped,
    flatten,
    transposed,
    nhwc,
    scales,
    shared,
    group_norm,
    padded,
    depth_space,
]


@pytest.mark.parametrize("build", IMAGES, ids=lambda b: b.__name__)
def test_removal_equals_silencing(build: Build) -> None:
    """Half of every family goes, and nothing but the silenced channels is missing."""
    net = Net(["N", 3, 8, 8])
    trace = proven(finish(net, build(net)), (2, 3, 8, 8))
    assert trace.families


def transformer(net: Net, fused: bool) -> str:
    """Multi-head attention (4 heads of 6) and an MLP, pre-norm, with residuals."""
    draw = net.rng.standard_normal
    wide = 24

    def linear(x: str, rows: int, columns: int) -> str:
        y = net.node("MatMul", x, net.weight(draw((rows, columns)) / np.sqrt(rows)))
        return net.node("Add", y, net.weight(draw(columns) / 3))

    def norm(x: str) -> str:
        scale, bias = (
            net.weight(net.rng.uniform(0.5, 1.5, wide)),
            net.weight(draw(wide)),
        )
        return net.node("LayerNormalization", x, scale, bias, axis=-1)

    def heads(x: str) -> str:
        y = net.node("Reshape", x, net.weight(np.array([0, 5, 4, 6])))
        return net.node("Transpose", y, perm=[0, 2, 1, 3])

    start = linear(net.value, 7, wide)
    x = norm(start)
    if fused:
        net.nodes.append(
            helper.make_node(
                "Split", [linear(x, wide, 3 * wide)], ["q", "k", "v"], axis=-1
            )
        )
        net.nodes[-1].input.append(net.weight(np.array([wide] * 3)))
        q, k, v = map(heads, "qkv")
    else:
        q, k, v = (heads(linear(x, wide, wide)) for _ in range(3))
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.node("Mul", scores, net.weight(np.float32(0.4)))
    mixed = net.node("MatMul", net.node("Softmax", scores, axis=-1), v)
    joined = net.node("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = net.node("Reshape", joined, net.weight(np.array([0, 5, wide])))
    x = net.node("Add", start, linear(joined, wide, wide))
    y = net.node("Relu", linear(norm(x), wide, 40))
    return linear(norm(net.node("Add", x, linear(y, 40, wide))), wide, 5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attention", ["dims", "heads"])
def test_transformer(fused: bool, attention: str) -> None:
    """Heads, dimensions, MLP and stream shrink; LayerNorm reads what is kept."""
    net = Net(["N", 5, 7])
    model = finish(net, transformer(net, fused))
    trace = proven(model, (3, 5, 7), attention=attention)
    assert trace.inexact.any()
    sizes = {len(f.units) for f in trace.families}
    assert 40 in sizes  # the MLP
    if not fused:
        assert (4 if attention == "heads" else 6) in sizes


def test_embedding_with_a_tied_transpose() -> None:
    """A table that is looked up and, transposed, makes the logits."""
    net = Net(["N", 5])
    net.input.type.tensor_type.elem_type = onnx.TensorProto.INT64
    table = net.weight(net.rng.standard_normal((11, 8)))
    x = net.node("Gather", table, net.value)
    y = net.node(
        "Relu", net.node("MatMul", x, net.weight(net.rng.standard_normal((8, 8))))
    )
    logits = net.node("MatMul", y, net.node("Transpose", table, perm=[1, 0]))
    feeds = {"x": np.arange(10).reshape(2, 5)}
    error, change, trace, keep = proof.prove(finish(net, logits), feeds, halve())
    assert error < EXACT
    assert change > ALIVE
    assert trace.macs(keep) < trace.macs(trace.full)


# -- what must stay -----------------------------------------------------------------


def reasons_of(model: ir.Model) -> set[str]:
    return set(proof.traced(model).why.values())


def test_inner_output_is_protected() -> None:
    """A value that is an output keeps its channels; what is before it may shrink."""
    net = Net(["N", 3, 8, 8])
    value = tied_output(net)
    proto = net.model() if not setattr(net, "value", value) else None
    proto.graph.output.append(
        helper.make_tensor_value_info(net.extra, onnx.TensorProto.FLOAT, ["N", 6, 8, 8])
    )
    model = models.normalize(ir.from_proto(proto))
    trace = proven(model, (2, 3, 8, 8))
    assert f"network output {net.extra}" in set(trace.why.values())
    assert [len(f.units) for f in trace.families] == [8]


def test_unknown_op_is_a_barrier_with_its_reason() -> None:
    """Never followed as elementwise: its channels are protected and it is named."""
    net = Net(["N", 3, 8, 8])
    a = net.node("Relu", net.conv(3, 8))
    b = net.node("CumSum", a, net.weight(np.array(1)), name="sum")
    model = finish(net, net.conv(8, 4, source=b))
    trace = proof.traced(model)
    assert not trace.families
    assert [(b.name, b.op) for b in trace.barriers] == [("sum", "CumSum")]


def test_values_captured_by_a_branch_stay() -> None:
    """What the body of an If reads from outside is not thinned."""
    net = Net(["N", 3, 8, 8])
    a = net.node("Relu", net.conv(3, 8))
    info = helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, None)
    bodies = [
        helper.make_graph([helper.make_node(op, [a], ["branch"])], op, [], [info])
        for op in ("Abs", "Neg")
    ]
    condition = net.weight(np.array(1, np.int64))
    truth = net.node("Cast", condition, to=onnx.TensorProto.BOOL)
    b = net.node("If", truth, then_branch=bodies[0], else_branch=bodies[1])
    model = finish(net, net.conv(8, 4, source=b))
    assert not proof.traced(model).families


def test_softmax_over_channels_protects_them() -> None:
    """Channels that compete for a choice can't go."""
    net = Net(["N", 3, 8, 8])
    a = net.node("Softmax", net.conv(3, 8), axis=1)
    assert "Softmax chooses among them" in reasons_of(
        finish(net, net.conv(8, 4, source=a))
    )


def test_two_axes_of_channels_never_merge() -> None:
    """Where channels of two axes become one axis, both stay."""
    net = Net(["N", 6])
    a = net.node("Relu", net.gemm(6, 12))
    b = net.node("Reshape", a, net.weight(np.array([0, 12, 1])))
    c = net.node("MatMul", b, net.weight(net.rng.standard_normal((1, 5))))
    net.value = net.node("Reshape", c, net.weight(np.array([0, 60])))
    assert not proof.traced(finish(net, net.gemm(60, 3))).families


def test_scale_from_a_shape_does_not_change() -> None:
    """√D computed from Shape is a constant of the original's, whatever is removed."""
    net = Net(["N", 6])
    a = net.node("Relu", net.gemm(6, 16))
    size = net.node("Gather", net.node("Shape", a), net.weight(np.array(1)))
    root = net.node("Sqrt", net.node("Cast", size, to=onnx.TensorProto.FLOAT))
    net.value = net.node("Div", a, root)
    proven(finish(net, net.gemm(16, 4)), (3, 6))


def test_targets_computed_from_shapes_are_overlaid() -> None:
    """A Reshape whose target comes from Shape keeps its dynamic dimensions."""
    net = Net(["N", 3, "H", 8])
    a = net.node("Relu", net.conv(3, 8))
    shape = net.node("Shape", a)
    picked = [net.node("Gather", shape, net.weight(np.array([i]))) for i in (0, 1, 2)]
    target = net.node("Concat", *picked, net.weight(np.array([4, 2])), axis=0)
    b = net.node("Reshape", a, target)
    c = net.node("ReduceSum", b, net.weight(np.array([4])), keepdims=0)
    model = finish(net, net.conv(8, 4, source=c))
    proven(model, (2, 3, 6, 8), given={"x": (1, 3, 6, 8)})
    x = np.random.default_rng(0).standard_normal((3, 3, 10, 8), np.float32)
    options = {"given": {"x": (1, 3, 6, 8)}}
    error, _, _, _ = proof.prove(model, {"x": x}, halve(), **options)
    assert error < EXACT


def test_a_grid_keeps_the_axis_with_most_units() -> None:
    """Grouped convolutions lose whole groups, or members, whichever leaves more."""
    for group, units in ((8, [8]), (2, [8, 8])):
        net = Net(["N", 3, 8, 8])
        a = net.node("Relu", net.conv(3, 16))
        b = net.node("Relu", net.conv(16, 16, source=a, group=group))
        trace = proof.traced(finish(net, net.conv(16, 4, source=b)))
        assert [len(f.units) for f in trace.families] == units


def test_shared_weights_are_copied_where_masks_differ() -> None:
    """A constant used twice is not coupled to itself."""
    net = Net(["N", 3, 8, 8])
    trace = proof.traced(finish(net, shared(net)))
    assert [len(f.units) for f in trace.families] == [8, 8, 8]


def test_slices_with_steps_are_pinned() -> None:
    """Every second channel: none of them goes, and the outputs stay right."""
    net = Net(["N", 3, 8, 8])
    a = net.node("Relu", net.conv(3, 8))
    ends = [net.weight(np.array([n])) for n in (0, 8, 1, 2)]
    b = net.node("Slice", a, *ends)
    trace = proof.traced(finish(net, net.conv(4, 4, source=b)))
    assert not trace.families


# -- random graphs ------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> tuple[ir.Model, int]:
    """A chain of random pieces on 8×8 images, ending in a pooled or flattened head."""
    net = Net(["N", 3, 8, 8], seed=draw(st.integers(0, 2**16)))
    width = draw(st.sampled_from([8, 12]))
    value = net.node("Relu", net.conv(3, width))
    for _ in range(draw(st.integers(1, 4))):
        piece = draw(st.sampled_from(sorted(PIECES)))
        value, width = PIECES[piece](net, value, width, draw)
    if draw(st.booleans()):
        net.value = net.node("Flatten", net.node("GlobalAveragePool", value))
        size = width
    else:
        net.value = net.node("Flatten", value)
        size = width * 64
    return finish(net, net.gemm(size, 5)), draw(st.integers(0, 2**16))


Draw = Callable[..., int]


def _conv(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    out = draw(st.sampled_from([8, 12, 16]))
    return net.node("Relu", net.conv(width, out, source=x)), out


def _residual(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    net.value = net.conv(width, width, source=x)
    return net.node("Add", x, net.node("Relu", net.batch_norm(width))), width


def _concat(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    made = net.node("Sigmoid", net.conv(width, 4, source=x))
    return net.node(
        "Concat", *((x, made) if draw(st.booleans()) else (made, x)), axis=1
    ), width + 4


def _split(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    left = width // 2
    names = [f"{len(net.nodes)}_{i}" for i in range(2)]
    sizes = net.weight(np.array([left, width - left]))
    net.nodes.append(helper.make_node("Split", [x, sizes], names, axis=1))
    made = net.node("Relu", net.conv(width - left, 6, source=names[1]))
    return net.node("Concat", names[0], made, axis=1), left + 6


def _shuffle(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    y = net.node("Reshape", x, net.weight(np.array([0, 2, width // 2, 8, 8])))
    y = net.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    return net.node("Reshape", y, net.weight(np.array([0, width, 8, 8]))), width


def _grouped(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    group = draw(st.sampled_from([g for g in (2, 4, width) if width % g == 0]))
    out = width * draw(st.sampled_from([1, 2])) if group == width else width
    return net.node("Tanh", net.conv(width, out, source=x, group=group)), out


def _excite(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    pooled = net.node("ReduceMean", x, axes=[2, 3])
    low = net.node("Relu", net.conv(width, 4, (1, 1), source=pooled))
    gate = net.node("HardSigmoid", net.conv(4, width, (1, 1), source=low))
    return net.node("Mul", gate, x), width


def _nhwc(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    y = net.node("Transpose", x, perm=[0, 2, 3, 1])
    y = net.node("MatMul", y, net.weight(net.rng.standard_normal((width, 10)) / 3))
    y = net.node("Add", net.weight(net.rng.standard_normal(10)), y)
    return net.node("Transpose", net.node("Elu", y), perm=[0, 3, 1, 2]), 10


def _attention(net: Net, x: str, width: int, draw: Draw) -> tuple[str, int]:
    """Two heads over the 64 positions, on half of the width each."""
    t = net.node("Transpose", x, perm=[0, 2, 3, 1])
    t = net.node("Reshape", t, net.weight(np.array([0, 64, width])))

    def heads() -> str:
        w = net.weight(net.rng.standard_normal((width, 8)) / np.sqrt(width))
        y = net.node(
            "Reshape", net.node("MatMul", t, w), net.weight(np.array([0, 64, 2, 4]))
        )
        return net.node("Transpose", y, perm=[0, 2, 1, 3])

    q, k, v = heads(), heads(), heads()
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]))
    y = net.node("MatMul", net.node("Softmax", scores, axis=-1), v)
    y = net.node(
        "Reshape",
        net.node("Transpose", y, perm=[0, 1, 3, 2]),
        net.weight(np.array([0, 8, 8, 8])),
    )
    return y, 8


PIECES: dict[str, Callable[[Net, str, int, Draw], tuple[str, int]]] = {
    "attention": _attention,
    "concat": _concat,
    "conv": _conv,
    "excite": _excite,
    "grouped": _grouped,
    "nhwc": _nhwc,
    "residual": _residual,
    "shuffle": _shuffle,
    "split": _split,
}


@settings(max_examples=60, deadline=None)
@given(networks())
def test_random_networks(drawn: tuple[ir.Model, int]) -> None:
    """Any graph of the grammar, any mask: removal equals silencing."""
    model, seed = drawn
    x = np.random.default_rng(seed).standard_normal((2, 3, 8, 8), np.float32)
    error, _, _, _ = proof.prove(model, {"x": x}, halve(seed), masks=True)
    assert error < EXACT


def test_tracing_is_linear_in_the_nodes() -> None:
    """Four times the nodes take about four times as long, families included."""

    def seconds(nodes: int) -> float:
        model = ir.from_proto(residual_chain(nodes).model())
        shapes = shaping.infer(model, {})
        times = []
        for _ in range(3):
            start = time.process_time()
            assert trace(prepare(model, shapes)).families
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(3200) <= 6 * seconds(800)
