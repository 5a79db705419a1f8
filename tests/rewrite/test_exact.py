"""At full rank every linear block is the convolution that it replaces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from squeeze.rewrite.convert import convert
from squeeze.rewrite.factorize import factorize
from squeeze.rewrite.plan import Result
from squeeze.rewrite.run import Options
from tests.layers import ELEMENTS, conv_model, outputs

QUICK = Options(bench=False, simplify=False)
LIMITS = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 5e-3}
EXAMPLES = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Case:
    """A convolution with a bias and ReLU behind it."""

    cin: int
    size: tuple[int, ...]
    cout: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    def model(self, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
        return conv_model(
            (self.cin, *self.size),
            (self.cout, self.cin, *self.kernel),
            list(self.strides),
            list(self.pads),
            list(self.dilations),
            dtype,
        )

    def inputs(self, dtype: int) -> np.ndarray:
        rng = np.random.default_rng(prod(self.size) + self.cin)
        return rng.normal(size=(2, self.cin, *self.size)).astype(ELEMENTS[dtype])


def missed(made: ir.Model, proto: onnx.ModelProto, x: np.ndarray) -> float:
    """Relative to what the convolution gives: ReLU may leave next to nothing of it."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    bare.graph.output[0].name = "y"
    whole = np.linalg.norm(outputs(bare, x=x).astype(np.float64))
    left = outputs(made, x=x).astype(np.float64) - outputs(proto, x=x)
    return float(np.linalg.norm(left) / whole)


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """1-D and 2-D: any stride, uneven pads, dilation, odd sizes."""
    axes = draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilations = each(1, 4), each(1, 2)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return Case(
        cin=draw(st.integers(1, 5)),
        size=tuple(s + draw(st.integers(0, 6)) for s in spans),
        cout=draw(st.integers(1, 7)),
        kernel=kernel,
        strides=each(1, 3),
        pads=tuple(draw(st.integers(0, spans[i % axes] - 1)) for i in range(2 * axes)),
        dilations=dilations,
    )


def factorized(model: ir.Model, method: str) -> Result:
    how: Any = dict(rank=10**6, method=method, allow_costlier=True)
    return factorize(model, options=QUICK, **how)


def converted(model: ir.Model, to: str, **chosen: object) -> Result:
    how: Any = dict(keep_first=False, allow_costlier=True, settings=chosen)
    return convert(model, to, options=QUICK, **how)


# what full rank means for each method, and for which convolutions it has one
METHODS: dict[str, Any] = {
    "pca": lambda m, c: factorized(m, "pca"),
    "spatial": lambda m, c: factorized(m, "spatial"),
    "tucker": lambda m, c: factorized(m, "tucker"),
    "separable": lambda m, c: factorized(m, "separable"),
    "depthwise-separable": lambda m, c: converted(
        m, "depthwise-separable", multiplier=min(c.cout, prod(c.kernel))
    ),
    "xception, pointwise first": lambda m, c: converted(m, "xception", segments=1),
    "xception, depthwise first": lambda m, c: converted(
        m, "xception", order="depthwise-first", segments=1
    ),
    "bottleneck": lambda m, c: converted(m, "bottleneck", reduction=1),
}
FITTING = {  # blocks whose inner width follows from the layer's
    "xception, pointwise first": lambda c: replace(c, cout=max(c.cin, c.cout)),
    "xception, depthwise first": lambda c: replace(c, cin=max(c.cin, c.cout)),
    "bottleneck": lambda c: replace(c, cin=max(c.cin, c.cout)),
}


def splits(method: str, case: Case) -> bool:
    """Whether the method applies to the kernel: it needs axes to split, or taps."""
    if method == "spatial":
        return len(case.kernel) == 2 and min(case.kernel) > 1
    return method == "pca" or prod(case.kernel) > 1


@pytest.mark.parametrize("method", METHODS)
@EXAMPLES
@given(case=convolutions())
def test_full_rank_is_exact(method: str, case: Case) -> None:
    """Float32 to 1e-5 and float16 to 5e-3, at any stride, pad, dilation and size."""
    case = FITTING.get(method, lambda c: c)(case)
    for dtype, limit in LIMITS.items():
        proto = case.model(dtype)
        x = case.inputs(dtype)
        result = METHODS[method](ir.from_proto(proto), case)
        assert result.applied == splits(method, case), result.changes
        assert missed(result.model, proto, x) < limit


@EXAMPLES
@given(case=convolutions())
def test_spatial_separable_finds_a_separable_kernel(case: Case) -> None:
    """A kernel of the block's own rank comes back exactly."""
    if len(case.kernel) < 2 or min(case.kernel) < 2:
        return
    rng = np.random.default_rng(case.cin)
    rank = max(1, case.kernel[1] * case.cin * case.cout // (case.cin + case.cout))
    first = rng.normal(size=(rank, case.cin, case.kernel[0]))
    last = rng.normal(size=(rank, case.cout, case.kernel[1]))
    kernel = np.einsum("rci,roj->ocij", first, last) / rank
    for dtype, limit in LIMITS.items():
        proto = case.model(dtype)
        weight = next(w for w in proto.graph.initializer if w.name == "w")
        array = kernel.astype(ELEMENTS[dtype])
        weight.CopyFrom(onnx.numpy_helper.from_array(array, "w"))
        x = case.inputs(dtype)
        result = converted(ir.from_proto(proto), "spatial-separable", share=1)
        assert result.applied == 1
        # float16 rounds the kernel itself off its rank
        slack = 1 if dtype == TensorProto.FLOAT else 2
        assert missed(result.model, proto, x) < limit * slack
