"""Low-rank forms of one layer: which there are, what they lose, and putting them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.stats import Collector, Columns, Products, Stats, Window
from squeeze.cost.layers import count
from squeeze.cost.ops import CONTRACTIONS
from squeeze.model import node_name
from squeeze.rewrite.build import Fragment, attach, graft, lazy_weight, settle
from squeeze.rewrite.fit import forms, match, ranks, read
from squeeze.rewrite.fit.blocks import (
    WIDEST,
    BlockTask,
    Start,
    clamp,
    folded,
    pre_activation,
)
from squeeze.rewrite.fit.forms import Form, Target
from squeeze.rewrite.fit.solve import Affine
from squeeze.rewrite.fit.waves import Calibration, few_rows
from squeeze.rewrite.plan import Cost
from squeeze.rewrite.sites import Candidate, Site
from squeeze.shapes import Shapes

Array = np.ndarray
MENU_WIDEST = 2500  # columns up to which menus are judged on inputs, not outputs alone


@dataclass(frozen=True)
class Layer:
    """A layer that can be factorised: a convolution's `site`, or an FC node.

    FC weights are (N, K), or (B, N, K) batched; `nodes` is what gets replaced.
    """

    node: ir.Node
    site: Site | None
    methods: tuple[str, ...]
    scale: float = 1.0  # alpha of Gemm
    transposed: bool = False
    add: ir.Node | None = None  # behind a MatMul: its bias

    @property
    def name(self) -> str:
        return node_name(self.node)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        if self.site is not None:
            return self.site.nodes
        return (self.node, self.add) if self.add is not None else (self.node,)

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def target(self) -> str:
        if self.site is not None:
            return pre_activation(self.site).name or ""
        return self.nodes[-1].outputs[0].name or ""

    @property
    def dtype(self) -> ir.DataType:
        return _tensor(self.node.inputs[1]).dtype

    def weight(self) -> Array:
        """In float64: (O, C, *k), (N, K) or (B, N, K)."""
        if self.site is not None:
            return folded(self.site)[0]
        array = _tensor(self.node.inputs[1]).numpy().astype(np.float64) * self.scale
        return array if self.transposed else np.swapaxes(array, -1, -2)

    def bias(self) -> Array:
        """(O,), zeros where there is none."""
        if self.site is not None:
            return folded(self.site)[1]
        out = self.shape[-2]
        beta = self.node.attributes.get_float("beta", 1.0)
        if self.node.op_type == "Gemm" and len(self.node.inputs) > 2:
            array = _tensor(self.node.inputs[2]).numpy().astype(np.float64)
            return np.broadcast_to(array.reshape(-1) * beta, (out,))
        if self.add is not None:
            value = next(v for v in self.add.inputs if _constant(v))
            return _tensor(value).numpy().astype(np.float64).reshape(-1)
        return np.zeros(out)

    @property
    def biased(self) -> bool:
        """Whether there is a bias to correct."""
        if self.site is not None or self.add is not None:
            return True
        inputs = self.node.inputs
        return len(inputs) > 2 and inputs[2] is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's, without reading it."""
        dims = tuple(int(n) for n in _tensor(self.node.inputs[1]).shape.numpy())
        if self.site is not None or self.transposed:
            return dims
        return (*dims[:-2], dims[-1], dims[-2])

    def full(self, method: str) -> tuple[int, ...]:
        """The ranks at which nothing is lost."""
        shape = self.shape
        if self.site is None:
            return (min(shape[-2:]),)
        out, cin, *kernel = shape
        if method == "spatial":
            return (min(cin * kernel[0], out * kernel[1]),)
        if method == "separable":
            return (min(out, prod(kernel)),)
        if method == "tucker":
            return (min(cin, out * prod(kernel)), min(out, cin * prod(kernel)))
        return (min(out, cin * prod(kernel)),)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None and value.const_value is not None
    return value.const_value


@dataclass(frozen=True)
class Cut:
    """A method with its ranks: one, or (input, output) for Tucker-2.

    The rank of "separable" is the depthwise part's outputs per channel.
    """

    method: str
    ranks: tuple[int, ...]

    @property
    def text(self) -> str:
        return " × ".join(str(r) for r in self.ranks)


# -- which layers -------------------------------------------------------------------


