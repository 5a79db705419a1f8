"""Matching a block to its targets: which fit is best is told by held-out rows.

Targets are the original's outputs before the activation. Where the activation clamps
(ReLU, Clip), what it cuts off need not be matched: targets there are replaced by the
nearest value that the activation maps to the same output, given the present fit. Each
such step lowers an upper bound of the error behind the activation (a majorisation of
the problem of Zhang et al. 2015, §3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from squeeze.calibrate.stats import Stats
from squeeze.rewrite.fit import forms
from squeeze.rewrite.fit.forms import Form, Target
from squeeze.rewrite.fit.solve import RIDGE, Affine, solve

Array = np.ndarray
ROUNDS = 12  # of matching behind the activation; none raises its upper bound


@dataclass(frozen=True)
class Clamp:
    """An activation that is the identity between two bounds and flat outside."""

    low: float = -np.inf
    high: float = np.inf

    def __call__(self, y: Array) -> Array:
        return np.asarray(np.clip(y, self.low, self.high))

    def free(self, wanted: Array, present: Array) -> Array:
        """Targets of least effort: what is cut off may stay where it is."""
        below = np.where(wanted <= self.low, np.minimum(present, self.low), wanted)
        return np.where(wanted >= self.high, np.maximum(present, self.high), below)


@dataclass(frozen=True)
class Fitted:
    """Factors or a weight with its bias, and the relative error on held-out rows."""

    form: Form
    bias: Array
    error: float
    method: str


def target_of(stats: Stats, width: int) -> Target:
    """The covariances of rows `[x (width) | y]`."""
    covariance = stats.covariance
    spread = float(np.trace(covariance[width:, width:]))
    return Target(covariance[:width, :width], covariance[:width, width:], spread)


def fit(
    start: Form,
    stats: Stats,
    held: Stats,
    clamp: Clamp | None = None,
    *,
    sweeps: int = forms.SWEEPS,
    bias: Array | None = None,
) -> Fitted:
    """The best of: the start, least squares, sweeps, matching behind the activation.

    Statistics are of rows `[x | y]`; `bias` is the start's own.
    """
    width = start.kernel().shape[1]
    target = target_of(stats, width)
    judge = _judge(held, width, clamp)
    found = [_judged(judge, start, stats, width, "closed form")]
    if bias is not None:  # the original's, where nothing was lost, is exact
        error = judge(Affine(start.kernel(), bias))
        found.append(Fitted(start, bias, error, "closed form"))
    if target.spread > 0:
        swept = forms.sweep(start, target, sweeps)
        found.append(_judged(judge, swept, stats, width, "least squares"))
        best = min(found, key=lambda f: f.error)
        if clamp is not None and stats.sample is not None and best.error > 1e-9:
            found += _behind(best, stats, judge, clamp)
    return min(found, key=lambda f: f.error)


def _judged(
    judge: Callable[[Affine], float], form: Form, stats: Stats, width: int, method: str
) -> Fitted:
    """With the bias that meets the targets' means."""
    bias = stats.mean[width:] - form.kernel() @ stats.mean[:width]
    return Fitted(form, bias, judge(Affine(form.kernel(), bias)), method)


def _judge(held: Stats, width: int, clamp: Clamp | None) -> Callable[[Affine], float]:
    """Relative squared error behind the activation, or before it without rows."""
    if clamp is None or held.sample is None:
        return lambda affine: affine.error(held)
    rows = held.sample.matrix.astype(np.float64)
    x, wanted = rows[:, :width], clamp(rows[:, width:])
    spread = float(np.square(wanted - wanted.mean(0)).sum())
    if spread == 0:
        return lambda affine: affine.error(held)

    def error(affine: Affine) -> float:
        made = clamp(x @ affine.weight.T + affine.bias)
        return float(np.square(made - wanted).sum() / spread)

    return error


def _behind(
    best: Fitted, stats: Stats, judge: Callable[[Affine], float], clamp: Clamp
) -> list[Fitted]:
    """Rounds of least squares of the last factor on freed targets.

    Only where there are rows enough for its features; only the last factor moves, the
    others gain next to nothing.
    """
    assert stats.sample is not None
    form = best.form
    width = form.kernel().shape[1]
    rows = stats.sample.matrix
    x = form.read(rows[:, :width].T.astype(np.float64))  # (groups, features, rows)
    groups, features, count = x.shape
    if count < 2 * features:
        return []
    wanted = rows[:, width:].T.astype(np.float64).reshape(groups, -1, count)
    mean = x.mean(2, keepdims=True)
    x -= mean
    gram = x @ x.swapaxes(1, 2) / count
    inverse = np.stack([solve(g, np.eye(features), RIDGE) for g in gram])
    last = form.factors[-1].reshape(groups, -1, features)
    bias = best.bias.reshape(groups, -1, 1) + last @ mean
    for _ in range(ROUNDS):
        freed = clamp.free(wanted, last @ x + bias)
        bias = freed.mean(2, keepdims=True)
        cross = (freed - bias) @ x.swapaxes(1, 2) / count
        last = last + (cross - last @ gram) @ inverse
    made = form.with_factor(len(form.factors) - 1, last.reshape(form.factors[-1].shape))
    bias = (bias - last @ mean).reshape(-1)
    error = judge(Affine(made.kernel(), bias))
    return [Fitted(made, bias, error, "least squares behind the activation")]


def dense(weight: Array, groups: int = 1) -> Form:
    """A last convolution alone, as a form: (O, D) on all its features.

    Grouped: each group's outputs read its own features.
    """
    if groups == 1:
        return Form("last", "od->od", (weight,))
    out, width = weight.shape
    eye = np.eye(groups)
    parts = weight.reshape(groups, out // groups, width)
    return Form("last", "gh,god->gohd", (eye, parts), rows=2, fixed=(0,))
