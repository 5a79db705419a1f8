"""Which units go: by share, by quota, or to a target, and what may never go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np

from squeeze.rewrite.channels.trace import Array, Family, Trace


@dataclass(frozen=True)
class Cell:
    """Units that lie on the same axes; `size` of their channels on the first axis."""

    units: Array
    size: int

    @property
    def channels(self) -> int:
        return len(self.units) * self.size


def cells(trace: Trace, family: Family) -> Iterator[Cell]:
    """A family's cells with the size of a unit in each."""
    for units in family.cells:
        size = 1
        for producer in family.producers:
            found = int((trace.units(producer.labels) == units[0]).sum())
            if found:
                size = found
                break
        yield Cell(units, size)


def thin(
    trace: Trace,
    families: Sequence[Family],
    scores: Array,
    quota: Callable[[int], int],
) -> Array:
    """Keep the best `quota(channels)` channels of every cell, never none.

    `scores` by unit, higher is kept; ties go to the first.
    """
    keep = trace.full.copy()
    for family in families:
        for cell in cells(trace, family):
            count = max(1, quota(cell.channels) // cell.size)
            order = np.argsort(-scores[cell.units], kind="stable")
            keep[cell.units[order[count:]]] = False
    return refill(trace, keep, scores)


def share(multiplier: Fraction, round_to: int = 1) -> Callable[[int], int]:
    """`floor(multiplier · channels)`, to the nearest multiple of `round_to`."""

    def quota(channels: int) -> int:
        kept = floor(multiplier * channels)
        return rounded(kept, channels, round_to)

    return quota


def rounded(kept: int, channels: int, round_to: int) -> int:
    """The multiple of `round_to` nearest to `kept` (up at a half), at most all."""
    if round_to <= 1 or kept >= channels:
        return kept
    nearest = (2 * kept + round_to) // (2 * round_to) * round_to
    return min(max(nearest, round_to), channels)


def refill(trace: Trace, keep: Array, scores: Array) -> Array:
    """Give every axis that would be left empty its best unit back."""
    for units in axis_units(trace):
        if not keep[units].any():
            keep[units[np.argmax(scores[units])]] = True
    return keep


def axis_units(trace: Trace) -> Iterator[Array]:
    """Units of every axis that consists of free units only, each axis once."""
    seen: set[bytes] = set()
    known: set[int] = set()
    for axes in (*trace.axes.values(), *trace.uses.values()):
        for labels in axes:
            if len(labels) < 2 or id(labels) in known:
                continue
            known.add(id(labels))
            if labels.min() > 0:
                units = np.unique(trace.units(labels))
                key = units.tobytes()
                if units[0] > 0 and key not in seen:
                    seen.add(key)
                    yield units
