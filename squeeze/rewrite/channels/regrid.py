"""Labels through Reshape: axes that merge, and axes that split into a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from squeeze.rewrite.channels.labels import Array, Labels

Block = tuple[range, range]
MERGED = "two axes of channels merge into one"


def blocks(source: Sequence[int], target: Sequence[int]) -> Iterator[Block]:
    """Minimal runs of axes with equal products: what a Reshape really regroups."""
    i = j = 0
    while i < len(source) or j < len(target):
        first, second, p, q = i, j, 1, 1
        while (i == first and j == second) or p != q:
            if i < len(source) and (p <= q or j == len(target)):
                p *= source[i]
                i += 1
            else:
                q *= target[j]
                j += 1
        yield range(first, i), range(second, j)


def reshape(
    labels: Labels, axes: Sequence[Array], shape: Sequence[int], attention: str
) -> list[Array]:
    """Labels of every axis after a Reshape to `shape`."""
    out: list[Array] = [labels.plain(n) for n in shape]
    for before, after in blocks([len(a) for a in axes], shape):
        mine = [axes[i] for i in before]
        labelled = [a for a in mine if a.any()]
        if not labelled:
            continue
        if len(labelled) > 1 and sum((a > 0).any() for a in labelled) > 1:
            for one in labelled:
                labels.protect(one, MERGED)
            continue
        sizes = [shape[i] for i in after]
        for i, line in zip(
            after, _regroup(labels, mine, sizes, attention), strict=True
        ):
            out[i] = line
    return out


def _regroup(
    labels: Labels, axes: Sequence[Array], sizes: Sequence[int], attention: str
) -> list[Array]:
    """One block: spread its labelled axis over the block, then read it as a grid."""
    channel = next((i for i, a in enumerate(axes) if (a > 0).any()), None)
    if channel is None:
        channel = next(i for i, a in enumerate(axes) if a.any())
    shape = [1] * len(axes)
    shape[channel] = len(axes[channel])
    whole = [len(a) for a in axes]
    grid = np.broadcast_to(axes[channel].reshape(shape), whole).reshape(tuple(sizes))
    out = [labels.plain(n) for n in sizes]
    roots = labels.find(grid.reshape(-1)).reshape(grid.shape)
    real = [d for d, n in enumerate(sizes) if n > 1]
    for d in real:
        lines = np.moveaxis(roots, d, 0).reshape(sizes[d], -1)
        if (lines == lines[:, :1]).all():  # nothing is lost: the others are no channels
            out[d] = np.moveaxis(grid, d, 0).reshape(sizes[d], -1)[:, 0]
            return out
    d = _keep(roots, real, attention)
    out[d] = labels.collapse(np.moveaxis(grid, d, 0).reshape(sizes[d], -1), 1)
    return out


def _keep(roots: Array, real: Sequence[int], attention: str) -> int:
    """The axis that keeps its channels: the one that leaves the most units.

    With `attention` "heads" a split of one axis in two keeps the first instead.
    Ties go to the first, the whole groups.
    """
    if attention == "heads" and len(real) == 2:
        return real[0]
    return max(real, key=lambda d: (_units(roots, d), -d))


def _units(roots: Array, axis: int) -> int:
    """How many units are left when every line along `axis` becomes one."""
    lines = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
    unique, flat = np.unique(lines, return_inverse=True)
    if len(unique) == prod(lines.shape):
        return len(lines)
    scratch = Labels()
    scratch.fresh(len(unique))
    found = scratch.find(scratch.collapse(flat.reshape(lines.shape) + 1, 1))
    return len(np.unique(found))
