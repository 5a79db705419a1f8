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

from squeeze.rewrite.fit.solve import RIDGE, cholesky, solve

Array = np.ndarray
SWEEPS = 6  # of all factors, each followed by least squares of the last
STEPS = 12  # of conjugate gradients per factor: the next sweep goes on from there
WORK = 1e11  # MACs in float64 that the sweeps of a site may take: some seconds
# structures whose last factor reads inputs of its own, so that nothing (F, D) is needed
READ_APART = ("gnl,ogn->ogl", "gnc,gonk->gock", "gh,god->gohd")


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

    def read(self, matrix: Array, group: slice = slice(None)) -> Array:
        """What the last factor combines, of columns (D, M): (groups, F, M).

        One group, where every output combines all of it. `kernel() @ matrix` is the
        last factor times this.
        """
        first = self.factors[0]
        columns = matrix.shape[1]
        if self.spec == "gnl,ogn->ogl":
            parts = matrix.reshape(len(first), -1, columns)
            return np.asarray(np.matmul(first, parts).reshape(1, -1, columns))
        if self.spec == "gnc,gonk->gock":
            picked = first[group].reshape(-1, first.shape[2])
            made = picked @ matrix.reshape(first.shape[2], -1)
            return np.asarray(made.reshape(-1, self.factors[1][0, 0].size, columns))
        if self.spec == "gh,god->gohd":
            return np.asarray(matrix.reshape(len(first), -1, columns)[group])
        if len(self.factors) == 1:
            return matrix[None]
        shape = self.factors[-1].shape[1:]
        eye = np.eye(prod(shape)).reshape(-1, *shape)
        return np.asarray(self.kernel(-1, eye) @ matrix)[None]

    def times(self, matrix: Array) -> Array:
        """`kernel() @ matrix`: (O, M) for (D, M), the short way."""
        if self.spec not in READ_APART:
            return np.asarray(self.kernel() @ matrix)
        read = self.read(matrix)
        last = self.factors[-1].reshape(len(read), -1, read.shape[1])
        return np.asarray(np.matmul(last, read).reshape(-1, matrix.shape[1]))

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
    """Least squares of the last factor, damped towards where it is, group by group."""
    read = form.read(target.inputs)
    groups = len(read)
    last = form.factors[-1].reshape(groups, -1, read.shape[1])
    targets = target.cross.reshape(len(target.cross), groups, -1)
    steps = []
    for index in range(groups):
        one = slice(index, index + 1)
        gram = form.read(read[index].T, one)[0]
        right = form.read(targets[:, index], one)[0] - gram @ last[index].T
        steps.append(solve(gram, right, ridge).T)
    shape = form.factors[-1].shape
    return form.with_factor(
        len(form.factors) - 1, (last + np.stack(steps)).reshape(shape)
    )


def descend(
    form: Form, index: int, target: Target, steps: int = STEPS, ridge: float = RIDGE
) -> Form:
    """Conjugate gradients on one factor's normal equations, from where it is."""
    normal = _normal(form, index, target)
    rest = target.cross.T - form.times(target.inputs)
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
        index, form.with_factor(index, factor).times(target.inputs)
    )


def work(form: Form) -> float:
    """MACs of one sweep over the kernel's covariance."""
    kernel = form.shape()
    out = prod(kernel[: form.rows])
    width = prod(kernel[form.rows :])
    first = form.factors[0]
    if form.spec in READ_APART:
        read = inner = first.size * width // first.shape[-1] * width
    else:
        read, inner = form.factors[-1][0].size * width**2, out * width**2
    return float(STEPS * inner * (len(form.factors) - 1) + read)


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


def nested_errors(form: Form, target: Target, ridge: float = RIDGE) -> Array:
    """(ranks,) relative errors of the first 1, 2, … ranks, the last factor refitted.

    The last factor is (O, rank, …). One Cholesky factor serves all: that of the first
    features is its leading part, and each row of L⁻¹R is what a feature adds.
    """
    read = form.read(target.inputs)[0]
    gram = form.read(read.T)[0]
    right = form.read(target.cross)[0]
    lower = cholesky(gram, ridge)
    gained = np.square(np.linalg.solve(lower, right)).sum(1)
    ranks = form.factors[-1].shape[1]
    kept = gained.reshape(ranks, -1).sum(1).cumsum()
    return np.asarray(np.maximum(1 - kept / max(target.spread, 1e-300), 0.0))


def tail(spectrum: Array, rank: int) -> float:
    """Share of a spectrum behind its first ranks."""
    total = spectrum.sum()
    return float(spectrum[rank:].sum() / total) if total > 0 else 0.0


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
