"""Which units go: by share, by quota, or to a target, and what may never go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from math import floor

import numpy as np

from squeeze.model import node_name
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


def selected(trace: Trace, reason: Callable[[str], str | None]) -> list[Family]:
    """Families that --only and --skip leave: a family goes whole or not at all."""
    return [
        f
        for f in trace.families
        if all(reason(node_name(p.node)) is None for p in f.producers)
    ]


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


# -- to a target ------------------------------------------------------------------


@dataclass(frozen=True)
class Floors:
    """At least so many channels stay in a cell, and counts are multiples of this."""

    min_channels: int = 1
    round_to: int = 1

    def count(self, wanted: int, cell: Cell) -> int:
        """Units to keep where `wanted` would be, in [least, all]."""
        least = -(-min(self.min_channels, cell.channels) // cell.size)
        channels = rounded(max(wanted, 1) * cell.size, cell.channels, self.round_to)
        return min(max(channels // cell.size, least, 1), len(cell.units))


Measure = Callable[[Array], float]
# Errors of channels removed from one layer add up: not as independent ones (1), not
# fully in phase (2). Chosen by the output error on calibration images held out of the
# refit, on cifar10_cnn at 76, 51 and 26 % of its MACs, among 1, 1.25 and 1.5.
COHERENCE = 1.25


def to_target(
    trace: Trace,
    families: Sequence[Family],
    scores: Array,
    savings: Array,
    floors: Floors,
    measure: Measure,
    goal: float,
) -> Array | None:
    """The mask that keeps the most of what matters at `measure(keep) <= goal`.

    Units go in the order of score per MAC saved, over all families at once; a bisection
    finds where to stop, and what rounding left over is given back. None where the
    floors don't allow the goal.
    """
    ranked = [c for family in families for c in _ranked(trace, family, scores, savings)]

    def at(level: float) -> Array:
        keep = trace.full.copy()
        for cell, densities in ranked:
            count = floors.count(int((densities > level).sum()), cell)
            keep[cell.units[count:]] = False
        return refill(trace, keep, scores)

    levels = (
        np.unique(np.concatenate([d for _, d in ranked])) if ranked else np.zeros(0)
    )
    low, high = -1, len(levels) - 1  # index −1 keeps all
    if measure(trace.full) <= goal:
        return trace.full
    if high < 0 or measure(at(levels[high])) > goal:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if measure(at(levels[middle])) <= goal:
            high = middle
        else:
            low = middle
    return _give_back(at(levels[high]), ranked, floors, measure, goal)


def _ranked(
    trace: Trace, family: Family, scores: Array, savings: Array
) -> Iterator[tuple[Cell, Array]]:
    """Cells with their units best first, and the units' densities in that order."""
    for cell in cells(trace, family):
        order = np.argsort(-scores[cell.units], kind="stable")
        units = cell.units[order]
        lost = np.cumsum(scores[units][::-1])[::-1]  # with all that went before
        costs = scores[units] * lost ** (COHERENCE - 1)
        densities = costs / np.maximum(savings[units], 1e-30)
        yield Cell(units, cell.size), np.minimum.accumulate(densities)


def _give_back(
    keep: Array,
    ranked: Sequence[tuple[Cell, Array]],
    floors: Floors,
    measure: Measure,
    goal: float,
) -> Array:
    """Add units back, the most worthwhile first, until nothing fits the goal."""
    waiting: list[tuple[float, int]] = []

    def queue(index: int) -> None:
        cell, densities = ranked[index]
        count = int(keep[cell.units].sum())
        if count < len(cell.units):
            heappush(waiting, (-float(densities[count]), index))

    for index in range(len(ranked)):
        queue(index)
    while waiting:
        _, index = heappop(waiting)
        cell, _ = ranked[index]
        count = int(keep[cell.units].sum())
        step = max(1, floors.round_to // cell.size)
        trial = keep.copy()
        trial[cell.units[: count + step]] = True
        if measure(trial) <= goal:  # else it never will: there is only less room
            keep = trial
            queue(index)
    return keep


def savings(trace: Trace) -> Array:
    """MACs that go with each unit alone, all others kept."""
    saved = np.zeros(len(trace.root))
    for c in trace.contractions:
        for labels in c.letters.values():
            share_of = np.bincount(trace.units(labels), minlength=len(saved))
            saved += c.macs * share_of / len(labels)
    saved[0] = 0
    return saved
