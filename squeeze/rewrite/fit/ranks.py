"""How many ranks to keep."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
TOLERANCE = 1e-12  # of the energy: rounding in sums of squares


def by_energy(spectrum: Array, energy: float) -> int:
    """The smallest rank that keeps this share of the squared singular values.

    `spectrum` holds squared singular values, largest first.
    """
    kept = np.cumsum(spectrum)
    if len(kept) == 0 or kept[-1] <= 0:
        return 1
    enough = kept >= (energy - TOLERANCE) * kept[-1]
    return int(np.argmax(enough)) + 1


def evbmf(singular: Array, rows: int, columns: int) -> int:
    """Rank of a noisy (rows, columns) matrix from its singular values, at least 1.

    The global analytic solution of empirical variational Bayesian matrix factorisation
    (Nakajima, Sugiyama, Babacan, Tomioka 2013, Theorem 2 and Corollary 1), its noise
    variance found by minimising the free energy on a grid, then around its best point.
    """
    low, high = min(rows, columns), max(rows, columns)
    squares = np.sort(np.asarray(singular, np.float64))[::-1][:low] ** 2
    if squares.sum() == 0:
        return 1
    alpha = low / high
    tau = 2.5129 * np.sqrt(alpha)  # the paper's approximation, §3.1
    edge = (1 + tau) * (1 + alpha / tau)
    bottom = squares.sum() / (low * high)
    ceiling = min(int(np.ceil(low / (1 + alpha))) - 1, low - 1)
    top_down = squares[ceiling] / (high * edge)
    tail = squares[ceiling:].mean() / high
    least = max(top_down, tail, bottom * 1e-9)
    if least >= bottom:
        variance = bottom
    else:
        variance = _minimum(squares, low, high, edge, alpha, least, bottom)
    return max(int((squares > high * variance * edge).sum()), 1)


def _minimum(
    squares: Array,
    low: int,
    high: int,
    edge: float,
    alpha: float,
    least: float,
    most: float,
) -> float:
    """Noise variance of the least free energy."""
    for _ in range(4):
        grid = np.geomspace(least, most, 64)
        energies = [_free_energy(v, squares, low, high, edge, alpha) for v in grid]
        best = int(np.argmin(energies))
        least, most = grid[max(best - 1, 0)], grid[min(best + 1, 63)]
    return float(grid[best])


def _free_energy(
    variance: float,
    squares: Array,
    low: int,
    high: int,
    edge: float,
    alpha: float,
) -> float:
    """Free energy per noise variance, up to constants (Nakajima et al. 2013)."""
    x = np.maximum(squares / (high * variance), 1e-300)
    large, small = x[x > edge], x[x <= edge]
    spread = large - (1 + alpha)
    tau = 0.5 * (spread + np.sqrt(np.maximum(spread**2 - 4 * alpha, 0)))
    total = np.sum(small - np.log(small)) + np.sum(large - tau)
    total += np.sum(np.log((tau + 1) / large)) + alpha * np.sum(np.log(tau / alpha + 1))
    total += (low - len(x)) * np.log(variance)
    return float(total)


def rounded(rank: int, to: int, most: int) -> int:
    """The nearest multiple of `to`, at least `to` and at most `most`."""
    nearest = max(to, int(rank / to + 0.5) * to)
    return min(nearest, most) if most >= to else most
