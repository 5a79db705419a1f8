"""The resolution multiplier: a smaller input (MobileNets §3.4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import shapes as shaping
from squeeze.errors import SqueezeError, UsageError
from squeeze.model import add_initializer, node_name, opset
from squeeze.rewrite.channels.prepare import prepare
from squeeze.rewrite.channels.regrid import blocks
from squeeze.rewrite.channels.remove import forget_shapes
from squeeze.rewrite.plan import Change, Outcome, Result
from squeeze.rewrite.run import Options, run
from squeeze.shapes import Shapes

Size = tuple[int, int]
LOOKED_THROUGH = frozenset(
    "Identity Cast Sub Add Mul Div Clip Relu BatchNormalization Pad Transpose".split()
)


@dataclass(frozen=True)
class Resolution:
    """A new input size: by `multiplier`, to the nearest pixel, or `size` (H, W).

    `adapt` "pool" puts an adaptive average pooling before a Flatten that a fully
    connected layer reads; "refuse" names the layer. `resize_input` keeps the input as
    it is and puts a Resize in front.
    """

    multiplier: Fraction | None = None
    size: Size | None = None
    adapt: Literal["refuse", "pool"] = "refuse"
    resize_input: bool = False

    def of(self, height: int, width: int) -> Size:
        if self.size is not None:
            return self.size
        assert self.multiplier is not None
        half = Fraction(1, 2)
        new = [max(1, floor(self.multiplier * n + half)) for n in (height, width)]
        return new[0], new[1]


def resolution(
    model: ir.Model | str | os.PathLike[str],
    plan: Resolution,
    options: Options | None = None,
) -> Result:
    """Give a model a smaller input.

    Raises UsageError for a bad size, SqueezeError where a layer holds the old one.
    """
    _check(plan)
    if not isinstance(model, ir.Model):
        model = models.load(Path(model))
    return run(model, lambda m, s: _Change(plan, m, s).apply(), options or Options())


def _check(plan: Resolution) -> None:
    if (plan.multiplier is None) == (plan.size is None):
        raise UsageError("pass --multiplier or --size, one of them")
    if plan.multiplier is not None and not 0 < plan.multiplier <= 1:
        value = float(plan.multiplier)
        raise UsageError(f"--multiplier {value:g}: must be above 0 and at most 1")
    if plan.size is not None and min(plan.size) < 1:
        raise UsageError(f"--size {plan.size[0]}x{plan.size[1]}: must be positive")


@dataclass
class _Change:
    """One change of resolution, on its working copy."""

    plan: Resolution
    model: ir.Model
    shapes: Shapes
    changes: list[Change] = field(default_factory=list)

    def apply(self) -> Outcome:
        image, axes = self._image()
        old = self.shapes.need(image, next(iter(self.model.graph)))
        height, width = (old[a] for a in axes)
        new = self.plan.of(height, width)
        # sizes that follow from the input's are left to follow it
        prepared = prepare(self.model, self.shapes)
        self.shapes = prepared.shapes
        sized = list(old)
        for axis, n in zip(axes, new, strict=True):
            sized[axis] = n
        self._globalise_pools()
        if self.plan.resize_input:
            source = self._resize(image, sized)
        else:
            source = image
            self._set_input(image, axes, new)
        details = {"size": [[height, width], list(new)]}
        name = image.name or ""
        self.changes.insert(
            0, Change(name, "resolution", new != (height, width), details=details)
        )
        if new != (height, width):
            self._adapt(source, tuple(sized))
        return Outcome(self.model, self.changes)

    # -- the input -----------------------------------------------------------------

    def _image(self) -> tuple[ir.Value, tuple[int, int]]:
        """The input that convolutions read as an image, and its height and width."""
        for value in self.model.graph.inputs:
            found = _spatial_axes(value, self.shapes)
            if found is not None:
                return value, found
        names = ", ".join(v.name or "" for v in self.model.graph.inputs)
        raise SqueezeError(
            f"no input is an image that a 2-D convolution reads (inputs: {names}); "
            "resolution has nothing to change"
        )

    def _set_input(self, image: ir.Value, axes: Sequence[int], new: Size) -> None:
        assert image.shape is not None
        dims = list(image.shape)
        for axis, n in zip(axes, new, strict=True):
            dims[axis] = n
        image.shape = ir.Shape(dims)

    def _resize(self, image: ir.Value, sized: Sequence[int]) -> ir.Value:
        if opset(self.model) < 11:
            raise SqueezeError(
                "--resize-input needs opset 11 or later; convert the model with "
                "onnx.version_converter, or leave the option out"
            )
        graph = self.model.graph
        old = self.shapes.inputs[image.name or ""]
        scales = np.array([_factor(*pair) for pair in zip(old, sized, strict=True)])
        factor = add_initializer(graph, ir.Tensor(scales, name="resize_factors"))
        node = ir.node(
            "Resize", [image, None, factor], {"mode": "linear"}, name="resize"
        )
        out = node.outputs[0]
        out.name, out.type = f"{image.name}_resized", image.type
        image.replace_all_uses_with(out)
        node.replace_input_with(0, image)
        first = next(iter(graph))
        graph.insert_before(first, node)
        kept = f"in front, so that {image.name!r} stays {_text(old)}"
        self.changes.append(Change("resize", "resize input", True, kept))
        return out

    # -- what holds the old size ---------------------------------------------------

    def _globalise_pools(self) -> None:
        """A pool over the whole map is a global one, whatever the map's size."""
        for node in self.model.graph:
            if node.op_type not in ("AveragePool", "MaxPool") or node.domain:
                continue
            shape = self.shapes.of(node.inputs[0])
            kernel = node.attributes.get_ints("kernel_shape", ()) or ()
            pads = node.attributes.get_ints("pads", ()) or ()
            alone = len(node.outputs) == 1 and not any(pads)
            if shape is not None and tuple(shape[2:]) == tuple(kernel) and alone:
                node.op_type = f"Global{node.op_type}"
                node.attributes.clear()

    def _adapt(self, source: ir.Value, sized: tuple[int, ...]) -> None:
        """Walk the graph with the new shapes and mend what names the old ones."""
        for _ in range(len(self.model.graph)):
            new = self._infer(source, sized)
            if not self._mend_one(new):
                break
        after = self._infer(source, sized)
        for node in self.model.graph:
            for value in node.outputs:
                if value.is_graph_output():
                    self._check_output(value, after)

    def _infer(self, source: ir.Value, sized: tuple[int, ...]) -> Shapes:
        forget_shapes(self.model.graph)
        inputs = dict(self.shapes.inputs)
        if source.is_graph_input():
            inputs[source.name or ""] = sized
        try:
            return shaping.infer(self.model, inputs)
        except SqueezeError as error:
            raise SqueezeError(
                f"the model holds its input size where it can't be changed: {error}"
            ) from error

    def _check_output(self, value: ir.Value, after: Shapes) -> None:
        """Outputs may shrink with the image; their declared shape must say so."""
        shape = after.of(value)
        if (
            shape is not None
            and value.shape is not None
            and len(shape) == len(value.shape)
        ):
            dims = [
                n if isinstance(d, int) else d
                for d, n in zip(value.shape, shape, strict=True)
            ]
            value.shape = ir.Shape(dims)

    def _mend_one(self, new: Shapes) -> bool:
        """Mend the first node whose constants no longer fit; False if all do."""
        for node in self.model.graph:
            before = (
                self.shapes.of(node.inputs[0])
                if node.inputs and node.inputs[0]
                else None
            )
            now = new.of(node.inputs[0]) if before is not None else None
            if before is None or now is None or before == now:
                continue
            if node.op_type == "Reshape" and node.inputs[1] is not None:
                if self._mend_reshape(node, before, now):
                    return True
            elif node.op_type == "Flatten" and self._flattened(node, before, now):
                return True
            else:
                self._refuse(node, new)
        return False

    def _mend_reshape(
        self, node: ir.Node, before: tuple[int, ...], now: tuple[int, ...]
    ) -> bool:
        target = node.inputs[1].const_value if node.inputs[1] is not None else None
        out = self.shapes.of(node.outputs[0])
        if out is None or target is None or len(before) != len(now):
            return False
        wanted = [int(n) for n in target.numpy()]
        given = list(wanted)
        for source, goal in blocks(before, out):
            if all(before[i] == now[i] for i in source):
                continue
            channels = [i for i in source if before[i] == now[i] and before[i] > 1]
            long = [j for j in goal if out[j] > 1]
            if channels and len(long) == 1:  # space and channels become one axis
                if self._read_by_layer(node):
                    self._pool(node, before, now)
                    return True
            elif len(source) == len(goal):
                for i, j in zip(source, goal, strict=True):
                    given[j] = now[i] if wanted[j] > 0 else wanted[j]
                continue
            if len(long) != 1:
                raise self._cannot(node, before, now)
            if wanted[long[0]] > 0:
                given[long[0]] = int(np.prod([now[i] for i in source]))
        if given == wanted:
            return False
        name = f"{node_name(node)}_target"
        while name in self.model.graph.initializers:
            name += "_"
        tensor = ir.Tensor(np.array(given, np.int64), name=name)
        node.replace_input_with(1, add_initializer(self.model.graph, tensor))
        self.changes.append(
            Change(node_name(node), "reshape", True, details={"shape": given})
        )
        return True

    def _flattened(
        self, node: ir.Node, before: tuple[int, ...], now: tuple[int, ...]
    ) -> bool:
        if not self._read_by_layer(node):
            return False
        self._pool(node, before, now)
        return True

    def _read_by_layer(self, node: ir.Node) -> bool:
        """Whether a flattened map ends in a layer with as many weights as it had."""
        value = node.outputs[0]
        while True:
            users = [user for user, _ in value.uses()]
            if any(u.op_type in ("Gemm", "MatMul") for u in users):
                return True
            if len(users) != 1 or users[0].op_type not in (
                "Relu",
                "Dropout",
                "Identity",
                "Mul",
                "Add",
                "Cast",
                "Clip",
            ):
                return False
            value = users[0].outputs[0]

    def _cannot(
        self, node: ir.Node, before: tuple[int, ...], now: tuple[int, ...]
    ) -> SqueezeError:
        return SqueezeError(
            f"{node.op_type} {node_name(node)!r} splits the map {list(before)} by a "
            f"fixed grid; {list(now)} doesn't fit it: choose a size that is a multiple"
        )

    def _refuse(self, node: ir.Node, new: Shapes) -> None:
        """Elementwise constants of the old size (position embeddings) can't follow."""
        if node.op_type not in ("Add", "Mul", "Sub", "Div"):
            return
        out = new.of(node.inputs[0])
        for value in node.inputs:
            if value is None or value.const_value is None or out is None:
                continue
            shape = tuple(value.const_value.shape.numpy())
            pairs = zip(shape[::-1], out[::-1], strict=False)
            if any(a != b and 1 not in (a, b) for a, b in pairs):
                raise SqueezeError(
                    f"{node.op_type} {node_name(node)!r} adds a constant of shape "
                    f"{list(shape)}, made for the old size; it doesn't fit {list(out)}"
                )

    # -- pooling to the old grid -----------------------------------------------------

    def _pool(
        self, node: ir.Node, before: tuple[int, ...], now: tuple[int, ...]
    ) -> None:
        """Adaptive average pooling in front of `node`, back to the grid it had."""
        if self.plan.adapt != "pool":
            raise SqueezeError(
                f"{node.op_type} {node_name(node)!r} feeds a fully connected layer the "
                f"map {_text(before[2:])}; at this size it is {_text(now[2:])}: pass "
                "--adapt pool to pool it to the old grid"
            )
        value = node.inputs[0]
        assert value is not None
        made = _adaptive(self.model.graph, node, value, before, now)
        node.replace_input_with(0, made)
        grids = {"grid": [list(now[2:]), list(before[2:])]}
        self.changes.append(Change(node_name(node), "pool", True, details=grids))


