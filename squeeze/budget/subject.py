"""A model under check: its costs, each a number or the reason why there is none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.budget.metrics import COSTS, LAYER_METRICS
from squeeze.cost import Layer, Profile, ops, profile
from squeeze.errors import SqueezeError
from squeeze.model import node_name
from squeeze.shapes import Shapes

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


@dataclass(frozen=True)
class LayerCosts:
    """One layer's op and its costs by metric name."""

    op: str
    costs: Mapping[str, int]


@dataclass(frozen=True)
class Costs:
    """Deterministic costs, ready to compare: of a model, or from a baseline.

    `totals` is by metric name, `missing` says why a metric is not in it.
    """

    totals: Mapping[str, int]
    layers: Mapping[str, LayerCosts]
    missing: Mapping[str, str] = field(default_factory=dict)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    peak_layer: str = ""
    uncounted: Mapping[str, str] = field(default_factory=dict)  # layer → op


@dataclass
class Subject:
    """A model, loaded when first asked. `name` is its path as the user wrote it."""

    name: str
    source: Path | ir.Model
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_ops: frozenset[str] = frozenset()

    @property
    def path(self) -> Path | None:
        """The model's file; None where it exists in memory only."""
        if isinstance(self.source, Path):
            return self.source
        found = models.source(self.source)
        return found.path if found else None

    @cached_property
    def model(self) -> ir.Model:
        """Raises SqueezeError where the file is no model."""
        if not isinstance(self.source, Path):
            return self.source
        with _bounded(self.name):
            return models.load(self.source)

    @cached_property
    def shapes(self) -> Shapes:
        """Raises SqueezeError where a size is dynamic or shapes don't fit together."""
        with _bounded(self.name):
            return shaping.infer(self.model, dict(self.input_shapes))

    @cached_property
    def profile(self) -> Profile:
        """Raises SqueezeError where a size is not known."""
        with _bounded(self.name):
            return profile(self.model, shapes=self.shapes)

    @cached_property
    def costs(self) -> Costs:
        """Every deterministic cost, or why it can't be told."""
        try:
            model = self.model
        except SqueezeError as error:
            return Costs({}, {}, dict.fromkeys(COSTS, self.plain(error)))
        try:
            found = self.profile
        except SqueezeError as error:
            return self._without_shapes(self.plain(error))
        missing = _missing(model, self.shapes, found, self.ignore_ops)
        totals = {
            name: int(getattr(found.totals, metric.cost))
            for name, metric in COSTS.items()
            if name not in missing
        }
        unknown = {*found.totals.uncounted_ops} - {*self.ignore_ops}
        return Costs(
            totals,
            layer_costs(found.layers),
            missing,
            found.input_shapes,
            found.peak_layer,
            {
                node_name(n): op
                for n in model.graph
                if (op := ops.full_name(n)) in unknown
            },
        )

    def _without_shapes(self, reason: str) -> Costs:
        """The sizes of the file and of the weights need no shapes."""
        source = models.source(self.model)
        totals = {"weight_size": models.weight_bytes(self.model)}
        if source is not None:
            totals["file_size"] = source.file_bytes
        missing = {name: reason for name in COSTS if name not in totals}
        return Costs(totals, {}, missing)

    def plain(self, error: Exception) -> str:
        """An error's message without the model's name in front."""
        text = str(error)
        for prefix in (self.name, str(self.path)):
            text = text.removeprefix(f"{prefix}: ")
        return text

    def digest(self) -> str:
        """SHA-256 of the model's file; of its serialised form where it has none."""
        if self.path is None:
            return hashlib.sha256(
                ir.to_proto(self.model).SerializeToString()
            ).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _bounded(name: str) -> Iterator[None]:
    """Sizes beyond memory or beyond 64 bits are the model's fault, said as such."""
    try:
        yield
    except (MemoryError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise SqueezeError(f"{name}: its sizes are beyond reach: {reason}") from error


def layer_costs(layers: tuple[Layer, ...]) -> dict[str, LayerCosts]:
    """By name; a name that appears again gets #2, #3 …"""
    seen: Counter[str] = Counter()
    found: dict[str, LayerCosts] = {}
    for layer in layers:
        seen[layer.name] += 1
        times = seen[layer.name]
        name = layer.name if times == 1 else f"{layer.name}#{times}"
        costs = {m.name: int(getattr(layer, m.cost)) for m in LAYER_METRICS.values()}
        found[name] = LayerCosts(layer.op, costs)
    return found


def _missing(
    model: ir.Model, shapes: Shapes, found: Profile, ignored: frozenset[str]
) -> dict[str, str]:
    """Why a total would be too low: it never is counted as zero in silence."""
    unknown = sorted({*found.totals.uncounted_ops} - {*ignored})
    reasons: dict[str, str] = {}
    if unknown:
        reason = (
            f"no cost known for {', '.join(unknown)}; if it costs next to nothing: "
            f"ignore_ops = {_toml_list(unknown)}"
        )
        reasons |= dict.fromkeys(("macs", "flops"), reason)
    hidden = [op for op in unknown if op in CONTROL_FLOW]
    packed = _packed_weights(model, {*unknown})
    if hidden or packed:
        where = (
            f"the bodies of {', '.join(hidden)}" if hidden else f"what {packed} holds"
        )
        reasons["params"] = (
            f"{where} may be parameters; limit weight_size, or ignore_ops = "
            f"{_toml_list(hidden or [packed])}"
        )
    open_shapes = _open_shapes(model, shapes, ignored)
    if hidden or open_shapes:
        where = open_shapes or f"the body of {hidden[0]}"
        reasons["peak_memory"] = f"the size of {where} is unknown"
    return reasons


def _packed_weights(model: ir.Model, unknown: set[str]) -> str:
    """An unknown op that reads integer weights: how many it packs can't be told."""
    for node in model.graph:
        if ops.full_name(node) in unknown:
            values = [v.const_value for v in node.inputs if v is not None]
            weights = [t for t in values if t is not None and t.size > 1]
            if any(not t.dtype.is_floating_point() for t in weights):
                return ops.full_name(node)
    return ""


def _open_shapes(model: ir.Model, shapes: Shapes, ignored: frozenset[str]) -> str:
    """The first value whose shape inference left open, of an op not ignored."""
    for node in model.graph:
        if ops.full_name(node) in ignored:
            continue
        for value in node.outputs:
            needed = value.name and (value.uses() or value.is_graph_output())
            if needed and shapes.of(value) is None:
                return f"{value.name!r} ({node.op_type})"
    return ""


def _toml_list(items: list[str]) -> str:
    return "[" + ", ".join(f'"{item}"' for item in items) + "]"
