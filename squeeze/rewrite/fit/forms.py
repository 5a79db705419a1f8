"""Kernels as products of factors: one einsum per structure.

A structure without anything non-linear inside computes one kernel (O, C, *k): the sum
over products that an einsum spells out. From that come its closed-form start (an SVD),
its effective kernel, and, with statistics of the layer's inputs and targets, least
squares for one factor at a time, on the error of the *outputs*. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from squeeze.rewrite.fit.solve import RIDGE, solve

Array = np.ndarray
SWEEPS = 6  # of all factors; the error falls by under 2 % a sweep from there on
STEPS = 12  # of conjugate gradients per factor: a sweep later it is refined again
WORK = 4e11  # MACs per site that sweeps may take: some seconds


@dataclass(frozen=True)
class Form:
    """Factors whose einsum is the kernel. The last factor is the last convolution's.

    `spec` gives the kernel as (outputs…, inputs…, taps…); `rows` of its labels are
    outputs. Factors in `fixed` are not fitted.
    """

    name: str
    spec: str
    factors: tuple[Array, ...]
    rows: int = 1
    fixed: tuple[int, ...] = ()

    @property
    def labels(self) -> list[str]:
        return self.spec.split("->")[0].split(",")

    def shape(self) -> list[int]:
        """Sizes of the kernel's labels."""
        sizes = {
            label: size
            for labels, factor in zip(self.labels, self.factors, strict=True)
            for label, size in zip(labels, factor.shape, strict=True)
        }
        return [sizes[label] for label in self.spec.split("->")[1]]

    def kernel(self, index: int = -1, factor: Array | None = None) -> Array:
        """(O, C·K), with one factor exchanged if it is given."""
        factors = list(self.factors)
        if factor is not None:
            factors[index] = factor
        made = np.einsum(self.spec, *factors, optimize=True)
        return np.asarray(made.reshape(prod(made.shape[: self.rows]), -1))

    def gradient(self, index: int, kernel: Array) -> Array:
        """What a change of the kernel (O, C·K) is for one factor: the adjoint."""
        others = [i for i in range(len(self.factors)) if i != index % len(self.factors)]
        inputs = ",".join([self.spec.split("->")[1], *(self.labels[i] for i in others)])
        arrays = [self.factors[i] for i in others]
        spec = f"{inputs}->{self.labels[index]}"
        made = np.einsum(spec, kernel.reshape(self.shape()), *arrays, optimize=True)
        return np.asarray(made)

    def with_factor(self, index: int, factor: Array) -> Form:
        factors = list(self.factors)
        factors[index] = factor
        return replace(self, factors=tuple(factors))


# -- starts: the closed forms on weights alone --------------------------------------


def grouped_pointwise(weight: Array, groups: int, inner: int) -> Form:
    """Grouped convolution with `inner` outputs per group, then 1×1 (Guo et al. 2018).

    One group per channel is depthwise-separable with multiplier `inner`; one group is
    a plain convolution to `inner` channels. Squared error: the singular values left
    out; exact at inner = min(O, C/groups · K).
    """
    out = weight.shape[0]
    u, s, v = np.linalg.svd(
        weight.reshape(out, groups, -1).transpose(1, 0, 2), full_matrices=False
    )
    root = np.sqrt(s)
    first = _padded(v * root[:, :, None], 1, inner)
    last = _padded(u * root[:, None, :], 2, inner).transpose(1, 0, 2)
    return Form("grouped, 1×1", "gnl,ogn->ogl", (first, last))


