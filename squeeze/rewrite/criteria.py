"""How much a unit matters: one row per criterion, each with its source.

A score is by unit and higher is kept. Scores are relative within a layer, so that
units of different layers can be compared: for the criteria that predict an error it
is the share of the next layers' outputs that goes with the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from squeeze.calibrate.data import Data
from squeeze.calibrate.stats import (
    Columns,
    Moments,
    Products,
    Stats,
    Wanted,
    Window,
    gather,
)
from squeeze.model import constant
from squeeze.rewrite.channels import Trace, axes_of
from squeeze.rewrite.channels.trace import Sink
from squeeze.rewrite.fit.solve import damping
from squeeze.shapes import Shapes

Array = NDArray[Any]
GRAM_COLUMNS = 6144  # beyond this a Gram matrix takes longer than it tells
OUTLIER = 2.0  # standard deviations below the mean (thesis §2.2.3)


@dataclass(frozen=True)
class Context:
    """What a criterion may look at. `data` None where none was given."""

    trace: Trace
    model: ir.Model
    shapes: Shapes
    data: Data | None
    seed: int = 0

    @property
    def empty(self) -> Array:
        return np.zeros(len(self.trace.root))


@dataclass(frozen=True)
class Criterion:
    """A way to score units; `predicts_error`: scores are shares of the next layers'
    outputs, so that those of different layers can be weighed by what they do.
    """

    score: Callable[[Context], Array]
    needs_data: bool
    source: str
    predicts_error: bool = False


@dataclass(frozen=True)
class Reading:
    """One place where a contraction reads units from an activation: value and axis."""

    sink: Sink
    value: ir.Value
    axis: int
    units: Array

    @property
    def key(self) -> str:
        return f"{self.value.name}@{self.axis}"


def readings(trace: Trace) -> list[Reading]:
    """Every activation operand of every sink that reads free units."""
    found = []
    for sink in trace.sinks:
        for operand, axis in sink.places:
            value = sink.node.inputs[operand]
            if value is None or value.const_value is not None:
                continue
            units = trace.units(axes_of(trace, sink.node, operand)[axis])
            if units.any():
                found.append(Reading(sink, value, axis, units))
    return found


def gathered(context: Context, wanted: Mapping[str, Wanted]) -> dict[str, Stats]:
    assert context.data is not None
    return gather(
        context.model, context.shapes, context.data, wanted, seed=context.seed
    )


def moments(context: Context, kinds: tuple[str, ...]) -> dict[str, Stats]:
    """Sums over all positions of what sinks read, by `Reading.key`."""
    wanted = {
        r.key: Moments(r.value.name or "", r.axis, kinds)
        for r in readings(context.trace)
    }
    return gathered(context, wanted)


def add_up(units: Array, values: Array, count: int) -> Array:
    """Sum `values` by unit."""
    return np.bincount(units, values, minlength=count)


# -- weights alone ------------------------------------------------------------------


def _norm(power: int) -> Callable[[Context], Array]:
    """Norm of the weights that make a unit, relative to its layer's mean."""

    def score(context: Context) -> Array:
        total = context.empty
        for producer in context.trace.producers:
            weight = constant(producer.node, producer.operand)
            if weight is None:
                continue
            axes = axes_of(context.trace, producer.node, producer.operand)
            units = context.trace.units(axes[producer.axis])
            other = tuple(i for i in range(weight.ndim) if i != producer.axis)
            norms = (np.abs(weight.astype(np.float64)) ** power).sum(other)
            by_unit = add_up(units, norms, len(total))
            mean = by_unit[np.unique(units)].mean()
            total += by_unit / (mean or 1.0)
        return np.asarray(total ** (1 / power))

    return score


# -- activations --------------------------------------------------------------------


def counts(context: Context) -> Array:
    """Activations (sample × position) above 0 of each unit, where it is read most."""
    found = moments(context, ("sum", "positive"))
    most = context.empty
    for reading in readings(context.trace):
        stats = found[reading.key]
        np.maximum(most, add_up(reading.units, stats.positive, len(most)), out=most)
    return most


def shares(context: Context) -> Array:
    """The same as a share of all samples and positions: 1 − APoZ."""
    found = moments(context, ("sum", "positive"))
    most = context.empty
    for reading in readings(context.trace):
        stats = found[reading.key]
        size = np.maximum(np.bincount(reading.units, minlength=len(most)), 1)
        active = add_up(reading.units, stats.positive, len(most)) / size
        np.maximum(most, active / max(stats.count, 1), out=most)
    return most


def _mean(context: Context) -> Array:
    found = moments(context, ("sum",))
    total = context.empty
    for reading in readings(context.trace):
        stats = found[reading.key]
        by_unit = add_up(reading.units, np.abs(stats.mean), len(total))
        total += by_unit / (by_unit[np.unique(reading.units)].mean() or 1.0)
    return total


def _energy(context: Context) -> Array:
    """Σ over sinks of E[x²]·‖w‖², as a share of the sink's whole."""
    found = moments(context, ("sum", "square"))
    total = context.empty
    for reading in readings(context.trace):
        stats = found[reading.key]
        energy = stats.sums["square"] / max(stats.count, 1)
        energy = energy * _column_norms(context.trace, reading)
        whole = energy.sum()
        if whole > 0:
            total += add_up(reading.units, energy / whole, len(total))
    return total