def layer(
    node: ir.Node, candidate: Candidate | None, shapes: Shapes
) -> tuple[Layer | None, str]:
    """The layer, or the reason why it isn't one; neither for what has no weights."""
    if candidate is not None:
        if candidate.site is None:
            return None, candidate.reason
        return _convolution(candidate.site)
    if node.op_type == "Gemm" and node.domain == "":
        return _gemm(node)
    if node.op_type == "MatMul" and node.domain == "":
        return _matmul(node)
    if node.op_type in CONTRACTIONS and any(_constant(v) for v in node.inputs[1:]):
        return None, f"{node.op_type} has no low-rank form here"
    return None, ""


def _convolution(site: Site) -> tuple[Layer | None, str]:
    if site.group != 1:
        return None, "a grouped convolution"
    kernel = [a.kernel for a in site.axes]
    bare = replace(site, activation=(), pool=None)
    if prod(kernel) == 1:
        return Layer(site.conv, bare, ("pca",)), ""
    spatial = ("spatial",) if len(kernel) == 2 and min(kernel) > 1 else ()
    return Layer(site.conv, bare, ("pca", *spatial, "tucker", "separable")), ""


def _gemm(node: ir.Node) -> tuple[Layer | None, str]:
    if not _constant(node.inputs[1]):
        return None, ""
    if any(v is not None and not _constant(v) for v in node.inputs[2:]):
        return None, "its bias is not constant"
    if node.attributes.get_int("transA", 0):
        return None, "its input is transposed"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        shape = _tensor(node.inputs[2]).shape.numpy()
        if len(shape) > 1 and prod(shape[:-1]) != 1:
            return None, "its bias differs from row to row"
    alpha = node.attributes.get_float("alpha", 1.0) or 1.0
    transposed = bool(node.attributes.get_int("transB", 0))
    return Layer(node, None, ("pca",), alpha, transposed), ""


def _matmul(node: ir.Node) -> tuple[Layer | None, str]:
    if not _constant(node.inputs[1]) or _constant(node.inputs[0]):
        return None, ""
    rank = len(_tensor(node.inputs[1]).shape)
    if rank < 2:
        return None, "its weight is a vector"
    return Layer(node, None, ("pca",), add=_bias_add(node, rank)), ""


def _bias_add(node: ir.Node, rank: int) -> ir.Node | None:
    """The Add of a constant vector that alone reads a MatMul."""
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output() or rank != 2:
        return None
    user: ir.Node = next(iter(uses)).node
    if user.op_type != "Add" or user.graph is not node.graph:
        return None
    other = next((v for v in user.inputs if v is not node.outputs[0]), None)
    width = _tensor(node.inputs[1]).shape.numpy()[-1]
    if not _constant(other) or tuple(_tensor(other).shape.numpy()) != (width,):
        return None
    return user


def _constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


# -- statistics and spectra ---------------------------------------------------------


def statistics(
    model: ir.Model, shapes: Shapes, layers: Sequence[Layer], calibration: Calibration
) -> dict[str, Stats]:
    """Of every layer, in one pass: rows `[inputs | outputs]`, or outputs where wide."""
    wanted = {}
    for one in layers:
        if (request := _request(one, shapes, 0, MENU_WIDEST)) is not None:
            wanted[one.name] = request
    collector = Collector(
        model,
        shapes,
        wanted,
        samples=calibration.samples,
        seed=calibration.seed,
    )
    show = calibration.progress
    return collector.over(
        calibration.fitting,
        (lambda done, total: show("looking at the layers", done, total))
        if show
        else None,
    )


def _request(
    one: Layer, shapes: Shapes, inputs_of: int, widest: int
) -> Products | None:
    """Inputs of model `inputs_of` beside the original's outputs."""
    if len(one.shape) == 3 and one.site is None:
        return None  # batched: every matrix of the batch has inputs of its own
    axis = 1 if one.site is not None else -1
    target = Columns(one.target, axis)
    width = prod(one.shape[1:])
    if width > widest or len(shapes.need(one.input, one.node)) < 2:
        return Products((target,)) if one.shape[0] <= WIDEST else None
    entry = Columns(one.input.name or "", axis, _window(one), inputs_of)
    return Products((entry, target))


def _window(one: Layer) -> Window | None:
    if one.site is None:
        return None
    axes = one.site.axes
    return Window(
        tuple(a.kernel for a in axes),
        tuple(a.stride for a in axes),
        (*(a.pads[0] for a in axes), *(a.pads[1] for a in axes)),
        tuple(a.dilation for a in axes),
    )


