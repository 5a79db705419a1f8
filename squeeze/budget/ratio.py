"""How much slower is one model than another, on a machine that is busy with others?

Both run in turn in one thread; what comes out is a ratio, never a time. Processor time
is compared: on an idle machine that is the latency of one thread, and on a busy one it
is what the latency would be, but for caches and memory that are shared. A block is a
few runs of each, close together, the order swapped from block to block, so that what
else the machine does touches both alike. The interval is the sign test's: order
statistics of the blocks' ratios, valid for any distribution of the noise (Conover,
Practical Nonparametric Statistics, §3.2). It is looked at a few times as blocks
gather; each look gets its share of the error, so that looking often costs nothing
in false alarms (Bonferroni).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

ERROR = 0.01  # a side of the interval misses the true ratio at most this often
LOOKS = (12, 24, 48, 96)  # blocks after which to decide
BLOCK_SECONDS = 0.02
RESOLUTION = 1.25  # a slowdown that must be told from none
FLOOR = 1.02  # two sessions of one model may differ by this, by where memory lay
WARM_UP = 3

Run = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Time of a model ÷ time of its reference, with a 99 % one-sided interval."""

    value: float
    low: float
    high: float
    blocks: int
    model_ms: float
    reference_ms: float

    def verdict(self, limit: float) -> Literal["over", "within", "unclear"]:
        """Over only where that is shown; unclear where noise hides a 25 % slowdown."""
        if self.low > limit * FLOOR:
            return "over"
        if self.high <= limit or self.high / self.low <= RESOLUTION:
            return "within"
        return "unclear"


def measure(model: Run, reference: Run, limit: float, seconds: float) -> Ratio:
    """Run both in turn until the limit is decided, or for about `seconds`."""
    repeats = _repeats(model, reference)
    start = time.perf_counter()
    times: list[tuple[float, float]] = []
    for look in LOOKS:
        while len(times) < look:
            times.append(_block(model, reference, repeats, swap=bool(len(times) % 2)))
            if time.perf_counter() - start > seconds and len(times) >= LOOKS[0]:
                break
        ratio = estimate(np.array(times))
        decided = ratio.low > limit * FLOOR or ratio.high <= limit
        if decided or time.perf_counter() - start > seconds:
            break
    return ratio


def estimate(times: np.ndarray) -> Ratio:
    """`times` is (blocks, 2): seconds of the model and of the reference."""
    ratios = np.sort(times[:, 0] / times[:, 1])
    rank = sign_rank(len(ratios), ERROR / len(LOOKS))
    model, reference = np.median(times, axis=0) * 1e3
    return Ratio(
        float(np.median(ratios)),
        float(ratios[rank]),
        float(ratios[len(ratios) - 1 - rank]),
        len(ratios),
        float(model),
        float(reference),
    )


def sign_rank(count: int, error: float) -> int:
    """Rank k of the bound: the k-th smallest of `count` (from 0) is one side's.

    The largest k for which Σ_{i ≤ k} C(count, i) / 2^count, the chance that it lies
    beyond the median, is at most `error`; at least 0, the smallest value.
    """
    total, rank = 0.0, -1
    while total <= error:
        rank += 1
        total += math.comb(count, rank) / 2**count
    return max(rank - 1, 0)


def _repeats(model: Run, reference: Run) -> int:
    """Runs of each in a block; the first runs, slow for their own reasons, go."""
    for _ in range(WARM_UP):
        pair = _once(model) + _once(reference)
    return max(1, math.ceil(BLOCK_SECONDS / max(pair, 1e-6)))


def _block(model: Run, reference: Run, repeats: int, swap: bool) -> tuple[float, float]:
    first, second = (reference, model) if swap else (model, reference)
    times = np.array([(_once(first), _once(second)) for _ in range(repeats)])
    a, b = np.median(times, axis=0)
    return (b, a) if swap else (a, b)


def _once(run: Run) -> float:
    """Processor time of this thread: what other jobs take meanwhile is not in it."""
    start = time.thread_time()
    run()
    return time.thread_time() - start
