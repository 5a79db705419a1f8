"""Fitting the blocks that `convert` puts in.

`start` fills a built block from the site's weights alone; `BlockTask` refits it on
data.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.stats import Columns, Products, Stats, Window
from squeeze.rewrite.build import Fragment, attach, settle
from squeeze.rewrite.fit import forms, match, read
from squeeze.rewrite.fit.forms import SWEEPS, Form
from squeeze.rewrite.fit.match import Clamp, Fitted, dense, fit
from squeeze.rewrite.fit.read import Chain, Structure
from squeeze.rewrite.fit.waves import few_rows, kept_samples
from squeeze.rewrite.sites import Site
from squeeze.shapes import Shapes

Array = np.ndarray
WIDEST = 6000  # columns of a Gram matrix: 0.6 GB in float64 with what solving takes


def folded(site: Site) -> tuple[Array, Array]:
    """Kernel (O, C, *k) and bias (O,) in float64, BatchNormalization folded in."""
    weight = _constant(site.conv.inputs[1])
    bias = np.zeros(site.cout)
    if len(site.conv.inputs) > 2 and site.conv.inputs[2] is not None:
        bias = _constant(site.conv.inputs[2])
    if site.batch_norm is not None:
        scale, shift, mean, variance = (
            _constant(v) for v in site.batch_norm.inputs[1:5]
        )
        epsilon = site.batch_norm.attributes.get_float("epsilon", 1e-5)
        scale = scale / np.sqrt(variance + epsilon)
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = (bias - mean) * scale + shift
    return weight, bias


def _constant(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def clamp(site: Site) -> Clamp | None:
    """The site's activation, where it clamps."""
    if len(site.activation) != 1:
        return None
    node = site.activation[0]
    if node.op_type == "Relu":
        return Clamp(0.0)
    if node.op_type == "Clip" and len(node.inputs) > 1:
        bounds = [
            float(v.const_value.numpy()) if v is not None and v.const_value else default
            for v, default in zip(
                (*node.inputs[1:], None, None), (-np.inf, np.inf), strict=False
            )
        ]
        return Clamp(*bounds)
    return None


@dataclass(frozen=True)
class Start:
    """A block with start weights. `method` says how; "" where it has none."""

    chain: Chain | None
    structure: Structure | None
    form: Form | None
    method: str


def start(site: Site, fragment: Fragment) -> Start:
    """Fill the fragment from the site's weights alone."""
    chain = read.chain(fragment.nodes)
    if chain is None or site.group != 1:
        return Start(chain, None, None, "")
    weight, bias = folded(site)
    structure = read.structure(chain, weight.shape[2:])
    if structure is not None and _acts_alike(chain, site):
        form = structure.start(weight)
        read.write(structure.arrays(form, bias))
        return Start(chain, structure, form, "closed form")
    arrays = read.start_layers(chain, weight, bias)
    read.write(arrays)
    return Start(chain, None, None, "start weights" if arrays else "")


def _acts_alike(chain: Chain, site: Site) -> bool:
    """Whether the block ends with the site's own activation and nothing else."""
    return [n.op_type for n in chain.tail] == [n.op_type for n in site.activation]


def loss(site: Site, fragment: Fragment, scale: Scale | None) -> float:
    """Relative error that the block starts from: of outputs with data, else of weights.

    Blocks without a closed form are judged by the MACs they take away.
    """
    chain = read.chain(fragment.nodes)
    weight, _ = folded(site)
    structure = read.structure(chain, weight.shape[2:]) if chain else None
    if structure is None:
        taps = prod(weight.shape) * prod(int(a.targets[0]) for a in site.axes)
        return max(1 - fragment.cost.macs / max(taps, 1), 0.0)
    form = structure.start(weight)
    if scale is not None and scale.target is not None:
        return scale.target.error(forms.fit_last(form, scale.target).kernel())
    flat = weight.reshape(len(weight), -1)
    return float(
        np.square(flat - form.kernel()).sum() / max(np.square(flat).sum(), 1e-300)
    )


class Scale(Protocol):
    """Statistics of a layer, as far as a loss needs them."""

    @property
    def target(self) -> forms.Target | None: ...


def pre_activation(site: Site) -> ir.Value:
    node = site.batch_norm or site.conv
    return node.outputs[0]


def target_value(original: ir.Model, site: Site, before_activation: bool) -> str:
    """The value to match, by name; a pool that the block absorbs is added to it.

    Max-pooling and an activation that never falls change places, so the pooled
    pre-activation is what the block has to meet before its own activation.
    """
    if not before_activation:
        return site.output.name or ""
    name = pre_activation(site).name or ""
    if site.pool is None or not site.absorbed:
        return name
    graph = original.graph
    pooled = f"{name}/pooled"
    if any(v.name == pooled for n in graph for v in n.outputs):
        return pooled
    source = next(v for n in graph for v in n.outputs if v.name == name)
    node = ir.node("MaxPool", [source], site.pool.node.attributes)
    node.outputs[0].name = pooled
    graph.append(node)
    return pooled


