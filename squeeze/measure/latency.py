"""Latency in onnxruntime, two models side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from squeeze.measure import session
from squeeze.measure.inputs import Feeds, random_feeds
from squeeze.measure.session import Session
from squeeze.shapes import Shapes


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds, and after ÷ before with its 95 % bootstrap interval."""

    before_ms: float
    after_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def side_by_side(
    before: Path,
    after: Path,
    before_shapes: Shapes,
    after_shapes: Shapes,
    seed: int = 0,
    seconds: float = 2.0,
) -> Latency:
    """Time two models in turn (A B A B …) in this process, about `seconds` in all."""
    sessions = [session.create(before), session.create(after)]
    shapes = (before_shapes.inputs, after_shapes.inputs)
    feeds = [random_feeds(s, i, seed) for s, i in zip(sessions, shapes, strict=True)]
    pairs = list(zip(sessions, feeds, strict=True))
    for _ in range(3):
        warm = sum(_once(s, f) for s, f in pairs)
    runs = int(np.clip(seconds / max(warm, 1e-6), 5, 1000))
    times = np.array([[_once(s, f) for s, f in pairs] for _ in range(runs)])
    low, high = ratio_interval(times, seed)
    a, b = np.median(times, axis=0)
    return Latency(a * 1e3, b * 1e3, float(b / a), low, high)


def _once(runner: Session, feeds: Feeds) -> float:
    start = time.perf_counter()
    runner.run(None, feeds)
    return time.perf_counter() - start


def ratio_interval(
    times: np.ndarray, seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians; `times` is (runs, 2)."""
    rng = np.random.default_rng(seed)
    picked = times[rng.integers(0, len(times), (draws, len(times)))]
    a, b = np.moveaxis(np.median(picked, axis=1), -1, 0)
    low, high = np.quantile(b / a, [0.025, 0.975])
    return float(low), float(high)
