"""Repair by least squares what removal broke (He et al. 2017).

Layer by layer in the graph's order: inputs from the shrunken network as it is by then,
targets from the original (Zhang et al. 2015, §3.3; He et al. 2017). Where a layer ends
in a residual sum, the target is the original sum less the shrunken skip, so that every
block repairs the stream. What has no closed form (depthwise, grouped and transposed
convolutions, normalisation over channels) gets the mean and the spread of its outputs
back instead, channel by channel: bias correction (Nagel et al. 2019, §4.2) and the
rescaling of REPAIR (Jordan et al. 2023, §3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.data import Data
from squeeze.calibrate.stats import (
    Collector,
    Columns,
    Moments,
    Products,
    Stats,
    Wanted,
)
from squeeze.model import node_name
from squeeze.rewrite.affine import (
    affine_axis,
    affine_step,
    bias_place,
    bias_values,
    rescale,
    store,
    why_not,
)
from squeeze.rewrite.channels.trace import Array
from squeeze.rewrite.criteria import GRAM_COLUMNS, columns_of, matrix
from squeeze.rewrite.fit.solve import RIDGE, Affine, regress_towards
from squeeze.shapes import Shapes

SQUARES = "least squares"
MOMENTS = "mean and spread"
MOST_SCALE = 8.0  # times that a channel's spread is stretched at most
PASSES = 8  # a pass over the data is shared by layers that come one after the other
DAMPINGS = 7  # steps of ten, up to where a refit hardly moves the weights
HELD_OUT = 5  # every fifth sample tells whether a refit generalises


@dataclass(frozen=True)
class Network:
    """A model with its shapes."""

    model: ir.Model
    shapes: Shapes


@dataclass(frozen=True)
class Residual:
    """A sum `total` = `skip` + `scale` · y + `shift` that a layer's output y ends in.

    By output channel of the shrunken layer, or one number for all.
    """

    total: str
    skip: str
    scale: Array
    shift: Array


@dataclass(frozen=True)
class Layer:
    """A layer of the shrunken model to refit: `kept` outputs of the original's.

    `how` is SQUARES, MOMENTS, or why nothing can be done; `residual` the sum that the
    layer ends in, if it does.
    """

    node: ir.Node
    kept: Array
    how: str = SQUARES
    residual: Residual | None = None

    @property
    def name(self) -> str:
        return node_name(self.node)

    @property
    def output(self) -> str:
        return self.node.outputs[0].name or ""


@dataclass(frozen=True)
class Repaired:
    """A layer whose inputs changed, and how it was repaired.

    `how` is SQUARES, MOMENTS, or why nothing could be done. For SQUARES, the relative
    squared errors of its outputs on held-out rows before and after.
    """

    layer: str
    how: str
    before: float | None = None
    after: float | None = None

    @property
    def done(self) -> bool:
        return self.how in (SQUARES, MOMENTS)


def refit(
    original: Network,
    shrunken: Network,
    kept: Mapping[str, Array],
    data: Data,
    seed: int = 0,
    passes: int = PASSES,
    squares: bool = True,
    replaced: Collection[str] = (),
) -> list[Repaired]:
    """Repair `shrunken.model` in place; `kept` masks the output channels by layer name.

    Needs both models to have the same value names. Without `squares` no layer is
    refitted: all get their mean and spread back. `replaced` names nodes that compute
    something else than the original does, besides those that lost channels. Returns one
    entry per layer of `kept` whose inputs changed.
    """
    layers = list(_layers(shrunken, kept, squares, replaced))
    results = [Repaired(one.name, one.how) for one in layers if not _is_repair(one)]
    for wave in _waves([one for one in layers if _is_repair(one)], passes):
        collector = Collector(
            shrunken.model,
            shrunken.shapes,
            {key: wanted for one in wave for key, wanted in _requests(one)},
            others=[(original.model, original.shapes)],
            samples=len(data),
            seed=seed,
        )
        index = np.arange(len(data))
        told = index % HELD_OUT == HELD_OUT - 1
        fitting = collector.over(data.take(index[~told]))
        judging = collector.over(data.take(index[told])) if told.any() else fitting
        for layer in wave:
            repair = _solve if layer.how == SQUARES else _restore
            results.append(repair(shrunken.model, layer, fitting, judging))
    return results


def _is_repair(layer: Layer) -> bool:
    return layer.how in (SQUARES, MOMENTS)


def _waves(layers: Sequence[Layer], passes: int) -> Iterator[Sequence[Layer]]:
    size = -(-len(layers) // max(1, passes)) if layers else 1
    for start in range(0, len(layers), size):
        yield layers[start : start + size]


def _layers(
    net: Network,
    kept: Mapping[str, Array],
    squares: bool,
    replaced: Collection[str],
) -> Iterator[Layer]:
    """Layers whose inputs changed, in the graph's order."""
    changed: set[ir.Value] = set()
    for node in net.model.graph:
        touched = any(v in changed for v in node.inputs if v is not None)
        name = node_name(node)
        shrunk = name in kept and not kept[name].all()
        if touched or shrunk or name in replaced:
            changed.update(node.outputs)
        if not touched or name not in kept:
            continue
        weight = matrix(node)
        if squares and weight is not None and sum(weight.shape) <= GRAM_COLUMNS:
            residual = _residual(node, net.shapes)
            yield Layer(node, kept[name], SQUARES, residual)
        else:
            why = why_not(node, int(kept[name].sum()))
            yield Layer(node, kept[name], why or MOMENTS)


