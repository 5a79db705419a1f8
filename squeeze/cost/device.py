"""Predicted time on a machine that is not here, from its constants.

The model of the 2012-dated MobileNets paper, §5: a layer's time is its compute time,
2 × MACs / matrix throughput + other operations / elementwise throughput, plus the time
to move data between internal and external memory at the bandwidth. Real bytes are
counted; the paper's own movement column takes a coefficient for one bit.

A device may say more than the paper's four constants (all of it optional): throughput
by kind of layer and by op, what channels that don't fill its registers cost, which ops
its runtime does within the convolution before them, and how fast data move inside.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from squeeze import rules
from squeeze.cost.layers import Layer, Profile
from squeeze.cost.memory import VIEWS, last_uses, value_bytes
from squeeze.errors import RuleError, nearest
from squeeze.model import node_name
from squeeze.shapes import Shapes

Binds = Literal["compute", "movement"]
OVERLAP = ("none", "full")
MEMORY = ("accumulate", "live")


@dataclass(frozen=True)
class Device:
    """Constants of a target machine: bytes, bytes/s, FLOP/s, operations/s, seconds.

    `memory` says what internal memory holds: `accumulate`, as in the paper, everything
    since it was last moved out; `live`, what is still needed. `overlap` is `none`
    where compute and movement take turns, and `full` where the longer one hides the
    other. `weight_bytes` and `activation_bytes` of 0 are those of the model.

    `kinds` is the matrix throughput of the layer kinds that `profile` names, where it
    isn't `matrix`; `unaligned` the same for convolutions whose channels are no multiple
    of `channel_block`; `operations` the elementwise throughput of single ops. `fused`
    are ops that cost nothing behind a convolution. `internal_bandwidth` is that of
    data which stay inside; 0 leaves it out, and with it the nodes that only move data.
    """

    name: str
    description: str
    source: str
    internal_memory: float
    bandwidth: float
    matrix: float
    elementwise: float
    kinds: Mapping[str, float] = field(default_factory=dict)
    unaligned: Mapping[str, float] = field(default_factory=dict)
    operations: Mapping[str, float] = field(default_factory=dict)
    fused: Sequence[str] = ()
    channel_block: int = 1
    internal_bandwidth: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    layer_overhead: float = 0.0
    memory: str = "live"
    overlap: str = "none"

    def matrix_speed(self, layer: Layer) -> float:
        """FLOP/s of a layer's multiply-accumulates."""
        channels = (layer.input_shape, layer.output_shape)
        odd = any(
            len(c) > 2 and c[1] > 4 and c[1] % self.channel_block for c in channels
        )
        if odd and layer.kind in self.unaligned:  # an image's 3 channels are no sign
            return self.unaligned[layer.kind]
        return self.kinds.get(layer.kind, self.matrix)


@dataclass(frozen=True)
class LayerTime:
    """Seconds that a layer takes, and the bytes that it moves to and from outside.

    `exceeded` marks a layer whose data do not fit the internal memory.
    """

    name: str
    op: str
    matrix_s: float
    elementwise_s: float
    compute_s: float
    moved_bytes: float
    movement_s: float
    time_s: float
    binds: Binds
    held_bytes: float
    exceeded: bool


@dataclass(frozen=True)
class Prediction:
    """A model's predicted time on a device, layer by layer.

    `moving` are the nodes that compute nothing but move data (Concat, Transpose …),
    where the device says how fast.
    """

    device: Device
    layers: tuple[LayerTime, ...]
    moving: tuple[LayerTime, ...] = ()

    @property
    def total_s(self) -> float:
        return sum(layer.time_s for layer in (*self.layers, *self.moving))

    @property
    def moving_s(self) -> float:
        return sum(layer.time_s for layer in self.moving)

    def dominating(self, share: float = 0.5) -> list[LayerTime]:
        """The slowest layers that together take at least `share` of the time."""
        found: list[LayerTime] = []
        every = (*self.layers, *self.moving)
        for layer in sorted(every, key=lambda x: -x.time_s):
            if sum(x.time_s for x in found) >= share * self.total_s:
                break
            found.append(layer)
        return found


# -- device files -------------------------------------------------------------------

_TEXT = {"name", "description", "source", "memory", "overlap"}
_TABLES = ("kinds", "unaligned", "operations")
_NEEDED = ("internal_memory", "bandwidth", "matrix", "elementwise")


