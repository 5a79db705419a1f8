"""Intervals: coverage on made-up times, and published values."""

from __future__ import annotations

import numpy as np
import pytest

from squeeze.measure.statistics import paired_difference, ratio_interval, student_t


def _times(rng: np.random.Generator, scale: float) -> list[list[np.ndarray]]:
    """Eight rounds whose sessions differ by 2 %, four slices of ten runs each."""
    rounds = []
    for _ in range(8):
        session = scale * np.exp(rng.normal(0, 0.02))
        rounds.append(
            [
                session * np.exp(rng.normal(0, 0.01) + rng.exponential(0.05, 10))
                for _ in range(4)
            ]
        )
    return rounds


def test_interval_holds_the_truth_at_its_level() -> None:
    """99 % intervals of equal models contain 1 in at least 95 of 100 benches."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(100):
        _, low, high = ratio_interval(
            _times(rng, 1.0), _times(rng, 1.0), 0.99, seed, draws=300
        )
        inside += low <= 1 <= high
    assert inside >= 95


def test_interval_tells_a_real_difference() -> None:
    """Models 15 % apart are told apart, and the ratio is near."""
    rng = np.random.default_rng(1)
    ratio, low, high = ratio_interval(_times(rng, 1.0), _times(rng, 1.15), 0.99)
    assert 1 < low < ratio < high
    assert ratio == pytest.approx(1.15, rel=0.05)


@pytest.mark.parametrize(
    ("p", "freedom", "value"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.995, 3, 5.841),
        (0.975, 7, 2.365),
        (0.995, 7, 3.499),
    ],
)
def test_students_quantiles_are_the_tables(
    p: float, freedom: int, value: float
) -> None:
    """Within 1 % of the printed tables."""
    assert student_t(p, freedom) == pytest.approx(value, rel=0.01)


def test_paired_difference_is_symmetric_and_shrinks() -> None:
    """Swapping the models flips the interval; more samples narrow it."""
    difference, low, high = paired_difference(10, 30, 1000)
    assert difference == pytest.approx(0.02)
    assert low < difference < high
    assert low > 0
    assert paired_difference(30, 10, 1000) == pytest.approx((-0.02, -high, -low))
    _, wide_low, wide_high = paired_difference(1, 3, 100)
    assert wide_high - wide_low > high - low
