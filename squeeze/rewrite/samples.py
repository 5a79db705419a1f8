"""What removing channels looks at: samples, and the repair that is made with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from squeeze.calibrate.data import Data, Images, Split, open_data, split
from squeeze.measure.fidelity import Fidelity, held_out
from squeeze.rewrite import criteria
from squeeze.rewrite.channels.trace import Array, Trace
from squeeze.rewrite.plan import Change
from squeeze.rewrite.refit import MOMENTS, SQUARES, Network, Repaired, refit
from squeeze.shapes import Shapes

SAMPLES = 512
NAMED = 3  # layers that a note names
WITHOUT_DATA = (
    "no --data: nothing was refitted, expect the accuracy to fall; pass --data (no "
    "labels needed), or train the result (squeeze distill)"
)


@dataclass(frozen=True)
class Samples:
    """Data to look at and refit on, and how much of it.

    `training`: something trains on it as well, and needs others to be judged by.
    """

    data: str | Path | Mapping[str, Any] | None = None
    evaluation: str | Path | None = None
    count: int | None = None
    images: Images | None = None
    training: bool = False

    def open(
        self, model: ir.Model, shapes: Shapes, seed: int, counting: bool = False
    ) -> Split | None:
        """Calibration and evaluation; to count exactly, all of the data is both."""
        if self.data is None:
            return None
        found = open_data(self.data, model, shapes, self.images)
        count = self.count or (len(found) if counting else SAMPLES)
        if counting and self.count is None and not self.training:
            text = (
                f"all {len(found)} samples of {found.name}, nothing is fitted to them"
            )
            return Split(found, found, text)
        held = None
        if self.evaluation is not None:
            held = open_data(self.evaluation, model, shapes, self.images)
        return split(found, count, seed, held)


@dataclass
class Removing:
    """One removal of channels: its data, what it repaired, what it has to say."""

    samples: Samples
    seed: int
    split: Split | None = None
    notes: list[str] = field(default_factory=list)
    repaired: dict[str, Repaired] = field(default_factory=dict)

    def open(self, model: ir.Model, shapes: Shapes, counting: bool = False) -> None:
        if self.split is None:
            self.split = self.samples.open(model, shapes, self.seed, counting)

    @property
    def data(self) -> Data | None:
        return self.split.calibration if self.split else None

    def fidelity(self, before: Path, after: Path) -> Fidelity | None:
        if self.split is None:
            return None
        return held_out(self.split.evaluation, self.split.described)(before, after)

    def context(self, found: Trace) -> criteria.Context:
        return criteria.Context(found, found.model, found.shapes, self.data, self.seed)

    def repair(
        self,
        original: Network,
        shrunken: Network,
        masks: Mapping[str, Array],
        squares: bool,
    ) -> None:
        """Repair `shrunken` in place, where there is data; see `refit`."""
        if self.data is None:
            if WITHOUT_DATA not in self.notes:
                self.notes.append(WITHOUT_DATA)
            return
        done = refit(original, shrunken, masks, self.data, self.seed, squares=squares)
        self.repaired |= {one.layer: one for one in done}

    def told(self, changes: Sequence[Change]) -> list[Change]:
        """Changes with how each layer was repaired; a note sums that up."""
        if self.repaired:
            self.notes.append(repairs(list(self.repaired.values())))
        return [with_repair(c, self.repaired.get(c.site)) for c in changes]


def repairs(repaired: Sequence[Repaired]) -> str:
    """One note: how layers were repaired, and which could not be."""
    parts = []
    for how in (SQUARES, MOMENTS):
        names = [one.layer for one in repaired if one.how == how]
        if names:
            parts.append(f"{how}: {_listed(names)}")
    left = [f"{one.layer} ({one.how})" for one in repaired if not one.done]
    if left:
        parts.append(f"not at all: {_listed(left)}")
    return f"repaired by {'; '.join(parts)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def with_repair(change: Change, found: Repaired | None) -> Change:
    """The change with how its layer was repaired, if it was."""
    if found is None:
        return change
    details = {**change.details, "repair": found.how}
    if found.before is not None:
        details["error_before_refit"] = found.before
    return replace(change, fit_error=found.after, details=details)
