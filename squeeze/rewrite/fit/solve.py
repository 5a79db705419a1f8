"""Ridge least squares on Gram statistics (He et al. 2017; Zhang et al. 2015).

Everything works on centred statistics of rows `[features | targets]`, so that an
affine map's bias drops out and follows from the means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from squeeze.calibrate.stats import Stats

Array = np.ndarray
RIDGE = 1e-3  # times trace / dim: what a few thousand rows can tell


@dataclass(frozen=True)
class Affine:
    """y ≈ weight · x + bias; weight (O, D), bias (O,)."""

    weight: Array
    bias: Array

    def error(self, stats: Stats) -> float:
        """Relative squared error on rows `[x (D) | y (O)]`; the mean alone gets 1.

        The bias' own miss counts. 0 where y never varies and is met.
        """
        width = self.weight.shape[1]
        covariance, mean = stats.covariance, stats.mean
        xx, xy = covariance[:width, :width], covariance[:width, width:]
        spread = float(np.trace(covariance[width:, width:]))
        fitted = np.einsum("od,de,oe->", self.weight, xx, self.weight, optimize=True)
        crossed = np.einsum("od,do->", self.weight, xy)
        miss = mean[width:] - self.weight @ mean[:width] - self.bias
        error = max(spread - 2 * crossed + fitted, 0.0) + float(miss @ miss)
        return float(error / spread) if spread > 0 else float(error > 0)


def damping(gram: Array, ridge: float = RIDGE) -> float:
    """λ = ridge · trace / dim; tiny but positive where nothing varies."""
    return float(max(ridge * np.trace(gram) / max(len(gram), 1), np.finfo(float).tiny))


def solve(gram: Array, right: Array, ridge: float = RIDGE) -> Array:
    """(G + λI)⁻¹ R for a symmetric positive semidefinite G (D, D) and R (D, M)."""
    lam = damping(gram, ridge)
    damped = gram + lam * np.eye(len(gram))
    try:
        return np.asarray(np.linalg.solve(damped, right))
    except np.linalg.LinAlgError:  # nothing varies: use what spectrum there is
        values, vectors = np.linalg.eigh(gram)
        values = np.maximum(values, 0) + lam
        return np.asarray(vectors @ ((vectors.T @ right) / values[:, None]))


def cholesky(gram: Array, ridge: float = RIDGE) -> Array:
    """L of G + λI = L Lᵀ, with more λ where rounding left G indefinite."""
    lam, eye = damping(gram, ridge), np.eye(len(gram))
    while True:
        try:
            return np.asarray(np.linalg.cholesky(gram + lam * eye))
        except np.linalg.LinAlgError:
            if not np.isfinite(lam):
                raise
            lam *= 10


def regress_towards(
    stats: Stats, width: int, start: Array, ridge: float = RIDGE
) -> Affine:
    """The same, damped towards `start` (O, D) instead of 0: few samples do no harm."""
    covariance, mean = stats.covariance, stats.mean
    xx, xy = covariance[:width, :width], covariance[:width, width:]
    step = solve(xx, xy - xx @ start.T, ridge).T
    weight = start + step
    return Affine(weight, mean[width:] - weight @ mean[:width])


def refit(
    weight: Array, bias: Array, stats: Stats, kept: Array, ridge: float = RIDGE
) -> Affine:
    """Weights of a consumer whose inputs are cut down to `kept` (He et al. 2017).

    `weight` (O, D) and `bias` (O,) act on all D columns of `stats`; the result acts on
    the kept ones: W_S = W Σ[:, S] (Σ[S, S] + λI)⁻¹, b_S = b + W μ − W_S μ[S].
    """
    covariance, mean = stats.covariance, stats.mean
    inner = covariance[np.ix_(kept, kept)]
    fitted = solve(inner, covariance[kept] @ weight.T, ridge).T
    return Affine(fitted, bias + weight @ mean - fitted @ mean[kept])
