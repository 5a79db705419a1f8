"""How each op moves channel labels, and what removal rewrites in it: one row per op.

A row is a pair: `trace` sets the labels of the node's outputs, `rewrite` adapts what
in the node encodes a size. Most ops need no rewriting beyond their sliced constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from squeeze.cost.ops import ELEMENTWISE
from squeeze.model import constant
from squeeze.rewrite.channels import regrid
from squeeze.rewrite.channels.trace import Array, Barrier, Tracer, integers

if TYPE_CHECKING:
    from squeeze.rewrite.channels.remove import Removal


@dataclass(frozen=True)
class Row:
    """What an op does to labels, and what removal must rewrite."""

    trace: Callable[[Tracer, ir.Node], None]
    rewrite: Callable[[Removal, ir.Node], None] | None = None


def _has(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _axis(node: ir.Node, rank: int, default: int = 0, name: str = "axis") -> int:
    axis = node.attributes.get_int(name, default)
    assert axis is not None
    return axis % max(rank, 1)


def _axes(t: Tracer, node: ir.Node, rank: int, index: int = 1) -> list[int] | None:
    """`axes` as an attribute or an input; None where it is left out."""
    given: Sequence[int] | None = node.attributes.get_ints("axes", None)
    if given is None and _has(node, index):
        given = integers(node, index, "axes")
    return None if given is None else [a % rank for a in given]


# -- contractions ---------------------------------------------------------------------


def _equation(*patterns: str) -> Callable[[Tracer, ir.Node], None]:
    """Letters of the operands, then of the output; see `Tracer.contract`."""

    def trace(t: Tracer, node: ir.Node) -> None:
        t.contract(node, patterns[:-1], patterns[-1])

    return trace


def _conv(plain: Callable[[Tracer, ir.Node], None], transposed: bool) -> Row:
    def trace(t: Tracer, node: ir.Node) -> None:
        if (node.attributes.get_int("group", 1) or 1) == 1:
            plain(t, node)
        else:
            _grouped(t, node, transposed)

    return Row(trace, _rewrite_group)


def _grouped(t: Tracer, node: ir.Node, transposed: bool) -> None:
    """A grid of groups × members on both sides; keep it full.

    Whole groups go, or the same members of every group: whichever leaves more units
    (ties: whole groups). A depthwise convolution is the first case.
    """
    group = node.attributes.get_int("group", 1) or 1
    x = t.read(node, 0, range(2, len(t.shape(node.inputs[0]))))
    shape = t.shape(node.inputs[1])
    cin, out = len(x[1]), t.shape(node.outputs[0])[1]
    whole = group >= max(cin // group, out // group)
    weight = t.read(node, 1, range(2, len(shape)))
    wide, narrow = weight[0], weight[1]
    source = x[1].reshape(group, -1)
    if whole:
        line = t.labels.collapse(source, 1)
        if narrow.any():  # members stay: their axis can't shrink
            narrow = t.labels.plain(len(narrow))
            _pin_use(t, node, 1, 1)
        t.labels.unite(t.labels.collapse(wide.reshape(group, -1), 1), line)
        made = np.repeat(line, out // group)
        t.groups[node] = line
        letters, vanishing = {"g": made}, frozenset[str]()
        places = {"g": [(0, 1), (1, 0)]}
    else:
        members = t.labels.collapse(source, 0)
        if transposed:
            t.labels.unite(wide, x[1])
            made, inner = np.tile(narrow, group), members
            letters, places = (
                {"c": inner, "o": narrow},
                {"c": [(0, 1), (1, 0)], "o": [(1, 1)]},
            )
        else:
            if len(narrow) > 1:
                t.labels.unite(narrow, members)
            else:
                t.labels.protect(members, "the one member of each group")
            line = t.labels.collapse(wide.reshape(group, -1), 0)
            made = wide
            letters, places = (
                {"c": narrow, "o": line},
                {"c": [(0, 1), (1, 1)], "o": [(1, 0)]},
            )
        vanishing = frozenset({"c"})
    if _has(node, 2):
        (bias,) = t.read(node, 2)
        t.labels.unite(bias, made)
    batch, space = x[0], t.shape(node.outputs[0])[2:]
    t.write(node, [batch, made, *map(t.labels.plain, space)])
    t.record(node, letters, places, vanishing)


def _pin_use(t: Tracer, node: ir.Node, index: int, axis: int) -> None:
    axes = list(t.uses.get((node, index), ()))
    if axes:
        axes[axis] = t.labels.plain(len(axes[axis]))
        t.uses[node, index] = tuple(axes)
    else:
        t.labels.protect(t.read(node, index)[axis], "members of whole groups")


def _rewrite_group(r: Removal, node: ir.Node) -> None:
    if node in r.trace.groups:
        r.set_int(node, "group", r.size(r.trace.groups[node]))


def _gemm(t: Tracer, node: ir.Node) -> None:
    a = "km" if node.attributes.get_int("transA", 0) else "mk"
    b = "nk" if node.attributes.get_int("transB", 0) else "kn"
    t.contract(node, [a, b], "mn")
    if _has(node, 2):
        out = t.axes[node.outputs[0]]
        t.axes[node.outputs[0]] = tuple(t.broadcast([out, t.read(node, 2)]))


def _matmul(t: Tracer, node: ir.Node) -> None:
    a, b = (len(t.shape(v)) for v in node.inputs)
    left = ["k"] if a == 1 else ["…", "m", "k"]
    right = ["k"] if b == 1 else ["…", "k", "n"]
    out = [
        *(["…"] if max(a, b) > 2 else []),
        *(["m"] if a > 1 else []),
        *(["n"] if b > 1 else []),
    ]
    t.contract(node, [left, right], out)


def _einsum(t: Tracer, node: ir.Node) -> None:
    equation = (node.attributes.get_string("equation", "") or "").replace(" ", "")
    if "->" not in equation:
        raise Barrier("an equation without its output")
    inputs, output = equation.replace("...", "…").split("->")
    patterns = inputs.split(",")
    if any(len(set(p)) < len(p) for p in [*patterns, output]):
        raise Barrier("an equation that takes a diagonal")
    t.contract(node, patterns, output)


# -- elementwise and pass-through ----------------------------------------------------


def _elementwise(t: Tracer, node: ir.Node) -> None:
    operands = [t.read(node, i) for i, v in enumerate(node.inputs) if v is not None]
    t.write(node, t.broadcast(operands))


def _scalars(t: Tracer, node: ir.Node) -> None:
    """Only the first input has channels; the others are numbers (Clip, Dropout)."""
    t.write(node, t.read(node, 0))
    for index in range(1, len(node.outputs)):
        if node.outputs[index].uses():
            raise Barrier("its second output is read")


def _quantize(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    axis = _axis(node, len(axes), 1)
    for index in (1, 2):
        if _has(node, index):
            per = t.read(node, index)
            if len(per) > 1:
                raise Barrier("blocked quantisation")
            if per and len(per[0]) > 1:
                t.labels.unite(per[0], axes[axis])
    t.write(node, axes)


def _pool(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0, range(2, len(t.shape(node.inputs[0]))))
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise Barrier("its indices are read")
    space = t.shape(node.outputs[0])[2:]
    t.write(node, [axes[0], axes[1], *map(t.labels.plain, space)])


def _reduce(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    reduced = _axes(t, node, len(axes))
    if not reduced:
        empty = node.attributes.get_int("noop_with_empty_axes", 0)
        reduced = [] if empty else list(range(len(axes)))
    for axis in reduced:
        t.statistic(node, axes[axis])
    one = t.labels.plain(1)
    if node.attributes.get_int("keepdims", 1):
        t.write(node, [one if i in reduced else a for i, a in enumerate(axes)])
    else:
        t.write(node, [a for i, a in enumerate(axes) if i not in reduced])


def _choice(t: Tracer, node: ir.Node) -> None:
    """Softmax and its like compare channels with one another: none may go."""
    axes = list(t.read(node, 0))
    old = t.opset < 13 and node.op_type in ("Softmax", "LogSoftmax", "Hardmax")
    axis = _axis(node, len(axes), 1 if old else -1)
    for chosen in range(axis, len(axes) if old else axis + 1):
        t.labels.protect(axes[chosen], f"{node.op_type} chooses among them")
    t.write(node, axes)


def _arg(t: Tracer, node: ir.Node) -> None:
    axes = list(t.read(node, 0))
    axis = _axis(node, len(axes), 0 if node.op_type != "TopK" else -1)
    t.labels.protect(axes[axis], f"{node.op_type} chooses among them")
    for index, value in enumerate(node.outputs):
        size = t.shape(value)
        out = axes[:axis] + axes[axis + 1 :]
        if len(size) == len(axes):
            out.insert(axis, t.labels.plain(size[axis]))
        t.write(node, out, index)


def _normalize(t: Tracer, node: ir.Node) -> None:
    """LayerNormalization: statistics over the axes from `axis` on."""
    axes = t.read(node, 0)
    axis = _axis(node, len(axes), -1)
    operands = [
        axes,
        *(t.read(node, i) for i in range(1, len(node.inputs)) if _has(node, i)),
    ]
    for labels in axes[axis:]:
        t.statistic(node, labels)
    if any(v.uses() for v in node.outputs[1:]):
        raise Barrier("its statistics are read")
    t.write(node, t.broadcast(operands))


def _over(default: int) -> Callable[[Tracer, ir.Node], None]:
    """A statistic over one axis (LpNormalization), or over `axes` where given."""

    def trace(t: Tracer, node: ir.Node) -> None:
        axes = t.read(node, 0)
        given = node.attributes.get_ints("axes", None) or [
            _axis(node, len(axes), default)
        ]
        for axis in given:
            t.statistic(node, axes[axis])
        t.write(node, axes)

    return trace


def _lrn(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    t.statistic(node, axes[1])
    t.write(node, axes)


def _group_norm(t: Tracer, node: ir.Node) -> None:
    """Statistics over groups of channels: a grid, as in grouped convolution."""
    groups = node.attributes.get_int("num_groups", 1) or 1
    axes = t.read(node, 0)
    grid = axes[1].reshape(groups, -1)
    t.statistic(node, axes[1])
    whole = groups >= grid.shape[1]
    line = t.labels.collapse(grid, 1 if whole else 0)
    if whole:
        t.groups[node] = line
    for index in (1, 2):
        (per,) = t.read(node, index)
        if len(per) == len(axes[1]):
            t.labels.unite(per, axes[1])
        elif whole:
            t.labels.unite(per, line)
        else:  # one scale per group, and all groups stay
            t.labels.protect(per, "one scale for each group")
    t.write(node, axes)


def _rewrite_group_norm(r: Removal, node: ir.Node) -> None:
    if node in r.trace.groups:
        r.set_int(node, "num_groups", r.size(r.trace.groups[node]))


def _shape(t: Tracer, node: ir.Node) -> None:
    """Sizes carry no channels; `trace._protect_shape_readers` looks where they end."""
    t.axes[node.outputs[0]] = t.plain(node.outputs[0])


# -- movement -------------------------------------------------------------------------


def _transpose(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    order = node.attributes.get_ints("perm", None) or range(len(axes))[::-1]
    t.write(node, [axes[i] for i in order])


def _concat(t: Tracer, node: ir.Node) -> None:
    parts = [t.read(node, i) for i in range(len(node.inputs))]
    axis = _axis(node, len(parts[0]))
    others = [tuple(a for i, a in enumerate(p) if i != axis) for p in parts]
    out = t.broadcast(others) if others[0] else []
    out.insert(axis, np.concatenate([p[axis] for p in parts]))
    t.write(node, out)


def _split(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    axis, start = _axis(node, len(axes)), 0
    for index, value in enumerate(node.outputs):
        end = start + t.shape(value)[axis]
        t.write(node, [*axes[:axis], axes[axis][start:end], *axes[axis + 1 :]], index)
        start = end


def _rewrite_split(r: Removal, node: ir.Node) -> None:
    axes = r.trace.axes[node.outputs[0]]
    axis = _axis(node, len(axes))
    if not any(r.shrinks(r.trace.axes[v][axis]) for v in node.outputs):
        return
    sizes = [r.size(r.trace.axes[v][axis]) for v in node.outputs]
    if r.opset < 13:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)
    else:
        node.attributes.pop("num_outputs", None)
        r.set_input(node, 1, np.array(sizes, np.int64))


@dataclass(frozen=True)
class _Range:
    """What a Slice takes of one axis."""

    axis: int
    start: int
    end: int
    step: int


def _ranges(node: ir.Node, shape: tuple[int, ...]) -> list[_Range]:
    if "starts" in node.attributes:  # opset 9
        starts = list(node.attributes["starts"].as_ints())
        ends = list(node.attributes["ends"].as_ints())
        given = node.attributes.get_ints("axes", None)
        steps = [1] * len(starts)
    else:
        starts, ends = integers(node, 1, "starts"), integers(node, 2, "ends")
        given = integers(node, 3, "axes") if _has(node, 3) else None
        steps = integers(node, 4, "steps") if _has(node, 4) else [1] * len(starts)
    found = []
    for i, axis in enumerate(given if given is not None else range(len(starts))):
        axis %= len(shape)
        bounds = slice(starts[i], ends[i], steps[i]).indices(shape[axis])
        found.append(_Range(axis, *bounds))
    return found


def _slice(t: Tracer, node: ir.Node) -> None:
    axes = list(t.read(node, 0))
    shape = t.shape(node.outputs[0])
    try:
        ranges = _ranges(node, t.shape(node.inputs[0]))
    except Barrier:
        # bounds known only at run time: fine where they cut no channels
        if any(
            len(a) > 1 and a.any() and len(a) != n
            for a, n in zip(axes, shape, strict=True)
        ):
            raise
        t.write(
            node,
            [
                a if len(a) == n else t.labels.plain(n)
                for a, n in zip(axes, shape, strict=True)
            ],
        )
        return
    for r in ranges:
        if r.step == 1:
            axes[r.axis] = axes[r.axis][r.start : r.end]
        elif axes[r.axis].any():
            t.labels.protect(axes[r.axis], f"Slice {node.name} takes every {r.step}th")
            axes[r.axis] = t.labels.plain(shape[r.axis])
        else:
            axes[r.axis] = t.labels.plain(shape[r.axis])
    t.write(node, axes)


def _rewrite_slice(r: Removal, node: ir.Node) -> None:
    source = r.axes(node, 0)
    if not any(r.shrinks(a) for a in source):
        return
    ranges = _ranges(node, tuple(len(a) for a in source))
    starts: list[int] = []
    ends: list[int] = []
    for one in ranges:
        mask = r.mask(source[one.axis])
        if mask.all():  # leave the bounds as they were, open ends included
            same = _raw_bounds(node, r, len(starts))
            starts.append(same[0])
            ends.append(same[1])
        else:
            starts.append(int(mask[: one.start].sum()))
            ends.append(int(mask[: one.end].sum()))
    if "starts" in node.attributes:
        node.attributes["starts"] = ir.AttrInt64s("starts", starts)
        node.attributes["ends"] = ir.AttrInt64s("ends", ends)
    else:
        r.set_input(node, 1, np.array(starts, np.int64))
        r.set_input(node, 2, np.array(ends, np.int64))
        for index in (3, 4):  # all four must have one integer type
            if (values := constant(node, index)) is not None:
                r.set_input(node, index, values.astype(np.int64))


def _raw_bounds(node: ir.Node, r: Removal, index: int) -> tuple[int, int]:
    if "starts" in node.attributes:
        return (
            node.attributes["starts"].as_ints()[index],
            node.attributes["ends"].as_ints()[index],
        )
    return integers(node, 1, "starts")[index], integers(node, 2, "ends")[index]


def _gather(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    axis = _axis(node, len(axes))
    labels, indices = axes[axis], constant(node, 1)
    shape = t.shape(node.outputs[0])
    rank = len(t.shape(node.inputs[1]))
    middle: list[Array] = [t.labels.plain(n) for n in shape[axis : axis + rank]]
    if labels.any():
        long = [i for i, n in enumerate(shape[axis : axis + rank]) if n > 1]
        if indices is None or len(long) > 1:
            what = "by number" if indices is None else "in a grid"
            t.labels.protect(labels, f"Gather {node.name} looks channels up {what}")
        elif not long:
            t.labels.protect(
                labels[indices.reshape(-1)], f"Gather {node.name} takes it"
            )
        else:
            middle[long[0]] = labels[indices.reshape(-1)]
    t.write(node, [*axes[:axis], *middle, *axes[axis + 1 :]])
    if t.is_constant(node, 0):  # an embedding makes its channels
        for index, made in enumerate(axes):
            if index != axis and made.any():
                t.embed(node, 0, index, made)


def _rewrite_gather(r: Removal, node: ir.Node) -> None:
    source = r.axes(node, 0)
    axis = _axis(node, len(source))
    if not r.shrinks(source[axis]):
        return
    indices = constant(node, 1)
    assert indices is not None
    mask = r.mask(source[axis])
    indices = indices % len(mask)
    place = np.cumsum(mask) - 1
    flat = indices.reshape(-1)
    shape = [n if n == 1 else int(mask[flat].sum()) for n in indices.shape]
    r.set_input(node, 1, place[flat[mask[flat]]].reshape(shape).astype(np.int64))


def _pad(t: Tracer, node: ir.Node) -> None:
    axes = list(t.read(node, 0))
    shape = t.shape(node.outputs[0])
    mode = node.attributes.get_string("mode", "constant")
    grown = [i for i, n in enumerate(shape) if n != len(axes[i])]
    labelled = [i for i in grown if axes[i].any()]
    pads: Sequence[int] | None = node.attributes.get_ints("pads", None)
    if labelled:
        if pads is None:
            pads = integers(node, 1, "pads")
        if _has(node, 3) or mode != "constant":
            raise Barrier("padding of channels that isn't constant")
    for axis in grown:
        if axis in labelled:
            assert pads is not None
            before, after = pads[axis], pads[axis + len(axes)]
            if min(before, after) < 0:
                raise Barrier("negative padding of channels")
            ends = t.labels.plain(before), t.labels.plain(after)
            axes[axis] = np.concatenate([ends[0], axes[axis], ends[1]])
        else:
            axes[axis] = t.labels.plain(shape[axis])
    t.write(node, axes)


def _expand(t: Tracer, node: ir.Node) -> None:
    axes, shape = t.read(node, 0), t.shape(node.outputs[0])
    made = tuple(
        t.labels.plain(n)
        if n == 1 or t.is_dynamic(node.outputs[0], i)
        else t.labels.fresh(n)
        for i, n in enumerate(shape)
    )
    # an axis that Expand stretches has as many channels as its readers want
    t.write(node, t.broadcast([axes, made]))


def _tile(t: Tracer, node: ir.Node) -> None:
    axes, shape = t.read(node, 0), t.shape(node.outputs[0])
    out = []
    for labels, n in zip(axes, shape, strict=True):
        times = n // max(1, len(labels))
        out.append(np.tile(labels, times) if times > 1 and labels.any() else labels)
        if len(out[-1]) != n:
            out[-1] = t.labels.plain(n)
    t.write(node, out)


def _resize(t: Tracer, node: ir.Node) -> None:
    axes, shape = t.read(node, 0), t.shape(node.outputs[0])
    out = []
    for labels, n in zip(axes, shape, strict=True):
        if len(labels) != n:
            t.labels.protect(labels, f"{node.op_type} {node.name} changes their number")
            labels = t.labels.plain(n)
        out.append(labels)
    t.write(node, out)


def _rewrite_sizes(r: Removal, node: ir.Node) -> None:
    """Resize with `sizes`: the fourth input."""
    sizes = constant(node, 3) if len(node.inputs) > 3 else None
    out = r.trace.axes[node.outputs[0]]
    if not any(r.shrinks(a) for a in out):
        return
    if len(node.inputs) > 3 and node.inputs[3] is not None and sizes is None:
        raise r.problem(node, "its sizes are computed while it runs")
    if sizes is not None:
        axes = node.attributes.get_ints("axes", None) or range(len(out))
        r.set_input(node, 3, np.array([r.size(out[a]) for a in axes], np.int64))


def _squeeze(t: Tracer, node: ir.Node) -> None:
    axes = t.read(node, 0)
    gone = _axes(t, node, len(axes))
    if gone is None:
        gone = [i for i, a in enumerate(axes) if len(a) == 1]
    t.write(node, [a for i, a in enumerate(axes) if i not in gone])


def _unsqueeze(t: Tracer, node: ir.Node) -> None:
    axes, rank = list(t.read(node, 0)), len(t.shape(node.outputs[0]))
    for axis in sorted(_axes(t, node, rank) or ()):
        axes.insert(axis, t.labels.plain(1))
    t.write(node, axes)


def _reshape(t: Tracer, node: ir.Node) -> None:
    axes, shape = t.read(node, 0), t.shape(node.outputs[0])
    t.write(node, regrid.reshape(t.labels, axes, shape, t.attention))


def _rewrite_target(r: Removal, node: ir.Node) -> None:
    """Reshape and Expand: what the target says must be the new sizes."""
    out = r.trace.axes[node.outputs[0]]
    target = constant(node, 1)
    if target is not None and not any(r.shrinks(a) for a in (*r.axes(node, 0), *out)):
        return
    r.retarget(node, [r.size(a) for a in out], target)


def _depth_to_space(t: Tracer, node: ir.Node) -> None:
    axes, shape = t.read(node, 0, (2, 3)), t.shape(node.outputs[0])
    block = (node.attributes.get_int("blocksize", 1) or 1) ** 2
    first = node.attributes.get_string("mode", "DCR") == "DCR"
    grid = axes[1].reshape((block, -1) if first else (-1, block))
    line = t.labels.collapse(grid, 0 if first else 1)
    t.write(node, [axes[0], line, *map(t.labels.plain, shape[2:])])


def _space_to_depth(t: Tracer, node: ir.Node) -> None:
    axes, shape = t.read(node, 0, (2, 3)), t.shape(node.outputs[0])
    block = (node.attributes.get_int("blocksize", 1) or 1) ** 2
    t.write(node, [axes[0], np.tile(axes[1], block), *map(t.labels.plain, shape[2:])])


# -- the table ------------------------------------------------------------------------

_NOT_ELEMENTWISE = set(
    """CumSum Clip Resize Upsample DequantizeLinear QuantizeLinear DynamicQuantizeLinear
    Bernoulli""".split()
)
_REDUCTIONS = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare""".split()
_POOLS = """MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool
GlobalLpPool""".split()

