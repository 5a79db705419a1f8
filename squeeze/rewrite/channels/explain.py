"""What could be pruned from a model and what can't: `squeeze prune --explain`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.model import node_name
from squeeze.rewrite.channels import choose, prepare, trace
from squeeze.rewrite.channels.trace import Blocked, Family, Trace
from squeeze.shapes import InputShapes


@dataclass(frozen=True)
class FamilyView:
    """A family for reading: its layers, its units, and where they are summed.

    `sizes` are the channels that a unit takes of its layers; `exact` whether removal
    leaves every statistic alone; `macs` what goes if all but one unit did.
    """

    name: str
    layers: tuple[str, ...]
    units: int
    sizes: tuple[int, ...]
    sinks: tuple[str, ...]
    exact: bool
    macs: int


@dataclass(frozen=True)
class Explanation:
    """Families, protected channels by reason, and nodes that nothing passes."""

    model: str
    families: tuple[FamilyView, ...]
    protected: tuple[tuple[str, int], ...]
    barriers: tuple[Blocked, ...]
    macs: int
    reachable: int


def explain(
    model: ir.Model | str | os.PathLike[str],
    input_shapes: InputShapes | None = None,
    *,
    simplify: bool = True,
    attention: str = "dims",
) -> Explanation:
    """Trace a model and describe what was found; nothing is changed."""
    name = "model"
    if not isinstance(model, ir.Model):
        name = str(model)
        model = models.load(Path(model))
    work, _ = models.simplify(model) if simplify else (model, None)
    work = work.clone() if work is model else work
    found = trace(prepare(work, shaping.infer(work, input_shapes)), attention)
    families = tuple(_view(found, f) for f in found.families)
    return Explanation(
        model=name,
        families=families,
        protected=tuple(_protected(found).most_common()),
        barriers=found.barriers,
        macs=found.macs(found.full),
        reachable=found.macs(_least(found)),
    )


def _least(found: Trace) -> np.ndarray:
    """The mask that keeps one unit of each cell."""
    return choose.thin(found, found.families, np.zeros(len(found.root)), lambda n: 1)


def _view(found: Trace, family: Family) -> FamilyView:
    units = family.units
    sinks = [
        node_name(s.node)
        for s in found.sinks
        if np.isin(found.units(s.labels), units).any()
    ]
    keep = found.full.copy()
    keep[units[1:]] = False
    return FamilyView(
        name=family.name,
        layers=tuple(dict.fromkeys(node_name(p.node) for p in family.producers)),
        units=len(units),
        sizes=tuple(sorted({c.size for c in choose.cells(found, family)})),
        sinks=tuple(dict.fromkeys(sinks)),
        exact=not found.inexact[units].any(),
        macs=found.macs(found.full) - found.macs(keep),
    )


def _protected(found: Trace) -> Counter[str]:
    """Channels of layers that may not go, by reason."""
    reasons: Counter[str] = Counter()
    for producer in found.producers:
        roots = found.root[np.maximum(producer.labels, 0)]
        reasons.update(found.why[int(r)] for r in roots if int(r) in found.why)
    return reasons
