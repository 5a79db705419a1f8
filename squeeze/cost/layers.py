"""What a model costs, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import onnx_ir as ir

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.cost import ops
from squeeze.cost.memory import (
    RuntimePeak,
    live_bytes,
    peak_activation_bytes,
    runtime_peak,
)
from squeeze.model import node_name
from squeeze.shapes import InputShapes, Shapes

COMPRESSED = 4.0  # EffNet §3: from here on a layer's output is a bottleneck


@dataclass(frozen=True)
class Layer:
    """One node that costs something. Sizes are in elements, memory in bytes."""

    name: str
    op: str
    kind: str
    macs: int
    flops: int
    params: int
    weight_bytes: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output_elements: int
    compression: float | None  # elements in ÷ elements out
    live_bytes: int = 0  # activations needed at once while it runs, its own included

    @property
    def bottleneck(self) -> bool:
        return self.compression is not None and self.compression >= COMPRESSED


@dataclass(frozen=True)
class Totals:
    """Costs of a whole model at one choice of input shapes."""

    macs: int
    flops: int
    params: int
    weight_bytes: int
    file_bytes: int
    peak_activation_bytes: int
    uncounted_ops: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """A model's totals and layers; `model` is the file's name."""

    model: str
    totals: Totals
    layers: tuple[Layer, ...]
    input_shapes: dict[str, tuple[int, ...]]
    peak_layer: str
    runtime_peak: RuntimePeak


def profile(
    model: ir.Model | str | os.PathLike[str],
    input_shapes: InputShapes | None = None,
    *,
    shapes: Shapes | None = None,
    file_bytes: int | None = None,
) -> Profile:
    """Count a model's costs at batch 1, or at the input shapes given.

    Raises SqueezeError where a size is dynamic, naming the --input-shape to pass.
    """
    if not isinstance(model, ir.Model):
        model = models.load(Path(model))
    shapes = shapes or shaping.infer(model, input_shapes)
    source = models.source(model)
    if file_bytes is None:
        file_bytes = source.file_bytes if source else models.proto_bytes(model)
    layers, uncounted = _layers(model.graph, shapes)
    peak, where = peak_activation_bytes(model.graph, shapes)
    totals = Totals(
        macs=sum(layer.macs for layer in layers),
        flops=sum(layer.flops for layer in layers),
        params=sum(layer.params for layer in layers),
        weight_bytes=models.weight_bytes(model),
        file_bytes=file_bytes,
        peak_activation_bytes=peak,
        uncounted_ops=tuple(sorted(uncounted)),
    )
    name = str(source.path) if source else model.graph.name or "model"
    runtime = runtime_peak(model.graph, shapes)
    return Profile(name, totals, layers, dict(shapes.inputs), where, runtime)


def count(nodes: Iterable[ir.Node], shapes: Shapes) -> tuple[int, int, int]:
    """(MACs, FLOPs, parameters) of some nodes."""
    macs = flops = params = 0
    seen: set[ir.Value] = set()
    for node in nodes:
        cost = ops.cost(node, shapes) or (0, 0)
        macs, flops = macs + cost[0], flops + cost[1]
        params += sum(prod(shapes.need(v, node)) for v in _weights(node, seen))
    return macs, flops, params


def _layers(graph: ir.Graph, shapes: Shapes) -> tuple[tuple[Layer, ...], set[str]]:
    layers: list[Layer] = []
    uncounted: set[str] = set()
    seen: set[ir.Value] = set()
    live = live_bytes(graph, shapes)
    for node in graph:
        cost = _node_cost(node, shapes)
        if cost is None:
            uncounted.add(ops.full_name(node))
        weights = list(_weights(node, seen))
        macs, flops = cost or (0, 0)
        if macs or flops or weights:
            layer = _layer(node, shapes, macs, flops, weights)
            layers.append(replace(layer, live_bytes=live[node]))
    return tuple(layers), uncounted


def _node_cost(node: ir.Node, shapes: Shapes) -> tuple[int, int] | None:
    """As the table says; shape arithmetic is free, and so are bodies that are."""
    if node.op_type in ("If", "Loop", "Scan"):
        bodies = [
            a.as_graph() for a in node.attributes.values() if a.type.name == "GRAPH"
        ]
        free = all(
            ops.TABLE.get(n.op_type) is ops.TABLE["Shape"] for b in bodies for n in b
        )
        return (0, 0) if free else None
    if all(v.name in shapes.constants for v in node.outputs):
        return 0, 0
    return ops.cost(node, shapes)


def _layer(
    node: ir.Node, shapes: Shapes, macs: int, flops: int, weights: list[ir.Value]
) -> Layer:
    entry = _main_input(node, shapes)
    source = shapes.of(entry) or ()
    out = shapes.of(node.outputs[0]) or ()
    elements = prod(out)
    compression = prod(source) / elements if source and elements else None
    nbytes = sum(v.const_value.nbytes for v in weights if v.const_value is not None)
    return Layer(
        name=node_name(node),
        op=node.op_type,
        kind=ops.kind(node, shapes),
        macs=macs,
        flops=flops,
        params=sum(prod(shapes.of(v) or ()) for v in weights),
        weight_bytes=nbytes,
        input_shape=source,
        output_shape=out,
        output_elements=elements,
        compression=compression,
    )


def _main_input(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """The largest activation that the node reads."""
    activations = [v for v in node.inputs if v is not None and v.const_value is None]
    return max(activations, key=lambda v: prod(shapes.of(v) or (0,)), default=None)


def _weights(node: ir.Node, seen: set[ir.Value]) -> Iterable[ir.Value]:
    """Initializers that count as parameters at this node, each once per model."""
    arithmetic = ops.ARITHMETIC_INPUTS.get(node.op_type, frozenset())
    quantised = ops.QUANTISED_INPUTS.get(node.op_type, frozenset())
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is None or value in seen:
            continue
        tensor = value.const_value
        floating = tensor.dtype.is_floating_point()
        if tensor.size > 1 and (
            (floating and index not in arithmetic) or index in quantised
        ):
            seen.add(value)
            yield value
