"""Fitting in network order: inputs as compressed so far, targets of the original.

Sites are fitted in at most `WAVES` passes over the data. A pass runs the original and
the network as rewritten so far side by side, so that each fit repairs what those before
it have done (asymmetric fitting: Zhang et al. 2015, §3.3). Sites of one wave don't see
one another's changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from squeeze import shapes as shaping
from squeeze.calibrate.data import Data
from squeeze.calibrate.stats import POSITIONS, Collector, Products, Stats
from squeeze.cost.layers import count
from squeeze.shapes import InputShapes, Shapes

WAVES = 8  # passes over the data at most
PASS_MACS = 2e12  # that all passes together may cost beyond the first: about a minute
HELD = 5  # every fifth sample judges the fits and is not fitted to
ROW_BYTES = 128 * 2**20  # of sampled rows kept per site

Progress = Callable[[str, int, int], None]  # what, samples done, samples in all


class Task(Protocol):
    """One site to be fitted."""

    @property
    def name(self) -> str: ...

    def attach(self, graph: ir.Graph) -> None:
        """Put the block beside the site, reading its input, read by nothing."""

    def wanted(self, shapes: Shapes) -> Products | None:
        """Statistics `[x | y …]`: columns of model 1 are the rewritten network's."""

    def solve(self, stats: Stats, held: Stats) -> None:
        """Find the weights, and the error on held-out rows."""

    def settle(self, graph: ir.Graph) -> None:
        """Put the block in the site's place."""


@dataclass(frozen=True)
class Calibration:
    """Data to fit to, and to judge fits by; both from the calibration samples."""

    fitting: Data
    held: Data
    seed: int = 0
    progress: Progress | None = None

    @classmethod
    def of(
        cls, data: Data, seed: int = 0, progress: Progress | None = None
    ) -> Calibration:
        """Every fifth sample is held out; with under five, samples serve as both."""
        index = np.arange(len(data))
        mask = index // data.batch_size % HELD == HELD - 1
        if not mask.any():
            mask = index % HELD == HELD - 1
        if not mask.any() or mask.all() or len(data) < HELD:
            return cls(data, data, seed, progress=progress)
        return cls(
            data.take(index[~mask]), data.take(index[mask]), seed, progress=progress
        )

    @property
    def samples(self) -> int:
        """All that there are, fitted to or not."""
        if self.fitting is self.held:
            return len(self.fitting)
        return len(self.fitting) + len(self.held)

    def over(
        self, collector: Collector, what: str
    ) -> tuple[dict[str, Stats], dict[str, Stats]]:
        """Statistics to fit to, and held-out ones."""
        total = len(self.fitting) + len(self.held)

        def report(before: int) -> Callable[[int, int], None] | None:
            if self.progress is None:
                return None
            show = self.progress
            return lambda done, _: show(what, before + done, total)

        fitted = collector.over(self.fitting, report(0))
        return fitted, collector.over(self.held, report(len(self.fitting)))


def run(
    original: ir.Model,
    working: ir.Model,
    tasks: Sequence[Task],
    calibration: Calibration,
    given: InputShapes,
) -> None:
    """Fit the tasks, in network order, and put them into `working`.

    `original` computes the targets and is not changed.
    """
    source = shaping.infer(original, given)
    number = _waves(original, source, len(tasks), calibration)
    for index, wave in enumerate(np.array_split(np.arange(len(tasks)), number)):
        picked = [tasks[i] for i in wave]
        for task in picked:
            task.attach(working.graph)
        shapes = shaping.infer(working, given)
        wanted = {t.name: w for t in picked if (w := t.wanted(shapes)) is not None}
        collector = Collector(
            original,
            source,
            wanted,
            others=[(working, shapes)],
            samples=calibration.samples,
            seed=calibration.seed,
        )
        fitted, held = calibration.over(
            collector, f"fitting, pass {index + 1} of {number}"
        )
        del collector
        for task in picked:
            if task.name in fitted:
                task.solve(fitted.pop(task.name), held.pop(task.name))
            task.settle(working.graph)


def _waves(
    original: ir.Model, shapes: Shapes, tasks: int, calibration: Calibration
) -> int:
    """As many passes as sites, up to `WAVES`; fewer where a pass is expensive."""
    samples = len(calibration.fitting) + len(calibration.held)
    macs = count(original.graph, shapes)[0] * samples
    return int(max(1, min(WAVES, tasks, 1 + PASS_MACS * 2 // max(macs, 1))))


def kept_samples(width: int, positions: int = POSITIONS) -> int:
    """How many samples' rows to keep, by what they take in memory."""
    return max(ROW_BYTES // (4 * width * positions), 1)


def few_rows(stats: Stats, width: int) -> tuple[int, int] | None:
    """(rows, inputs) where there are too few rows to tell the inputs apart."""
    return (stats.count, width) if stats.count < 2 * width else None


def shortages(found: Mapping[str, tuple[int, int] | None]) -> list[str]:
    """One note for all layers that were fitted to few rows, with the worst."""
    short = {name: few for name, few in found.items() if few is not None}
    if not short:
        return []
    name = min(short, key=lambda name: short[name][0] / short[name][1])
    rows, width = short[name]
    return [
        f"few samples for {len(short)} of {len(found)} layers ({name!r}: {rows} rows "
        f"for {width} inputs): those fits lean on their start; more --samples help"
    ]