class BlockTask:
    """A built block at its site, fitted to data."""

    def __init__(
        self,
        site: Site,
        fragment: Fragment,
        begun: Start,
        original: ir.Model,
        bounds: Clamp | None = None,
    ) -> None:
        self.site, self.fragment, self.begun = site, fragment, begun
        self.residual, self.alike, self.fits = _ending(site, fragment, begun.chain)
        self.target = target_value(original, site, self.alike) if self.fits else ""
        found = bounds or clamp(site)  # `bounds`: of an activation that stays outside
        self.clamp = found if self.alike and not self.residual else None
        self.fitted: Fitted | None = None
        self._input = site.input.name or ""
        self._width = 0
        self.few: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.site.name

    def attach(self, graph: ir.Graph) -> None:
        self._input = self.site.input.name or ""
        attach(graph, self.site, self.fragment)

    def settle(self, graph: ir.Graph) -> None:
        settle(graph, self.site, self.fragment)

    def wanted(self, shapes: Shapes) -> Products | None:
        """Columns [x | target | the residual's input]; None if it can't be fitted."""
        if not self.fits:
            return None
        entry, window = self._entry()
        self._width = shapes.shapes[entry][1] * prod(window.kernel)
        if self._width > WIDEST:
            return None
        columns = [Columns(entry, window=window, model=1), Columns(self.target)]
        if self.residual:
            columns.append(Columns(self._input, model=1))
        width = self._width + self.site.cout
        keep = kept_samples(width) if self.clamp is not None else 0
        return Products(tuple(columns), keep)

    def _entry(self) -> tuple[str, Window]:
        """What the fitted part reads: the block's input, or the last convolution's."""
        if self.begun.structure is not None:
            return self._input, self.begun.structure.window
        assert self.begun.chain is not None
        last = self.begun.chain.last
        assert last.input is not None
        return last.input.name or "", last.window

    def solve(self, stats: Stats, held: Stats) -> None:
        if self.residual:
            stats, held = (_without_skip(s, self._width) for s in (stats, held))
        self.few = few_rows(stats, self._width)
        _, bias = folded(self.site)
        if self.begun.structure is not None and self.begun.form is not None:
            form = self._best_rank(stats)
            sweeps = SWEEPS if form is None else 0  # nothing is better than the best
            form = form or self.begun.form
            self.fitted = fit(form, stats, held, self.clamp, sweeps=sweeps, bias=bias)
            arrays = self.begun.structure.arrays(self.fitted.form, self.fitted.bias)
        else:
            assert self.begun.chain is not None
            last = self.begun.chain.last
            form = dense(_flat(last.nodes[0]), last.group)
            self.fitted = fit(form, stats, held, self.clamp)
            arrays = _last_arrays(last.nodes[0], self.fitted)
        read.write(arrays)

    def _best_rank(self, stats: Stats) -> Form | None:
        """The best kernel of the rank, where one convolution and a 1×1 share it."""
        form = self.begun.form
        assert form is not None
        first = form.factors[0]
        full = min(self.site.cout, self._width)
        if form.spec != "gnl,ogn->ogl" or len(first) > 1 or first.shape[1] >= full:
            return None
        weight, _ = folded(self.site)
        target = match.target_of(stats, self._width)
        flat = weight.reshape(len(weight), -1)
        return forms.output_pca(flat, first.shape[1], target)


def _flat(node: ir.Node) -> Array:
    weight = _constant(node.inputs[1])
    return weight.reshape(len(weight), -1)


def _last_arrays(node: ir.Node, fitted: Fitted) -> dict[ir.Value, Array]:
    weight, bias = node.inputs[1], node.inputs[2]
    assert weight is not None and weight.const_value is not None and bias is not None
    shape = tuple(weight.const_value.shape.numpy())
    return {weight: fitted.form.factors[-1].reshape(shape), bias: fitted.bias}


def _without_skip(stats: Stats, width: int) -> Stats:
    """Rows [x | y | skip] become [x | y − skip]: residuals fit Y − X."""
    total = len(stats.mean)
    size = (total - width) // 2
    matrix = np.zeros((width + size, total))
    matrix[:width, :width] = np.eye(width)
    matrix[width:, width : width + size] = np.eye(size)
    matrix[width:, width + size :] = -np.eye(size)
    sums = {
        "sum": matrix @ stats.sums["sum"],
        "product": matrix @ stats.sums["product"] @ matrix.T,
    }
    return Stats(stats.count, sums)


def _ending(
    site: Site, fragment: Fragment, chain: Chain | None
) -> tuple[bool, bool, bool]:
    """(adds its input, ends in the site's activation, can be fitted)."""
    if chain is None or len(chain.last.nodes) > 1 or site.group != 1:
        return False, False, False
    node = chain.last.nodes[0]
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False, False, False
    tail = list(chain.tail)
    residual = False
    if tail and tail[0].op_type == "Add":
        ends = (chain.last.output, fragment.input)
        residual = all(any(v is end for v in tail[0].inputs) for end in ends) or all(
            v is chain.last.output or v is site.input for v in tail[0].inputs
        )
        if not residual:
            return False, False, False
        tail = tail[1:]
    ops = [n.op_type for n in tail]
    if ops == [n.op_type for n in site.activation]:
        return residual, True, True
    if not ops:
        return residual, False, True
    # a leaky end maps what ReLU lets through to itself: match behind the activation
    clamped = clamp(site)
    positive = clamped is not None and clamped.low >= 0
    return residual, False, ops == ["LeakyRelu"] and positive and not residual