def _residual(node: ir.Node, shapes: Shapes) -> Residual | None:
    """The sum that a layer's output goes into, straight or through a bias or BN."""
    value = node.outputs[0]
    scale, shift = np.ones(1), np.zeros(1)
    while True:
        users = value.uses()
        if len(users) != 1 or value.is_graph_output():
            return None
        ((user, index),) = users
        step = affine_step(user, index)
        if step is None:
            break
        scale, shift = scale * step[0], shift * step[0] + step[1]
        value = user.outputs[0]
    if user.op_type not in ("Add", "Sum") or len(user.inputs) != 2:
        return None
    other = user.inputs[1 - index]
    if other is None or other.const_value is not None or other is value:
        return None
    if other.producer() is None or _comes_after(other, node):
        return None
    if shapes.of(other) != shapes.of(value) or not scale.all():
        return None
    return Residual(user.outputs[0].name or "", other.name or "", scale, shift)


def _comes_after(value: ir.Value, node: ir.Node) -> bool:
    """Whether a value is computed later: its own layers are not refitted yet."""
    graph, producer = node.graph, value.producer()
    if graph is None or producer is None:
        return False
    for one in graph:
        if one is producer:
            return False
        if one is node:
            return True
    return False


def _requests(layer: Layer) -> Iterator[tuple[str, Wanted]]:
    """What a layer's repair needs to know, by name."""
    if layer.how == SQUARES:
        yield layer.name, _rows(layer)
        return
    axis = affine_axis(layer.node)
    for model, what in enumerate(("now", "then")):
        yield (
            f"{layer.name}/{what}",
            Moments(layer.output, axis, ("sum", "square"), model),
        )


def _rows(layer: Layer) -> Products:
    """Rows [inputs, shrunken | outputs, original | skip, shrunken]."""
    source = layer.node.inputs[0]
    assert source is not None
    axis = 1 if layer.node.op_type == "Conv" else -1
    columns = [columns_of(layer.node, source)]
    if layer.residual is None:
        columns.append(Columns(layer.output, axis, None, 1))
    else:
        columns.append(Columns(layer.residual.total, axis, None, 1))
        columns.append(Columns(layer.residual.skip, axis, None, 0))
    return Products(tuple(columns))


def _targets(layer: Layer, stats: Stats, width: int) -> Stats:
    """Statistics of [inputs | targets]: kept outputs; in a sum, what must be added."""
    kept = np.flatnonzero(layer.kept)
    if layer.residual is None:
        return stats.columns(np.concatenate([np.arange(width), width + kept]))
    scale = np.broadcast_to(layer.residual.scale, len(kept))
    shift = np.broadcast_to(layer.residual.shift, len(kept))
    change = np.zeros((width + len(kept), len(stats.sums["sum"])))
    change[np.arange(width), np.arange(width)] = 1
    rows = width + np.arange(len(kept))
    change[rows, width + kept] = 1 / scale
    change[rows, width + len(layer.kept) + np.arange(len(kept))] = -1 / scale
    moved = np.concatenate([np.zeros(width), shift / scale])
    total = change @ stats.sums["sum"]
    product = change @ stats.sums["product"] @ change.T
    product -= np.outer(total, moved) + np.outer(moved, total)
    product += stats.count * np.outer(moved, moved)
    return Stats(stats.count, {"sum": total - stats.count * moved, "product": product})


def _solve(
    model: ir.Model,
    layer: Layer,
    fitting: Mapping[str, Stats],
    judging: Mapping[str, Stats],
) -> Repaired:
    weight = matrix(layer.node)
    assert weight is not None
    width = weight.shape[1]
    place = bias_place(layer.node)
    one, two = (_targets(layer, s[layer.name], width) for s in (fitting, judging))
    if place is None:  # nowhere to put a bias: fit through the origin
        one, two = (_uncentred(s) for s in (one, two))
    bias = bias_values(place, len(weight))
    before = Affine(weight, bias).error(two)
    ridge, after = _damped(one, two, weight)
    if after >= before:
        return Repaired(layer.name, SQUARES, before, before)
    store(model, layer.node, regress_towards(one + two, width, weight, ridge), place)
    return Repaired(layer.name, SQUARES, before, after)


def _damped(fitting: Stats, judging: Stats, weight: Array) -> tuple[float, float]:
    """The damping at which held-out rows are met best, and their error there.

    From `RIDGE` up, as long as it helps: layers with more columns than there are rows
    (fully connected ones see one row per sample) can follow those rows anywhere.
    """
    width = weight.shape[1]
    found = RIDGE, float("inf")
    for step in range(DAMPINGS):
        ridge = RIDGE * 10**step
        error = regress_towards(fitting, width, weight, ridge).error(judging)
        if error >= found[1]:
            break
        found = ridge, error
    return found


def _restore(
    model: ir.Model,
    layer: Layer,
    fitting: Mapping[str, Stats],
    judging: Mapping[str, Stats],
) -> Repaired:
    """Give every output channel its mean and spread back."""
    now, then = (
        fitting[key] if fitting is judging else fitting[key] + judging[key]
        for key in (f"{layer.name}/now", f"{layer.name}/then")
    )
    then = then.columns(np.flatnonzero(layer.kept))
    spread, goal = np.sqrt(now.variance), np.sqrt(then.variance)
    live = spread > goal / MOST_SCALE  # what hardly varies is no channel to stretch
    scale = np.where(live, goal / np.where(live, spread, 1), 1.0)
    rescale(model, layer.node, scale, then.mean - scale * now.mean)
    return Repaired(layer.name, MOMENTS)


def _uncentred(stats: Stats) -> Stats:
    return Stats(stats.count, {**stats.sums, "sum": np.zeros_like(stats.sums["sum"])})