def load(name: str) -> Device:
    """A shipped device by name, or the user's own file.

    Raises UsageError where there is none, RuleError where it doesn't hold what it must.
    """
    file = rules.find("devices", name)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RuleError(f"{file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RuleError(f"{file}: not valid TOML: {error}") from error
    return parse(table, file)


def parse(table: Mapping[str, Any], file: Path) -> Device:
    """A device from its TOML table; every complaint names the file and the key."""
    known = [f.name for f in fields(Device)]
    for key, value in table.items():
        if key not in known:
            raise RuleError(f"{file}: unknown key {key!r}{nearest(key, known)}")
        if key not in _TABLES:
            _check(key, value, file)
            continue
        if not isinstance(value, Mapping):
            raise RuleError(f"{file}: {key} must be a table: [{key}]")
        for kind, speed in value.items():
            _check(f"{key}.{kind}", speed, file)
    for key in _NEEDED:
        if key not in table:
            raise RuleError(
                f"{file}: {key} is missing; rules/README.md says what it is"
            )
    texts = {"name": file.stem, "description": "", "source": ""}
    return Device(**{**texts, **table})


def _check(key: str, value: Any, file: Path) -> None:
    choices = {"memory": MEMORY, "overlap": OVERLAP}.get(key)
    if choices and value not in choices:
        raise RuleError(f"{file}: {key} = {value!r} is none of {', '.join(choices)}")
    if key in _TEXT:
        if not isinstance(value, str):
            raise RuleError(f"{file}: {key} must be text")
        return
    if key == "fused":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise RuleError(f'{file}: fused must be a list of ops: ["Relu"]')
        return
    if key == "channel_block" and (not isinstance(value, int) or value < 1):
        raise RuleError(f"{file}: channel_block = {value!r} is not a count from 1 on")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):
        raise RuleError(f"{file}: {key} = {value!r} is not a number from 0 on")
    if (key in _NEEDED or "." in key) and not value:
        raise RuleError(f"{file}: {key} must be more than 0")


# -- prediction ---------------------------------------------------------------------


def predict(
    graph: ir.Graph, shapes: Shapes, profile: Profile, device: Device
) -> Prediction:
    """Time of every layer of a profiled model on a device."""
    memory = _Accumulating if device.memory == "accumulate" else _Live
    held = memory(graph, shapes, device)
    fused = _fused(graph, device)
    layers, moving = [], []
    for index, node, layer in _walk(graph, profile):
        if layer is not None:
            step = held.step(index, node, _weights_bytes(layer, device))
            layers.append(_layer_time(layer, device, step, node in fused))
        elif device.internal_bandwidth and _moves(node, shapes):
            step = held.step(index, node, 0.0)
            moving.append(_time(node_name(node), node.op_type, device, step))
    return Prediction(device, tuple(layers), tuple(moving))


def _walk(
    graph: ir.Graph, profile: Profile
) -> Iterable[tuple[int, ir.Node, Layer | None]]:
    """Every node with its place in the graph; its layer where it costs something."""
    waiting = list(reversed(profile.layers))
    for index, node in enumerate(graph):
        key = (node_name(node), node.op_type)
        if waiting and (waiting[-1].name, waiting[-1].op) == key:
            yield index, node, waiting.pop()
        else:
            yield index, node, None


def _moves(node: ir.Node, shapes: Shapes) -> bool:
    """Whether it copies activations: no view, and no arithmetic on shapes."""
    known = all(v.name in shapes.constants for v in node.outputs)
    return node.op_type not in VIEWS and not known


def _fused(graph: ir.Graph, device: Device) -> set[ir.Node]:
    """Nodes that the runtime does within the convolution before them."""
    hosts: set[ir.Node] = set()  # convolutions, and what is in them already
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Conv":
            hosts.add(node)
        elif node.op_type in device.fused and any(
            v is not None and v.producer() in hosts and len(v.uses()) == 1
            for v in node.inputs
        ):
            found.add(node)
            hosts.add(node)
    return found


@dataclass(frozen=True)
class _Step:
    """Bytes at one node: moved from and to outside, touched, and held; if too many."""

    moved: float
    touched: float
    held: float
    exceeded: bool


