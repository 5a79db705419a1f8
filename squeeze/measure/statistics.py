"""Intervals for what is measured: repeated, paired, in few groups."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Array = np.ndarray


def ratio_interval(
    base: Sequence[Sequence[Array]],
    other: Sequence[Sequence[Array]],
    level: float = 0.95,
    seed: int = 0,
    draws: int = 1000,
) -> tuple[float, float, float]:
    """(ratio, low, high) of other ÷ base from times in rounds of slices of runs.

    A round is a pair of fresh sessions: where memory lies shifts a session's time for
    all of its life, so runs of one session are no independent measurements. The
    estimate is the geometric mean over rounds of the ratio of medians. Rounds are
    drawn with replacement, then pairs of slices within each; as rounds are few, the
    spread is expanded by Student's t (Hesterberg 2015, "What Teachers Should Know
    About the Bootstrap", §5.3: expanded intervals).
    """
    rng = np.random.default_rng(seed)
    rounds = len(base)
    estimate = float(
        np.mean([_log_ratio(b, o) for b, o in zip(base, other, strict=True)])
    )
    redrawn = np.array(
        [
            [_log_ratio(*_redrawn(b, o, rng)) for _ in range(max(20, draws // rounds))]
            for b, o in zip(base, other, strict=True)
        ]
    )
    picked = rng.integers(0, rounds, (draws, rounds))
    which = rng.integers(0, redrawn.shape[1], (draws, rounds))
    means = redrawn[picked, which].mean(1)
    spread = float(means.std())
    if rounds > 1:
        spread *= (rounds / (rounds - 1)) ** 0.5
        reach = student_t(0.5 + level / 2, rounds - 1) * spread
    else:
        reach = NormalDist().inv_cdf(0.5 + level / 2) * spread
    low, high = np.exp([estimate - reach, estimate + reach])
    return float(np.exp(estimate)), float(low), float(high)


def _log_ratio(base: Sequence[Array], other: Sequence[Array]) -> float:
    medians = [
        float(np.median(np.concatenate(list(slices)))) for slices in (other, base)
    ]
    return float(np.log(medians[0] / medians[1]))


def _redrawn(
    base: Sequence[Array], other: Sequence[Array], rng: np.random.Generator
) -> tuple[list[Array], list[Array]]:
    """Slices drawn with replacement: neighbours in time stay together."""
    picked = rng.integers(0, len(base), len(base))
    return [base[i] for i in picked], [other[i] for i in picked]


def student_t(p: float, freedom: int) -> float:
    """Quantile of Student's t, by the Cornish–Fisher series (Abramowitz, 26.7.5).

    Exact for 1 and 2 degrees of freedom; within 1 % from 3 on for p up to 0.995.
    """
    if freedom == 1:
        return float(np.tan(np.pi * (p - 0.5)))
    if freedom == 2:
        return float((2 * p - 1) / np.sqrt(2 * p * (1 - p)))
    z, n = NormalDist().inv_cdf(p), freedom
    series = (
        z,
        (z**3 + z) / 4 / n,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / n**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / n**3,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / n**4,
    )
    return float(sum(series))


def paired_difference(
    only_base: int, only_new: int, count: int, level: float = 0.95
) -> tuple[float, float, float]:
    """(difference, low, high) of two accuracies on the same samples.

    From the samples that only one of the two gets right: the adjusted Wald interval of
    Bonett and Price (2012, "Adjusted Wald Confidence Interval for a Difference of
    Binomial Proportions Based on Paired Data", eq. 3).
    """
    lost, gained = (only_base + 1) / (count + 2), (only_new + 1) / (count + 2)
    spread = ((lost + gained - (gained - lost) ** 2) / (count + 2)) ** 0.5
    reach = NormalDist().inv_cdf(0.5 + level / 2) * spread
    middle = gained - lost
    low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    return (only_new - only_base) / count, low, high
