"""Reading a built block: which structure it is, and where its weights go.

A chain of convolutions with nothing between them is linear and has a closed form by
its signature. Anything else has a last convolution that
is linear in the block's real features (G).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.stats import Window
from squeeze.errors import SqueezeError
from squeeze.rewrite.fit import forms
from squeeze.rewrite.fit.forms import Form

Array = np.ndarray


@dataclass(frozen=True)
class Stage:
    """One convolution, or several side by side whose outputs are concatenated."""

    nodes: tuple[ir.Node, ...]
    output: ir.Value

    @property
    def input(self) -> ir.Value | None:
        return self.nodes[0].inputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs of one node, inputs per group, *kernel)."""
        weight = self.nodes[0].inputs[1]
        assert weight is not None and weight.const_value is not None
        return tuple(int(n) for n in weight.const_value.shape.numpy())

    @property
    def group(self) -> int:
        return self.nodes[0].attributes.get_int("group", 1) or 1

    @property
    def outputs(self) -> int:
        return self.shape[0] * len(self.nodes)

    @property
    def per_group(self) -> int:
        """Outputs per group, those of parallel convolutions together."""
        return self.outputs // self.group

    @property
    def window(self) -> Window:
        return Window.of(self.nodes[0], self.shape[2:])

    @property
    def pointwise(self) -> bool:
        return self.group == 1 and self.mixes

    @property
    def mixes(self) -> bool:
        """Whether it is 1×1, of groups of channels or of all."""
        window = self.window
        return set(window.kernel) == set(window.strides) == {1}


@dataclass(frozen=True)
class Chain:
    """The convolutions of a block, in order; `between` is what else lies among them."""

    stages: tuple[Stage, ...]
    between: tuple[ir.Node, ...]
    tail: tuple[ir.Node, ...]

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def straight(self) -> bool:
        """Whether the convolutions follow one another with nothing between."""
        links = zip(self.stages, self.stages[1:], strict=False)
        return not self.between and all(a.output is b.input for a, b in links)


def chain(nodes: Sequence[ir.Node]) -> Chain | None:
    """The block's convolutions; None where it has none."""
    stages: list[Stage] = []
    joined: set[ir.Node] = set()
    for node in nodes:
        if node.op_type != "Conv" or node in joined:
            continue
        stage = _stage(node)
        joined.update(stage.nodes)
        if stage.output is not stage.nodes[-1].outputs[0]:
            joined.update(u for u in [stage.output.producer()] if u is not None)
        stages.append(stage)
    if not stages:
        return None
    end = max(list(nodes).index(n) for n in stages[-1].nodes)
    others = [(i, n) for i, n in enumerate(nodes) if n not in joined]
    between = tuple(n for i, n in others if i < end)
    return Chain(tuple(stages), between, tuple(n for i, n in others if i > end))


def _stage(node: ir.Node) -> Stage:
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Concat":
        parts = [v.producer() if v is not None else None for v in users[0].inputs]
        same = [p for p in parts if p is not None and p.inputs[0] is node.inputs[0]]
        if len(same) == len(parts) and all(p.op_type == "Conv" for p in same):
            return Stage(tuple(same), users[0].outputs[0])
    return Stage((node,), node.outputs[0])


# -- linear chains ------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """A linear chain with a form: its window on the block's input, and its start."""

    chain: Chain
    window: Window
    kind: str

    def start(self, weight: Array) -> Form:
        """The closed form for a kernel (O, C, *k) in float64."""
        first, second = self.chain.stages[0], self.chain.stages[1]
        if self.kind == "grouped-pointwise":
            return forms.grouped_pointwise(weight, first.group, first.per_group)
        if self.kind == "pointwise-grouped":
            inner = first.outputs // second.group
            return forms.pointwise_grouped(weight, second.group, inner)
        if self.kind == "tucker":
            return forms.tucker(weight, first.outputs, second.outputs)
        return forms.spatial(weight, first.outputs, self.kind == "vertical-first")

    def arrays(self, form: Form, bias: Array) -> dict[ir.Value, Array]:
        """What each weight of the block becomes."""
        stages = self.chain.stages
        parts = _weights(self.kind, form, stages)
        found: dict[ir.Value, Array] = {}
        for stage, array in zip(stages, parts, strict=True):
            found.update(_assigned(stage, array))
        last = self.chain.last.nodes[0]
        if len(last.inputs) > 2 and last.inputs[2] is not None:
            found[last.inputs[2]] = bias
        return found