def _column_norms(trace: Trace, reading: Reading) -> Array:
    """Squared norm of what the sink's weights do with each index; 1 without weights."""
    for operand, axis in reading.sink.places:
        weight = constant(reading.sink.node, operand)
        if weight is not None:
            other = tuple(i for i in range(weight.ndim) if i != axis)
            norms = (weight.astype(np.float64) ** 2).sum(other)
            return np.tile(norms, len(reading.units) // len(norms))
    return np.ones(len(reading.units))


# -- reconstruction -----------------------------------------------------------------


def _reconstruction(context: Context) -> Array:
    """What the next layers lose after the refit, if this unit alone goes.

    With Q = (Σ + λI)⁻¹ the removal of columns P costs tr(W_P (Q_PP)⁻¹ W_Pᵀ).
    Sinks without a refit, or too wide for a Gram matrix, count by energy.
    """
    total = context.empty
    wanted: dict[str, Wanted] = {}
    linear: dict[str, tuple[Reading, Array]] = {}
    simple: list[Reading] = []
    for reading in readings(context.trace):
        matrix = sink_matrix(reading)
        if matrix is None or matrix.shape[1] > GRAM_COLUMNS:
            simple.append(reading)
            continue
        key = f"{reading.key}/{reading.sink.node.name}"
        linear[key] = (reading, matrix)
        wanted[key] = Products((columns_of(reading.sink.node, reading.value),))
    if wanted:
        found = gathered(context, wanted)
        for key, (reading, matrix) in linear.items():
            total += _costs(matrix, found[key], reading.units, len(total))
    if simple:
        total += _energy_of(context, simple)
    return total


def _energy_of(context: Context, some: list[Reading]) -> Array:
    total = context.empty
    wanted = {
        r.key: Moments(r.value.name or "", r.axis, ("sum", "square")) for r in some
    }
    found = gathered(context, wanted)
    for reading in some:
        energy = found[reading.key].sums["square"] * _column_norms(
            context.trace, reading
        )
        if energy.sum() > 0:
            total += add_up(reading.units, energy / energy.sum(), len(total))
    return total


def _costs(weight: Array, stats: Stats, units: Array, count: int) -> Array:
    covariance = stats.covariance
    lam = damping(covariance)
    inverse = np.linalg.inv(covariance + lam * np.eye(len(covariance)))
    taps = weight.shape[1] // len(units)
    spread = np.repeat(units, taps)
    costs = np.zeros(count)
    for unit in np.unique(units[units > 0]):
        part = np.flatnonzero(spread == unit)
        w = weight[:, part]
        kept = np.linalg.solve(inverse[np.ix_(part, part)], w.T)
        costs[unit] = max(float((w.T * kept).sum()), 0.0)
    # alone, each of many correlated channels costs next to nothing: only the shares
    # of a layer's costs can be compared with another layer's
    return costs / (costs.sum() or 1.0)


def sink_matrix(reading: Reading) -> Array | None:
    """The sink's weights as (O, C·K); None where it isn't a plain linear layer."""
    return matrix(reading.sink.node)


def matrix(node: ir.Node) -> Array | None:
    """A linear layer's weights as (O, C·K), float64: Conv (group 1), Gemm, MatMul."""
    operand = 1
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.inputs[0] is None:
        return None
    weight = constant(node, operand)
    if weight is None or node.inputs[0].const_value is not None:
        return None
    attributes = node.attributes
    if node.op_type == "Conv":
        explicit = (attributes.get_string("auto_pad", "NOTSET") or "NOTSET") == "NOTSET"
        if (attributes.get_int("group", 1) or 1) != 1 or not explicit:
            return None
        return weight.reshape(len(weight), -1).astype(np.float64)
    if weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        plain = (
            attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1
        )
        if attributes.get_int("transA", 0) or not plain:
            return None
        if attributes.get_int("transB", 0):
            return weight.astype(np.float64)
    return weight.T.astype(np.float64)


def columns_of(node: ir.Node, value: ir.Value, model: int = 0) -> Columns:
    """The rows that a linear layer multiplies, as its input's columns."""
    name = value.name or ""
    if node.op_type != "Conv":
        return Columns(name, -1, None, model)
    weight = constant(node, 1)
    assert weight is not None
    return Columns(name, 1, Window.of(node, weight.shape[2:]), model)


TABLE: dict[str, Criterion] = {
    "activations": Criterion(counts, True, "thesis §2.2.2; Hu et al. 2016"),
    "apoz": Criterion(shares, True, "average percentage of zeros, Hu et al. 2016"),
    "mean": Criterion(_mean, True, "mean activation, Molchanov et al. 2017"),
    "outlier": Criterion(
        shares, True, "below mean − 2·std of the layer, thesis §2.2.3"
    ),
    "l1": Criterion(_norm(1), False, "weights' L1 norm, Li et al. 2017"),
    "l2": Criterion(_norm(2), False, "weights' L2 norm, He et al. 2018"),
    "energy": Criterion(
        _energy, True, "rms activation × norm of the next weights", True
    ),
    "reconstruction": Criterion(
        _reconstruction,
        True,
        "what a refit can't repair; ThiNet, Luo et al. 2017",
        True,
    ),
}
