"""Ops that move elements: shapes, slices, joins, gathers, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from squeeze.recover.ops._op import Function, Op, axes_of, ints, together


def reshape(op: Op, x: Tensor, shape: Tensor) -> Tensor:
    """A target written for another batch is scaled in its first dimension.

    Exporters write the batch they saw into the target; elsewhere it follows from the
    element count, which must be a multiple.
    """
    target = ints(shape)
    if not op.get("allowzero", 0):
        target = [x.shape[i] if n == 0 else n for i, n in enumerate(target)]
    return x.reshape(rebatched(target, x.numel()))


def rebatched(target: list[int], elements: int) -> list[int]:
    whole = math.prod(target)
    if -1 not in target and whole and whole != elements and elements % whole == 0:
        return [target[0] * (elements // whole), *target[1:]]
    return target


def flatten(op: Op, x: Tensor) -> Tensor:
    axis = op.get("axis", 1)
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def squeeze(op: Op, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(op, axes)
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


def unsqueeze(op: Op, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = axes_of(op, axes) or []
    rank = x.dim() + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


def transpose(op: Op, x: Tensor) -> Tensor:
    return x.permute(op.get("perm", list(range(x.dim()))[::-1]))


def concat(op: Op, *xs: Tensor) -> Tensor:
    return torch.cat(together(*xs), op.get("axis"))


def split(op: Op, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = op.get("axis", 0)
    parts = ints(sizes) or op.get("split")
    if not parts:
        each = math.ceil(x.shape[axis] / op.outputs)
        parts = [each] * (op.outputs - 1)
        parts.append(x.shape[axis] - sum(parts))
    return torch.split(x, parts, axis)


def slice_(op: Op, x: Tensor, *inputs: Tensor | None) -> Tensor:
    """Attributes before opset 10, inputs from then on."""
    given = [ints(v) if v is not None else None for v in inputs] + [None] * 4
    starts = given[0] or op.get("starts")
    ends = given[1] or op.get("ends")
    axes = given[2] or op.get("axes") or list(range(len(starts)))
    steps = given[3] or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        picked = range(x.shape[axis])[slice(start, _end(end, step), step)]
        x = _along(x, axis, picked)
    return x


def _end(end: int, step: int) -> int | None:
    """The most negative integers mean "past the first" for a negative step."""
    return None if step < 0 and end < -(2**31) + 2 else end


def _along(x: Tensor, axis: int, picked: range) -> Tensor:
    if picked.step == 1 or not len(picked):
        start = picked.start if len(picked) else 0
        return x.narrow(axis, start, len(picked))
    index = torch.arange(picked.start, picked.stop, picked.step, device=x.device)
    return x.index_select(axis, index)


def gather(op: Op, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0) % max(x.dim(), 1)
    x, indices = together(x, indices)
    index = indices.long()
    index = torch.where(index < 0, index + x.shape[axis], index)
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def gather_elements(op: Op, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.get("axis", 0)
    x, indices = together(x, indices)
    index = indices.long()
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


def gather_nd(op: Op, x: Tensor, indices: Tensor) -> Tensor:
    x, indices = together(x, indices)
    picked: Tensor = x[tuple(indices.long().unbind(-1))]
    return picked


def scatter_nd(op: Op, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    x, indices, updates = together(x, indices, updates)
    add = op.get("reduction", "none") == "add"
    where = tuple(indices.long().unbind(-1))
    return x.index_put(where, updates.to(x.dtype), accumulate=add)


def expand(op: Op, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(ints(shape))))


def tile(op: Op, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(ints(repeats))


def shape_of(op: Op, x: Tensor) -> Tensor:
    end = op.get("end", x.dim())
    return torch.tensor(x.shape[op.get("start", 0) : end], dtype=torch.int64)


def constant_of_shape(op: Op, shape: Tensor) -> Tensor:
    value = op.get("value")
    fill = torch.zeros(1) if value is None else torch.as_tensor(value)
    return fill.reshape(()).expand(ints(shape)).clone()


def arange(op: Op, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    dtype = start.dtype
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=dtype)


def trilu(op: Op, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = int(k) if k is not None else 0
    return torch.triu(x, diagonal) if op.get("upper", 1) else torch.tril(x, diagonal)


def top_k(op: Op, x: Tensor, k: Tensor) -> Sequence[Tensor]:
    largest, ordered = bool(op.get("largest", 1)), bool(op.get("sorted", 1))
    return torch.topk(x, int(k), op.get("axis", -1), largest, ordered)


# -- images -------------------------------------------------------------------------


def pad(
    op: Op,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """Attributes before opset 11, inputs from then on; negative pads cut."""
    amounts = ints(pads) if pads is not None else list(op.get("pads"))
    dims = ints(axes) if axes is not None else list(range(x.dim()))
    sides = [(0, 0)] * x.dim()
    for i, dim in enumerate(dims):
        sides[dim % x.dim()] = (amounts[i], amounts[len(dims) + i])
    mode = op.get("mode", "constant")
    if mode == "constant":
        fill = float(value) if value is not None else op.get("value", 0.0)
        return F.pad(x, [n for pair in reversed(sides) for n in pair], value=fill)
    for dim, (before, after) in enumerate(sides):
        if before or after:
            x = x.index_select(
                dim, _padded(mode, x.shape[dim], before, after, x.device)
            )
    return x


def _padded(mode: str, size: int, before: int, after: int, device: Any) -> Tensor:
    index = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.minimum(index, period - index)


def depth_to_space(op: Op, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = op.get("blocksize")
    if op.get("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(op: Op, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = op.get("blocksize")
    y = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * b**2, h // b, w // b)


def resize(
    op: Op,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Separable: along each axis, a weighted sum of one, two or four neighbours."""
    axes = op.get("axes", list(range(x.dim())))
    factors = [1.0] * x.dim()
    lengths = list(x.shape)
    if sizes is not None:
        for axis, n in zip(axes, ints(sizes), strict=True):
            lengths[axis], factors[axis] = n, n / x.shape[axis]
    else:
        given = roi if op.opset < 11 else scales
        found = op.get("scales") if given is None else given.tolist()
        for axis, scale in zip(axes, found, strict=True):
            lengths[axis], factors[axis] = math.floor(x.shape[axis] * scale), scale
    for axis, scale in enumerate(factors):
        if scale != 1.0 or lengths[axis] != x.shape[axis]:
            x = _resized(op, x, axis, lengths[axis], scale)
    return x


