"""Models as commands name them: loaded, with shapes and inputs to run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.calibrate.data import Images, open_data
from squeeze.cost import Profile, profile
from squeeze.errors import SqueezeError
from squeeze.measure.inputs import Feeds
from squeeze.measure.latency import Candidate, feeds_for
from squeeze.shapes import InputShapes, Shapes


@dataclass(frozen=True)
class Case:
    """A model file with its static shapes at some batch, and its costs there."""

    path: Path
    model: ir.Model
    shapes: Shapes
    costs: Profile


def load(path: Path, given: InputShapes | None = None, batch: int = 1) -> Case:
    """Load and count a model; raises as `model.load` and `shapes.infer` do."""
    model = models.load(path)
    shapes = shaping.infer(model, given, batch)
    if batch > 1:
        _check_batch(path, shapes, given or {}, batch)
    return Case(path, model, shapes, profile(model, shapes=shapes))


def _check_batch(path: Path, shapes: Shapes, given: InputShapes, batch: int) -> None:
    for name, shape in shapes.inputs.items():
        if name not in given and "" not in given and shape and shape[0] != batch:
            raise SqueezeError(
                f"{path}: input {name!r} is fixed to {shape[0]}, not --batch {batch}"
            )


def candidates(
    cases: Sequence[Case],
    data: str | None = None,
    seed: int = 0,
    images: Images | None = None,
) -> list[Candidate]:
    """Every case with inputs: the first samples of `data`, else random ones."""
    return [
        Candidate(
            case.path,
            _first_batch(case, data, images)
            if data
            else feeds_for(case.path, case.shapes, seed),
        )
        for case in cases
    ]


def _first_batch(case: Case, data: str, images: Images | None) -> Feeds:
    opened = open_data(data, case.model, case.shapes, images)
    shape = next(iter(case.shapes.inputs.values()))
    count = shape[0] if shape else 1
    if len(opened) < count:
        raise SqueezeError(
            f"--data {data}: {len(opened)} samples are too few for a batch of {count}"
        )
    picked = replace(opened, indices=np.arange(count), batch_size=count)
    return next(iter(picked)).inputs