def _weights(kind: str, form: Form, stages: Sequence[Stage]) -> list[Array]:
    """Each stage's whole weight (outputs, inputs per group, *kernel)."""
    shapes = [(s.outputs, *s.shape[1:]) for s in stages]
    factors = list(form.factors)
    side_by_side = len(stages[0].nodes) > 1
    if kind == "grouped-pointwise" and side_by_side:  # channels go copy by copy
        factors[0] = factors[0].transpose(1, 0, 2)
        factors[1] = factors[1].transpose(0, 2, 1)
    return [f.reshape(shape) for f, shape in zip(factors, shapes, strict=True)]


def _assigned(stage: Stage, array: Array) -> dict[ir.Value, Array]:
    parts = np.split(array, len(stage.nodes))
    found = {}
    for node, part in zip(stage.nodes, parts, strict=True):
        weight = node.inputs[1]
        assert weight is not None
        found[weight] = part
    return found


def structure(chain: Chain, kernel: Sequence[int]) -> Structure | None:
    """The form of a linear chain that computes a kernel of this size, if it has one."""
    if not chain.straight or len(chain.last.nodes) > 1:
        return None
    window = _combined([s.window for s in chain.stages])
    if window is None or window.kernel != tuple(kernel):
        return None
    kind = _kind(chain.stages)
    return Structure(chain, window, kind) if kind else None


def _kind(stages: Sequence[Stage]) -> str:
    plain = [s.group == 1 for s in stages]
    if len(stages) == 2:
        if stages[1].pointwise:
            return "grouped-pointwise"
        if stages[0].pointwise and len(stages[1].nodes) == 1:
            return "pointwise-grouped"
        if all(plain) and len(stages[0].window.kernel) == 2:
            return "vertical-first" if stages[0].window.kernel[1] == 1 else "wide-first"
    if len(stages) == 3 and all(plain):
        return "tucker" if stages[0].pointwise and stages[2].pointwise else ""
    return ""


def _combined(windows: Sequence[Window]) -> Window | None:
    """One window for several in a row, where no axis is windowed twice."""
    axes = len(windows[0].kernel)
    kernel, strides, dilations = [1] * axes, [1] * axes, [1] * axes
    pads = [0] * (2 * axes)
    for axis in range(axes):
        busy = [
            w
            for w in windows
            if w.kernel[axis] > 1
            or w.strides[axis] > 1
            or w.pads[axis]
            or w.pads[axis + axes]
        ]
        if len(busy) > 1:
            return None
        for one in busy:
            kernel[axis], strides[axis] = one.kernel[axis], one.strides[axis]
            dilations[axis] = one.dilations[axis]
            pads[axis], pads[axis + axes] = one.pads[axis], one.pads[axis + axes]
    return Window(tuple(kernel), tuple(strides), tuple(pads), tuple(dilations))


# -- blocks with something between their convolutions -------------------------------


@dataclass(frozen=True)
class _Paths:
    """What each channel inside of a block stands for, on its way to the outputs.

    `kernel` (O, C, taps) is what is left to do; channel i carries its input channel
    `source[i]`, as copy number `copies[i]` of it.
    """

    kernel: Array
    source: Array
    copies: Array

    @classmethod
    def of(cls, kernel: Array) -> _Paths:
        channels = kernel.shape[1]
        return cls(kernel, np.arange(channels), np.zeros(channels, int))

    @cached_property
    def svd(self) -> tuple[Array, Array, Array]:
        """Of each channel's filters: (C, O, R), (C, R), (C, R, taps)."""
        return np.linalg.svd(self.kernel.transpose(1, 0, 2), full_matrices=False)

    def spread(self, stage: Stage) -> _Paths:
        """Behind a depthwise stage with one or more outputs per channel."""
        grown = stage.outputs // stage.group
        extra = np.arange(grown)
        if len(stage.nodes) > 1:  # copy by copy
            extra = np.repeat(extra, stage.group)
            source, copies = np.tile(self.source, grown), np.tile(self.copies, grown)
        else:
            extra = np.tile(extra, stage.group)
            source = np.repeat(self.source, grown)
            copies = np.repeat(self.copies, grown)
        return _Paths(self.kernel, source, copies * grown + extra)

    def columns(self) -> Array:
        """(O, channels): what puts them together again; copies share their part."""
        u, s, _ = self.svd
        index = np.minimum(self.copies, s.shape[1] - 1)
        flat = self.source * s.shape[1] + index
        share = np.bincount(flat)[flat]
        scale = s[self.source, index] / share
        return np.asarray((u[self.source, :, index] * scale[:, None]).T)