def _resized(op: Op, x: Tensor, axis: int, length: int, scale: float) -> Tensor:
    size, mode = x.shape[axis], op.get("mode", "nearest")
    at = _source(op, torch.arange(length, dtype=torch.float64), size, length, scale)
    if mode == "nearest":
        index = _ROUND[op.get("nearest_mode", _default_rounding(op))](at)
        return x.index_select(axis, index.long().clamp(0, size - 1).to(x.device))
    if mode == "cubic":
        return _weighted(x, axis, at, _cubic(at, op.get("cubic_coeff_a", -0.75)), -1)
    at = at.clamp(0, size - 1)
    part = at - at.floor()
    return _weighted(x, axis, at, [1 - part, part], 0)


def _default_rounding(op: Op) -> str:
    return "round_prefer_floor" if op.opset >= 11 else "floor"


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _source(op: Op, at: Tensor, size: int, length: int, scale: float) -> Tensor:
    """coordinate_transformation_mode: where an output position lies in the input."""
    default = "half_pixel" if op.opset >= 11 else "asymmetric"
    mode = op.get("coordinate_transformation_mode", default)
    if mode == "asymmetric":
        return at / scale
    if mode == "align_corners":
        return at * (size - 1) / (length - 1) if length > 1 else at * 0
    if mode == "pytorch_half_pixel" and length == 1:
        return at * 0
    if mode == "half_pixel_symmetric":
        true = size * scale
        return size / 2 * (1 - length / true) + (at + 0.5) / scale - 0.5
    return (at + 0.5) / scale - 0.5


def _cubic(at: Tensor, a: float) -> list[Tensor]:
    """Keys's weights of the four neighbours, from one before to two behind."""
    t = at - at.floor()

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _weighted(
    x: Tensor, axis: int, at: Tensor, weights: Sequence[Tensor], first: int
) -> Tensor:
    size = x.shape[axis]
    view = [-1 if i == axis else 1 for i in range(x.dim())]
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for offset, weight in enumerate(weights, first):
        index = (at.floor().long() + offset).clamp(0, size - 1).to(x.device)
        total = total + x.index_select(axis, index) * weight.to(x).view(view)
    return total


TABLE: dict[str, Function] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Pad": pad,
    "Range": arange,
    "Reshape": reshape,
    "Resize": resize,
    "ScatterND": scatter_nd,
    "Shape": shape_of,
    "Size": lambda op, x: torch.tensor(x.numel()),
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "TopK": top_k,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
    "Upsample": resize,
}