def _layer_time(layer: Layer, device: Device, step: _Step, fused: bool) -> LayerTime:
    if fused:
        nothing = replace(step, moved=0.0, touched=0.0)
        return _time(layer.name, layer.op, replace(device, layer_overhead=0.0), nothing)
    speed = device.operations.get(layer.op, device.elementwise)
    matrix = 2 * layer.macs / device.matrix_speed(layer)
    elementwise = (layer.flops - 2 * layer.macs) / speed
    return _time(layer.name, layer.op, device, step, matrix, elementwise)


def _time(
    name: str,
    op: str,
    device: Device,
    step: _Step,
    matrix: float = 0.0,
    elementwise: float = 0.0,
) -> LayerTime:
    compute, movement = matrix + elementwise, step.moved / device.bandwidth
    if device.internal_bandwidth:
        inside = max(step.touched - step.moved, 0.0)
        movement += inside / device.internal_bandwidth
    both = max(compute, movement) if device.overlap == "full" else compute + movement
    return LayerTime(
        name=name,
        op=op,
        matrix_s=matrix,
        elementwise_s=elementwise,
        compute_s=compute,
        moved_bytes=step.moved,
        movement_s=movement,
        time_s=both + device.layer_overhead,
        binds="movement" if movement > compute else "compute",
        held_bytes=step.held,
        exceeded=step.exceeded,
    )


def _activation_bytes(value: ir.Value, shapes: Shapes, device: Device) -> float:
    if device.activation_bytes:
        return prod(shapes.of(value) or (0,)) * device.activation_bytes
    return value_bytes(value, shapes)


def _weights_bytes(layer: Layer, device: Device) -> float:
    if device.weight_bytes:
        return layer.params * device.weight_bytes
    return layer.weight_bytes


class _Accumulating:
    """§5: outputs and coefficients pile up; past the limit all of it is moved out."""

    def __init__(self, graph: ir.Graph, shapes: Shapes, device: Device) -> None:
        self.shapes, self.device = shapes, device
        self.held = 0.0
        self.inside: set[ir.Value] = set()

    def step(self, index: int, node: ir.Node, weights: float) -> _Step:
        moved = weights
        for value in {_owner(v) for v in node.inputs if v is not None}:
            if value.const_value is None and value not in self.inside:
                size = self._size(value)  # the network's input, or moved out before
                moved, self.held = moved + size, self.held + size
                self.inside.add(value)
        outputs = sum(self._size(v) for v in node.outputs)
        held = self.held + outputs + weights
        exceeded = held > self.device.internal_memory
        if exceeded:
            moved += held
            self.inside.clear()
            self.held = outputs
        else:
            self.held = held
        self.inside.update(node.outputs)
        return _Step(moved, moved, held, exceeded)

    def _size(self, value: ir.Value) -> float:
        return _activation_bytes(value, self.shapes, self.device)


class _Live:
    """What is still needed is held; what doesn't fit passes through external memory."""

    def __init__(self, graph: ir.Graph, shapes: Shapes, device: Device) -> None:
        self.shapes, self.device = shapes, device
        nodes = list(graph)
        last: dict[ir.Value, int] = {}
        for value, index in last_uses(nodes).items():
            owner = _owner(value)
            last[owner] = max(last.get(owner, 0), index)
        last.update(dict.fromkeys((_owner(v) for v in graph.outputs), len(nodes)))
        self.last = {v: i for v, i in last.items() if v.const_value is None}
        self.alive = {v for v in graph.inputs if v in self.last}
        self.fresh = set(self.alive)

    def step(self, index: int, node: ir.Node, weights: float) -> _Step:
        self.alive = {v for v in self.alive if self.last.get(v, -1) >= index}
        reads = {_owner(v) for v in node.inputs if v is not None}
        reads = {v for v in reads if v.const_value is None}
        self.alive |= reads | set(node.outputs)
        held = weights + self._size(self.alive)
        exceeded = held > self.device.internal_memory
        own = reads | set(node.outputs)
        moved = weights + self._size(own if exceeded else reads & self.fresh)
        self.fresh -= reads
        return _Step(moved, weights + self._size(own), held, exceeded)

    def _size(self, values: Iterable[ir.Value]) -> float:
        return sum(_activation_bytes(v, self.shapes, self.device) for v in values)


def _owner(value: ir.Value) -> ir.Value:
    """The value whose memory this one shows: views take none of their own."""
    while (node := value.producer()) is not None and node.op_type in VIEWS:
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value
