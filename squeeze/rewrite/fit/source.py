"""The data that a rewrite fits to, and what it is measured on afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.data import Data, Images, Split, open_data, split
from squeeze.errors import SqueezeError
from squeeze.measure.fidelity import Fidelity, held_out
from squeeze.rewrite.fit.waves import Calibration, Progress
from squeeze.shapes import Shapes

SAMPLES = 512
Spec = str | Path | Mapping[str, np.ndarray]


@dataclass
class FitData:
    """`--data`, `--samples`, `--eval-data`: opened once the model is in hand.

    `data` None means none was given; what needs data then says so.
    """

    data: Spec | None = None
    samples: int = SAMPLES
    evaluation: Spec | None = None
    images: Images | None = None
    seed: int = 0
    progress: Progress | None = None
    opened: Split | None = field(default=None, repr=False)

    def open(self, model: ir.Model, shapes: Shapes) -> Split:
        """Calibration and evaluation samples. Raises SqueezeError if nothing fits."""
        if self.data is None:
            raise SqueezeError("no data; pass --data")
        whole = open_data(self.data, model, shapes, self.images)
        other: Data | None = None
        if self.evaluation is not None:
            other = open_data(self.evaluation, model, shapes, self.images)
        self.opened = split(whole, self.samples, self.seed, other)
        return self.opened

    def calibration(self, model: ir.Model, shapes: Shapes) -> Calibration:
        """What is fitted to, a fifth of it held out to judge the fits."""
        found = self.opened or self.open(model, shapes)
        return Calibration.of(found.calibration, self.seed, self.progress)

    def fidelity(self, before: Path, after: Path) -> Fidelity | None:
        """Outputs of two written models on the evaluation samples, if there are any."""
        if self.opened is None:
            return None
        measure = held_out(self.opened.evaluation, self.opened.described)
        return measure(before, after)


def described(calibration: Calibration) -> str:
    """For the report: what was fitted to, and where the errors come from."""
    fitted, held = len(calibration.fitting), len(calibration.held)
    name = calibration.fitting.name
    if calibration.fitting is calibration.held:
        return (
            f"fitted to {fitted} samples of {name}, too few to hold any out for errors"
        )
    return (
        f"fitted to {fitted} samples of {name}; "
        f"errors are relative, squared, on {held} others"
    )