def start_layers(chain: Chain, weight: Array, bias: Array) -> dict[ir.Value, Array]:
    """Start weights of a block that has no closed form.

    1×1 in front repeats the identity, or keeps the leading subspace of each group's
    inputs where it narrows; depthwise filters are those of A, split into k×1 and 1×k
    by their best rank one where they stand apart; the last 1×1 puts them together,
    each group what it has. What has no such role keeps the weights it was built with.
    """
    taps = weight.shape[2:]
    paths = _Paths.of(weight.reshape(*weight.shape[:2], -1))
    shuffled = any(n.op_type == "Transpose" for n in chain.between)
    found: dict[ir.Value, Array] = {}
    for stage in chain.stages[:-1]:
        channels = len(paths.source)
        if stage.mixes and stage.shape[1] * stage.group == weight.shape[1]:
            mix, paths = _mixed(paths.kernel, stage, shuffled)
            found.update(_assigned(stage, mix.reshape(-1, *stage.shape[1:])))
        elif stage.shape[1] == 1 and stage.group == channels:
            paths = paths.spread(stage)
            filters = _filters(paths, taps, stage)
            if filters is not None:
                found.update(_assigned(stage, filters))
    last = chain.last
    if last.mixes and last.shape[1] * last.group == len(paths.source):
        own = _blocks(paths.columns(), last.group)
        found.update(_assigned(last, own.reshape(last.outputs, *last.shape[1:])))
    if last.outputs == len(bias):
        parts = np.split(bias, len(last.nodes))
        for node, part in zip(last.nodes, parts, strict=True):
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                found[node.inputs[2]] = part
    return found


def _mixed(kernel: Array, stage: Stage, shuffled: bool) -> tuple[Array, _Paths]:
    """(outputs, inputs per group) of a 1×1, and what its outputs stand for."""
    cin = kernel.shape[1]
    if stage.group == 1 and stage.outputs >= cin:
        source = np.arange(stage.outputs) % cin
        return np.eye(cin)[source], _Paths(
            kernel, source, np.arange(stage.outputs) // cin
        )
    parts = np.split(kernel, stage.group, axis=1)
    mixes = [_narrow(part, stage.per_group) for part in parts]
    left = [
        np.einsum("ock,mc->omk", part, mix)
        for part, mix in zip(parts, mixes, strict=True)
    ]
    made = np.concatenate(left, axis=1)
    if shuffled and stage.group > 1:
        order = np.arange(stage.outputs).reshape(stage.group, -1).T.reshape(-1)
        made = made[:, order]
    return np.concatenate(mixes), _Paths.of(made)


def _narrow(kernel: Array, outputs: int) -> Array:
    """(outputs, C): the leading subspace of the input channels of (O, C, taps)."""
    unfolded = kernel.transpose(1, 0, 2).reshape(kernel.shape[1], -1)
    _, vectors = np.linalg.eigh(unfolded @ unfolded.T)
    leading = vectors[:, ::-1][:, :outputs].T
    return np.pad(leading, ((0, outputs - len(leading)), (0, 0)))


def _blocks(matrix: Array, groups: int) -> Array:
    """(O, F / groups): of each group's outputs, what reads its own columns."""
    out, width = matrix.shape
    apart = matrix.reshape(groups, out // groups, groups, width // groups)
    return np.concatenate([apart[i, :, i] for i in range(groups)])


def _filters(paths: _Paths, kernel: Sequence[int], stage: Stage) -> Array | None:
    """(channels, 1, *window): the singular filters, or their factor along an axis."""
    _, _, v = paths.svd
    picked = v[paths.source, np.minimum(paths.copies, v.shape[1] - 1)]
    picked = picked.reshape(len(paths.source), *kernel)
    window = stage.window.kernel
    if window == tuple(kernel):
        return np.asarray(picked[:, None])
    if len(kernel) != 2 or window not in ((kernel[0], 1), (1, kernel[1])):
        return None
    u, s, w = np.linalg.svd(picked, full_matrices=False)
    column, row = u[:, :, 0] * np.sqrt(s[:, :1]), w[:, 0] * np.sqrt(s[:, :1])
    part = column[:, None, :, None] if window[1] == 1 else row[:, None, None, :]
    return np.asarray(part)


def write(arrays: Mapping[ir.Value, Array]) -> None:
    """Give weights their values, in the type they have.

    Raises SqueezeError where one has no place in it: infinite weights are no fit.
    """
    for value, array in arrays.items():
        assert value.const_value is not None
        dtype = value.const_value.dtype
        with np.errstate(over="ignore"):
            made = np.ascontiguousarray(array.astype(dtype.numpy()))
        if not np.isfinite(made).all():
            raise SqueezeError(
                f"the weights fitted for {value.name!r} are not finite in "
                f"{dtype.name.lower()}; other data, or leaving that layer out, helps"
            )
        value.const_value = ir.Tensor(made, dtype=dtype, name=value.name)