TABLE: dict[str, Row] = {
    "Conv": _conv(_equation("nc*", "oc*", "o", "no*"), transposed=False),
    "ConvTranspose": _conv(_equation("nc*", "co*", "o", "no*"), transposed=True),
    "Gemm": Row(_gemm),
    "MatMul": Row(_matmul),
    "Einsum": Row(_einsum),
    "BatchNormalization": Row(_equation("nc*", "c", "c", "c", "c", "nc*")),
    "InstanceNormalization": Row(_equation("nc*", "c", "c", "nc*")),
    "LayerNormalization": Row(_normalize),
    "RMSNormalization": Row(_normalize),
    "GroupNormalization": Row(_group_norm, _rewrite_group_norm),
    "MeanVarianceNormalization": Row(_over(1)),
    "LpNormalization": Row(_over(-1)),
    "LRN": Row(_lrn),
    **{op: Row(_elementwise) for op in ELEMENTWISE if op not in _NOT_ELEMENTWISE},
    **{op: Row(_elementwise) for op in ("Sum", "Mean", "Max", "Min")},
    **{op: Row(_scalars) for op in ("Clip", "Dropout", "Identity", "Cast", "CastLike")},
    **{op: Row(_quantize) for op in ("QuantizeLinear", "DequantizeLinear")},
    **{op: Row(_pool) for op in _POOLS},
    **{op: Row(_reduce) for op in _REDUCTIONS},
    **{op: Row(_choice) for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{op: Row(_arg) for op in ("ArgMax", "ArgMin", "TopK")},
    "Shape": Row(_shape),
    "Size": Row(_shape),
    "Transpose": Row(_transpose),
    "Concat": Row(_concat),
    "Split": Row(_split, _rewrite_split),
    "Slice": Row(_slice, _rewrite_slice),
    "Gather": Row(_gather, _rewrite_gather),
    "Pad": Row(_pad),
    "Expand": Row(_expand, _rewrite_target),
    "Tile": Row(_tile),
    "Resize": Row(_resize, _rewrite_sizes),
    "Upsample": Row(_resize),
    "Squeeze": Row(_squeeze),
    "Unsqueeze": Row(_unsqueeze),
    "Flatten": Row(_reshape),
    "Reshape": Row(_reshape, _rewrite_target),
    "DepthToSpace": Row(_depth_to_space),
    "SpaceToDepth": Row(_space_to_depth),
}