@dataclass(frozen=True)
class Scale:
    """What ranks of a layer mean: its weight, and its statistics if there are any."""

    layer: Layer
    weight: Array
    target: Target | None
    outputs: Array | None
    known: dict[str, list[Array]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, layer: Layer, stats: Stats | None) -> Scale:
        weight = layer.weight()
        if stats is None:
            return cls(layer, weight, None, None)
        width = prod(weight.shape[1:])
        covariance = stats.covariance
        if len(covariance) == len(weight):
            return cls(layer, weight, None, covariance)
        target = match.target_of(stats, width)
        return cls(layer, weight, target, covariance[width:, width:])

    def spectra(self, method: str) -> list[Array]:
        """Squared singular values along each rank of a method, largest first."""
        if method not in self.known:
            self.known[method] = self._spectra(method)
        return self.known[method]

    def _spectra(self, method: str) -> list[Array]:
        if method == "spatial":
            axes = self.weight.transpose(1, 2, 0, 3)
            flat = axes.reshape(axes.shape[0] * axes.shape[1], -1)
            return [np.linalg.svd(flat, compute_uv=False) ** 2]
        if method == "separable":
            out, cin = self.weight.shape[:2]
            parts = self.weight.reshape(out, cin, -1).transpose(1, 0, 2)
            return [(np.linalg.svd(parts, compute_uv=False) ** 2).sum(0)]
        if method == "tucker":
            out, cin = self.weight.shape[:2]
            rows = self.weight.reshape(out, -1)
            columns = self.weight.reshape(out, cin, -1).transpose(1, 0, 2)
            return [forms.spectrum(m @ m.T) for m in (columns.reshape(cin, -1), rows)]
        if self.outputs is not None:
            return [forms.spectrum(self.outputs)]
        if self.layer.site is not None or self.weight.ndim == 2:
            flat = self.weight.reshape(len(self.weight), -1)
            flat = flat if len(flat) <= len(flat.T) else flat.T
            return [forms.spectrum(flat @ flat.T)]
        batch = self.weight.reshape(-1, *self.weight.shape[-2:])
        return [(np.linalg.svd(batch, compute_uv=False) ** 2).sum(0)]

    def by_energy(self, method: str, energy: float, round_to: int) -> Cut:
        """The smallest ranks that keep the energy along each of the method's modes."""
        full = self.layer.full(method)
        found = [ranks.by_energy(s, energy) for s in self.spectra(method)]
        step = _step(method, round_to)
        up = [-(-r // step) * step for r in found]
        return Cut(method, tuple(min(r, f) for r, f in zip(up, full, strict=True)))

    def by_share(self, method: str, share: float, round_to: int) -> Cut:
        full = self.layer.full(method)
        step = _step(method, round_to)
        picked = (ranks.rounded(int(share * f), step, f) for f in full)
        return Cut(method, tuple(picked))

    def by_rank(self, method: str, rank: int) -> Cut:
        return Cut(method, tuple(min(rank, f) for f in self.layer.full(method)))

    def by_evbmf(self, method: str, round_to: int) -> Cut:
        """Ranks from the weights' singular values (Kim et al. 2016 use this)."""
        bare = Scale(self.layer, self.weight, None, None)
        full = self.layer.full(method)
        found = []
        for spectrum, most in zip(bare.spectra(method), full, strict=True):
            rows = len(spectrum)
            columns = max(self.weight.size // rows, rows)
            rank = ranks.evbmf(np.sqrt(spectrum), rows, columns)
            found.append(ranks.rounded(rank, round_to, most))
        return Cut(method, tuple(found))

    def error(self, cut: Cut) -> float:
        """Relative squared error of the outputs; of the weights without data."""
        if cut.method == "pca" or (self.target is None and cut.method != "tucker"):
            return forms.tail(self.spectra(cut.method)[0], cut.ranks[0])
        if self.target is None:
            return 1 - float(self._core_energy()[tuple(r - 1 for r in cut.ranks)])
        if cut.method == "spatial":
            return float(self._spatial_errors(self.target)[cut.ranks[0] - 1])
        form = forms.fit_last(kernel_form(self.weight, cut), self.target)
        return self.target.error(form.kernel())

    def _core_energy(self) -> Array:
        """Share of the weights' energy that a Tucker core of each size holds."""
        if "core" not in self.known:
            full = self.layer.full("tucker")
            core = forms.tucker(self.weight, *full).factors[1]  # (out, in, taps)
            energy = np.square(core).sum(2).T.cumsum(0).cumsum(1)
            self.known["core"] = [energy / max(energy[-1, -1], 1e-300)]
        return self.known["core"][0]

    def _spatial_errors(self, target: Target) -> Array:
        """After least squares of the horizontal part, at every rank that may pay."""
        if "errors" not in self.known:
            out, cin, high, wide = self.weight.shape
            most = min(
                self.layer.full("spatial")[0],
                high * wide * out * cin // (high * cin + wide * out) + 1,
            )
            form = forms.spatial(self.weight, most)
            self.known["errors"] = [forms.nested_errors(form, target)]
        errors = self.known["errors"][0]
        return np.pad(errors, (0, self.layer.full("spatial")[0] - len(errors)), "edge")


def _step(method: str, round_to: int) -> int:
    """A multiplier is a count of parallel convolutions; channels come rounded."""
    return 1 if method == "separable" else round_to


def kernel_form(weight: Array, cut: Cut) -> Form:
    """The closed form of a convolution's cut, by its weights alone."""
    if cut.method == "spatial":
        return forms.spatial(weight, cut.ranks[0])
    if cut.method == "tucker":
        return forms.tucker(weight, *cut.ranks)
    if cut.method == "separable":
        return forms.grouped_pointwise(weight, weight.shape[1], cut.ranks[0])
    flat = weight.reshape(len(weight), -1)
    return forms.output_pca(flat, cut.ranks[0], None)


# -- fragments ----------------------------------------------------------------------


def cost(one: Layer, cut: Cut, shapes: Shapes) -> Cost:
    """What the cut costs, counted on its nodes."""
    return _fragment(one, cut, shapes).cost


def break_even(one: Layer, method: str, before: Cost, shapes: Shapes) -> int:
    """The largest (equal) rank that costs less than the layer."""
    low, high = 0, max(one.full(method))
    while high - low > 1:
        middle = (low + high) // 2
        ranks_ = tuple(min(middle, f) for f in one.full(method))
        cheaper = cost(one, Cut(method, ranks_), shapes).macs < before.macs
        low, high = (middle, high) if cheaper else (low, middle)
    return low


class _Maker:
    """Nodes in a row, with their shapes, for a layer's place."""

    def __init__(self, one: Layer, shapes: Shapes) -> None:
        self.one, self.nodes, self.weights = one, list[ir.Node](), list[ir.Value]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        entry = ir.Value(name=f"{one.name}/low_rank/input")
        entry.type = ir.TensorType(one.dtype)
        self.shapes[entry.name or ""] = shapes.need(one.input, one.node)
        self.input = self.value = entry

    def weight(self, shape: tuple[int, ...], role: str) -> ir.Value:
        """A weight to be filled in."""
        name = f"{self.one.name}/low_rank/{len(self.nodes) + 1}.{role}"
        value = lazy_weight(name, shape, self.one.dtype, lambda: np.zeros(shape))
        self.weights.append(value)
        return value

    def node(
        self, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any]
    ) -> ir.Node:
        name = f"{self.one.name}/low_rank/{len(self.nodes) + 1}_{op}"
        node = ir.node(op, [self.value, *inputs], attributes, name=name)
        node.outputs[0].name = f"{name}_out"
        node.outputs[0].type = ir.TensorType(self.one.dtype)
        self.nodes.append(node)
        self.value = node.outputs[0]
        return node

    def depthwise(self, copies: int, window: Window) -> None:
        """`copies` depthwise convolutions side by side: the form that runs fast."""
        source = self.value
        width = self.shapes[source.name or ""][1]
        made = []
        for _ in range(copies):
            self.value = source
            self.conv(width, window, False, group=width)
            made.append(self.value)
        if copies > 1:
            shape = self.shapes[made[0].name or ""]
            self.value = made[0]
            self.node("Concat", made[1:], {"axis": 1})
            wide = (shape[0], copies * width, *shape[2:])
            self.shapes[self.value.name or ""] = wide

    def conv(self, out: int, window: Window, bias: bool, group: int = 1) -> None:
        shape = self.shapes[self.value.name or ""]
        inputs = [self.weight((out, shape[1] // group, *window.kernel), "weight")]
        if bias:
            inputs.append(self.weight((out,), "bias"))
        attributes = dict(
            kernel_shape=list(window.kernel),
            strides=list(window.strides),
            pads=list(window.pads),
            dilations=list(window.dilations),
            group=group,
        )
        self.node("Conv", inputs, attributes)
        grid = window.grid(shape[2:])
        self.shapes[self.value.name or ""] = (shape[0], out, *grid)

    def dense(self, out: int, bias: bool) -> None:
        """Gemm or MatMul to `out` columns, as the layer is one."""
        shape = self.shapes[self.value.name or ""]
        batch = self.one.shape[:-2]
        if self.one.node.op_type == "Gemm":
            inputs = [self.weight((out, shape[-1]), "weight")]
            inputs += [self.weight((out,), "bias")] if bias else []
            self.node("Gemm", inputs, {"transB": 1})
        else:
            self.node("MatMul", [self.weight((*batch, shape[-1], out), "weight")], {})
        if bias and self.one.node.op_type != "Gemm":
            made = (*shape[:-1], out)
            self.shapes[self.value.name or ""] = made
            self.node("Add", [self.weight((out,), "bias")], {})
        lead = np.broadcast_shapes(shape[:-2], batch)
        self.shapes[self.value.name or ""] = (*lead, *shape[-2:-1], out)

    def fragment(self) -> Fragment:
        shapes = Shapes(self.shapes, {}, {})
        return Fragment(
            nodes=tuple(self.nodes),
            input=self.input,
            output=self.value,
            weights=tuple(self.weights),
            cost=Cost(*count(self.nodes, shapes)),
            settings={},
            shapes=shapes,
        )


def _point(axes: int) -> Window:
    return Window((1,) * axes, (1,) * axes, (0,) * (2 * axes), (1,) * axes)


def _fragment(one: Layer, cut: Cut, shapes: Shapes) -> Fragment:
    maker = _Maker(one, shapes)
    window = _window(one)
    if window is None:
        maker.dense(cut.ranks[0], False)
        maker.dense(one.shape[-2], one.biased)
        return maker.fragment()
    axes = len(window.kernel)
    out = one.shape[0]
    if cut.method == "spatial":
        for axis, channels in ((0, cut.ranks[0]), (1, out)):
            maker.conv(channels, _only(window, axis), channels is out)
    elif cut.method == "tucker":
        maker.conv(cut.ranks[0], _point(axes), False)
        maker.conv(cut.ranks[1], window, False)
        maker.conv(out, _point(axes), True)
    elif cut.method == "separable":
        maker.depthwise(cut.ranks[0], window)
        maker.conv(out, _point(axes), True)
    else:
        maker.conv(cut.ranks[0], window, False)
        maker.conv(out, _point(axes), True)
    return maker.fragment()


def _only(window: Window, axis: int) -> Window:
    """A two-dimensional window along one axis alone."""

    def pick(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(v if i % 2 == axis else other for i, v in enumerate(values))

    return Window(
        pick(window.kernel, 1),
        pick(window.strides, 1),
        pick(window.pads, 0),
        pick(window.dilations, 1),
    )


# -- putting cuts in ----------------------------------------------------------------


class Task:
    """A layer's cut on its way into the graph, by weights alone or fitted.

    A `waves.Task`; subclasses say what they want and how they fit.
    """

    def __init__(self, one: Layer, cut: Cut, fragment: Fragment) -> None:
        self.one, self.cut, self.fragment = one, cut, fragment
        self.error: float | None = None
        self.few: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.one.name

    def attach(self, graph: ir.Graph) -> None:
        attach(graph, self.one, self.fragment)

    def settle(self, graph: ir.Graph) -> None:
        settle(graph, self.one, self.fragment)

    def graft(self, graph: ir.Graph) -> None:
        graft(graph, self.one, self.fragment)

    def wanted(self, shapes: Shapes) -> Products | None:
        raise NotImplementedError

    def solve(self, stats: Stats, held: Stats) -> None:
        raise NotImplementedError


def task(one: Layer, cut: Cut, original: ir.Model | None, shapes: Shapes) -> Task:
    """The cut with weights from the layer's own; `original` computes the targets."""
    fragment = _fragment(one, cut, shapes)
    if one.site is not None:
        return ConvTask(one, cut, fragment, original)
    return DenseTask(one, cut, fragment)


class ConvTask(Task):
    """A convolution's cut: fitted as any block is."""

    def __init__(
        self, one: Layer, cut: Cut, fragment: Fragment, original: ir.Model | None
    ) -> None:
        super().__init__(one, cut, fragment)
        assert one.site is not None
        weight, bias = folded(one.site)
        chain = read.chain(fragment.nodes)
        assert chain is not None
        structure = read.structure(chain, weight.shape[2:])
        assert structure is not None
        form = kernel_form(weight, cut)
        read.write(structure.arrays(form, bias))
        self.inner: BlockTask | None = None
        if original is not None:
            begun = Start(chain, structure, form, "closed form")
            bounds = _following_clamp(one.site)
            self.inner = BlockTask(one.site, fragment, begun, original, bounds)

    def wanted(self, shapes: Shapes) -> Products | None:
        assert self.inner is not None
        return self.inner.wanted(shapes)

    def attach(self, graph: ir.Graph) -> None:
        if self.inner is not None:
            self.inner.attach(graph)
        else:
            super().attach(graph)

    def solve(self, stats: Stats, held: Stats) -> None:
        assert self.inner is not None
        self.inner.solve(stats, held)
        self.few = self.inner.few
        self.error = self.inner.fitted.error if self.inner.fitted else None


def _following_clamp(site: Site) -> match.Clamp | None:
    """The activation that alone reads the layer, where it clamps."""
    uses = site.output.uses()
    if len(uses) != 1 or site.output.is_graph_output():
        return None
    return clamp(replace(site, activation=(next(iter(uses)).node,)))


class DenseTask(Task):
    """A fully connected layer's cut: truncated SVD, or output-PCA on data."""

    def __init__(self, one: Layer, cut: Cut, fragment: Fragment) -> None:
        super().__init__(one, cut, fragment)
        weight = one.weight()
        rank = cut.ranks[0]
        matrices = weight.reshape(-1, *weight.shape[-2:])
        factors = [forms.output_pca(m, rank, None).factors for m in matrices]
        lead = weight.shape[:-2]
        first = np.stack([f[0][0] for f in factors]).reshape(*lead, rank, -1)
        last = np.stack([f[1][:, 0] for f in factors]).reshape(*lead, -1, rank)
        self._write(first, last, one.bias())

    def _write(self, first: Array, last: Array, bias: Array) -> None:
        gemm = self.one.node.op_type == "Gemm"
        arrays = (
            [first, last] if gemm else [np.swapaxes(a, -1, -2) for a in (first, last)]
        )
        found = {}
        layers = self.fragment.nodes[:2]
        for node, array in zip(layers, arrays, strict=True):
            value = node.inputs[1]
            assert value is not None
            found[value] = array
        if self.one.biased:
            value = self.fragment.nodes[-1].inputs[-1]
            assert value is not None
            found[value] = bias
        read.write(found)

    def wanted(self, shapes: Shapes) -> Products | None:
        return _request(self.one, shapes, 1, WIDEST)

    def solve(self, stats: Stats, held: Stats) -> None:
        weight, rank = self.one.weight(), self.cut.ranks[0]
        out, width = weight.shape
        if len(stats.mean) == out:
            form = forms.output_pca(weight, rank, None, stats.covariance)
            basis = form.factors[1][:, 0]
            mean = stats.mean - self.one.bias()
            bias = self.one.bias() + mean - basis @ (basis.T @ mean)
            rest = held.covariance
            spread = float(np.trace(rest))
            kept = float(np.trace(basis.T @ rest @ basis))
            self.error = max(1 - kept / spread, 0.0) if spread > 0 else 0.0
        else:
            self.few = few_rows(stats, width)
            target = match.target_of(stats, width)
            form = forms.output_pca(weight, rank, target)
            plain = forms.output_pca(
                weight, rank, None, stats.covariance[width:, width:]
            )
            found = [match.fit(f, stats, held, sweeps=0) for f in (form, plain)]
            best = min(found, key=lambda f: f.error)
            form, bias, self.error = best.form, best.bias, best.error
        if not self.one.biased:
            bias = np.zeros(out)
            if len(stats.mean) != out:
                self.error = Affine(form.kernel(), bias).error(held)
        self._write(form.factors[0][0], form.factors[1][:, 0], bias)