def _factor(was: int, new: int) -> np.float32:
    """new / was, never below it: Resize rounds its sizes down."""
    factor = np.float32(new / was)
    return factor if float(factor) * was >= new else np.nextafter(factor, np.float32(2))


def _text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _adaptive(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value,
    before: tuple[int, ...],
    now: tuple[int, ...],
) -> ir.Value:
    """P_h · X · P_wᵀ: average pooling to any grid, larger ones too, in two MatMuls."""
    stem = node_name(node)
    matrices = []
    for axis in (2, 3):
        matrix = pooling_matrix(now[axis], before[axis])
        matrix = matrix.T if axis == 3 else matrix
        name = f"{stem}_pool{axis}"
        while name in graph.initializers:
            name += "_"
        matrices.append(add_initializer(graph, ir.Tensor(matrix, name=name)))
    rows = ir.node("MatMul", [matrices[0], value], name=f"{stem}_pool_height")
    both = ir.node("MatMul", [rows.outputs[0], matrices[1]], name=f"{stem}_pool_width")
    for one in (rows, both):
        one.outputs[0].name = f"{one.name}_out"
        graph.insert_before(node, one)
    return both.outputs[0]


def pooling_matrix(size: int, grid: int) -> np.ndarray:
    """(grid, size) weights of adaptive average pooling: bins ⌊i·n/g⌋ … ⌈(i+1)·n/g⌉."""
    matrix = np.zeros((grid, size), np.float32)
    for i in range(grid):
        start, end = floor(i * size / grid), ceil((i + 1) * size / grid)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _spatial_axes(value: ir.Value, shapes: Shapes) -> tuple[int, int] | None:
    """Which axes of an input a convolution slides over, through simple nodes."""
    shape = shapes.of(value)
    if shape is None or len(shape) != 4:
        return None
    order = [0, 1, 2, 3]
    waiting = [(value, order)]
    seen: set[ir.Value] = set()
    while waiting:
        current, order = waiting.pop()
        for user, index in current.uses():
            if user.op_type == "Conv" and index == 0:
                return order[2], order[3]
            out = user.outputs[0]
            same = len(shapes.of(out) or ()) == 4
            if user.op_type in LOOKED_THROUGH and same and out not in seen:
                seen.add(out)
                perm = user.attributes.get_ints("perm", None)
                moved = [order[i] for i in perm] if perm else order
                waiting.append((out, moved))
    return None