def pointwise_grouped(weight: Array, groups: int, inner: int) -> Form:
    """1×1 to `inner` channels per group, then a grouped convolution (A, per output)."""
    out, cin = weight.shape[:2]
    taps = prod(weight.shape[2:])
    part = weight.reshape(groups, out // groups, cin, taps).transpose(0, 2, 1, 3)
    u, s, v = np.linalg.svd(part.reshape(groups, cin, -1), full_matrices=False)
    root = np.sqrt(s)
    first = _padded(u * root[:, None, :], 2, inner).transpose(0, 2, 1)
    last = _padded(v * root[:, :, None], 1, inner)
    last = last.reshape(groups, inner, out // groups, taps).transpose(0, 2, 1, 3)
    return Form("1×1, grouped", "gnc,gonk->gock", (first, last), rows=2)


def spatial(weight: Array, rank: int, vertical_first: bool = True) -> Form:
    """k×1 to `rank` channels, then 1×k, or the other way round (Jaderberg 2014)."""
    out, cin, high, wide = weight.shape
    axes = (1, 2, 0, 3) if vertical_first else (1, 3, 0, 2)
    near, far = (high, wide) if vertical_first else (wide, high)
    u, s, v = np.linalg.svd(
        weight.transpose(axes).reshape(cin * near, out * far), full_matrices=False
    )
    root = np.sqrt(s)
    first = _padded(u * root, 1, rank).T.reshape(rank, cin, near)
    last = _padded(v * root[:, None], 0, rank).reshape(rank, out, far)
    spec = "rci,orj->ocij" if vertical_first else "rcj,ori->ocij"
    return Form("spatial", spec, (first, last.transpose(1, 0, 2)))


def tucker(weight: Array, rank_in: int, rank_out: int) -> Form:
    """1×1 down, k×k, 1×1 up: Tucker-2 by the leading subspaces (Kim 2016)."""
    out, cin = weight.shape[:2]
    flat = weight.reshape(out, cin, -1)
    outer = _padded(_leading(flat.reshape(out, -1), rank_out), 1, rank_out)
    inner = _leading(flat.transpose(1, 0, 2).reshape(cin, -1), rank_in)
    inner = _padded(inner, 1, rank_in)
    core = np.einsum("ock,oa,cb->abk", flat, outer, inner, optimize=True)
    return Form("Tucker-2", "bc,abk,oa->ock", (inner.T, core, outer))


def _leading(matrix: Array, rank: int) -> Array:
    """(rows, ≤ rank) leading left singular vectors, by the smaller Gram."""
    _, vectors = np.linalg.eigh(matrix @ matrix.T)
    return np.asarray(vectors[:, ::-1][:, :rank])


def _padded(array: Array, axis: int, size: int) -> Array:
    """Cut to `size` along an axis, or filled up with zeros."""
    have = array.shape[axis]
    if have >= size:
        return np.take(array, np.arange(size), axis)
    widths = [(0, size - have if a == axis else 0) for a in range(array.ndim)]
    return np.pad(array, widths)


# -- least squares on statistics ----------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a kernel should do: covariances of its inputs x and the targets y.

    inputs (D, D), cross (D, O), spread the trace of the targets' covariance.
    """

    inputs: Array
    cross: Array
    spread: float

    def error(self, kernel: Array) -> float:
        """Squared error of the outputs over the targets' variance."""
        fitted = np.einsum("od,od->", kernel @ self.inputs, kernel)
        crossed = np.einsum("od,do->", kernel, self.cross)
        left = max(self.spread - 2 * crossed + fitted, 0.0)
        return float(left / self.spread) if self.spread > 0 else float(left > 0)


def fit_last(form: Form, target: Target, ridge: float = RIDGE) -> Form:
    """Least squares of the last factor, damped towards where it is."""
    if form.labels[-1][0] != "o":
        steps = STEPS if not form.fixed else 8 * STEPS  # alone, it must converge here
        return descend(form, len(form.factors) - 1, target, steps, ridge)
    last = form.factors[-1]
    width = last[0].size
    features = form.kernel(-1, np.eye(width).reshape(width, *last.shape[1:]))
    left = features @ (target.cross - target.inputs @ form.kernel().T)
    step = solve(features @ target.inputs @ features.T, left, ridge).T
    return form.with_factor(len(form.factors) - 1, last + step.reshape(last.shape))


def descend(
    form: Form, index: int, target: Target, steps: int = STEPS, ridge: float = RIDGE
) -> Form:
    """Conjugate gradients on one factor's normal equations, from where it is."""
    normal = _normal(form, index, target)
    rest = target.cross.T - form.kernel() @ target.inputs
    residual = form.gradient(index, rest)
    probe = residual
    scale = float(np.vdot(probe, normal(probe)) / max(np.vdot(probe, probe), 1e-300))
    lam = ridge * scale / STEPS
    step, direction = np.zeros_like(residual), residual
    size = start = float(np.vdot(residual, residual))
    for _ in range(steps):
        if size <= 1e-20 * start or size == 0:
            break
        moved = normal(direction) + lam * direction
        length = size / float(np.vdot(direction, moved))
        step, residual = step + length * direction, residual - length * moved
        size, last = float(np.vdot(residual, residual)), size
        direction = residual + size / last * direction
    return form.with_factor(index, form.factors[index] + step)


def _normal(form: Form, index: int, target: Target) -> Callable[[Array], Array]:
    """The normal operator of one factor: cheap for depthwise, else over the kernel."""
    if index == 0 and form.spec == "gnl,ogn->ogl":
        first, last = form.factors
        groups, _, width = first.shape
        gram = target.inputs.reshape(groups, width, groups, width).transpose(0, 2, 1, 3)
        mixed = np.einsum("ogn,ohm->gnhm", last, last, optimize=True)

        def blockwise(factor: Array) -> Array:
            moved = np.matmul(factor[:, None], gram)  # (h, g, m, l)
            return np.asarray(np.einsum("gnhm,hgml->gnl", mixed, moved))

        return blockwise
    return lambda factor: form.gradient(
        index, form.kernel(index, factor) @ target.inputs
    )


def work(form: Form) -> float:
    """MACs of one sweep over the kernel's covariance."""
    kernel = form.shape()
    out = prod(kernel[: form.rows])
    width = prod(kernel[form.rows :])
    cheap = form.spec == "gnl,ogn->ogl"
    inner = form.factors[0].size * width if cheap else out * width**2
    return float(
        STEPS * inner * (len(form.factors) - 1) + form.factors[-1][0].size * width**2
    )


def sweep(
    form: Form, target: Target, sweeps: int = SWEEPS, ridge: float = RIDGE
) -> Form:
    """Alternating least squares over all factors, as many sweeps as `WORK` allows."""
    inner = [i for i in range(len(form.factors) - 1) if i not in form.fixed]
    form = fit_last(form, target, ridge)
    for _ in range(min(sweeps, int(WORK / work(form))) if inner else 0):
        for index in inner:
            form = descend(form, index, target, ridge=ridge)
        form = fit_last(form, target, ridge)
    return form


def output_pca(
    weight: Array, rank: int, target: Target | None, outputs: Array | None = None
) -> Form:
    """k×k to `rank` channels, then 1×1 (Zhang et al. 2015); without data, SVD.

    `weight` (O, D). With a target: the best kernel of that rank for its inputs, by
    projecting the unrestricted one on the leading eigenvectors of its outputs'
    covariance (Zhang et al. 2015, §3.3). With `outputs` (O, O), the covariance of the
    layer's own outputs, projects on its eigenvectors.
    """
    if target is not None:
        weight = (
            weight + solve(target.inputs, target.cross - target.inputs @ weight.T).T
        )
        outputs = weight @ target.inputs @ weight.T
    if outputs is None:
        outputs = weight @ weight.T
    _, vectors = np.linalg.eigh(outputs)
    basis = _padded(vectors[:, ::-1], 1, rank)
    first = (basis.T @ weight)[None]
    return Form("output-PCA", "gnl,ogn->ogl", (first, basis[:, None, :]))


def spectrum(covariance: Array) -> Array:
    """Eigenvalues, largest first, none below zero."""
    return np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0)
