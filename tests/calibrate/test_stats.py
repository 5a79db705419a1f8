"""Statistics inside onnxruntime against the same sums in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from squeeze.calibrate.data import Batch, Data, open_data
from squeeze.calibrate.marks import marks, uniform
from squeeze.calibrate.stats import (
    Collector,
    Columns,
    Moments,
    Products,
    Stats,
    Window,
    gather,
    rows_per_sample,
)
from squeeze.errors import SqueezeError
from squeeze.shapes import Shapes, infer
from tests.builders import images
from tests.layers import conv_model, model_of, outputs

ALL = 10**6  # positions: every one there is
KINDS = ("sum", "square", "positive")


def opened(proto: onnx.ModelProto, x: np.ndarray) -> tuple[ir.Model, Shapes, Data]:
    model = ir.from_proto(proto)
    shapes = infer(model)
    return model, shapes, open_data({"x": x}, model, shapes)


def small(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A 3×3 convolution of 3 channels to 8, with ReLU."""
    return conv_model((3, 7, 6), (8, 3, 3, 3), [1, 1], [1] * 4, [1, 1], dtype)


def rows_of(x: np.ndarray, window: Window) -> np.ndarray:
    """im2col by a loop: (N · positions, C · taps)."""
    axes = len(window.kernel)
    pads = [(window.pads[a], window.pads[a + axes]) for a in range(axes)]
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    found = []
    for position in np.ndindex(*window.grid(x.shape[2:])):
        at = tuple(
            slice(
                p * window.strides[a],
                p * window.strides[a]
                + window.dilations[a] * (window.kernel[a] - 1)
                + 1,
                window.dilations[a],
            )
            for a, p in enumerate(position)
        )
        found.append(padded[(slice(None), slice(None), *at)].reshape(len(x), -1))
    return np.stack(found, 1).reshape(-1, found[0].shape[1])


@st.composite
def windows(draw: st.DrawFn) -> Window:
    axes = draw(st.integers(1, 2))

    def each(low: int, high: int, count: int = axes) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(count))

    return Window(each(1, 3), each(1, 3), each(0, 2, 2 * axes), each(1, 2))


@settings(max_examples=30, deadline=None)
@given(window=windows(), channels=st.integers(1, 9))
def test_products_of_a_window(window: Window, channels: int) -> None:
    """Sum and Gram matrix of all im2col rows, at any stride, pad and dilation."""
    size = (7, 6)[: len(window.kernel)]
    x = images(5, channels, *size) + 3  # far from zero
    node = helper.make_node("Identity", ["x"], ["y"], "same")
    proto = model_of([node], {}, {"x": x.shape[1:]}, "y")
    wanted = {"w": Products((Columns("x", window=window),))}
    found = gather(*opened(proto, x), wanted, positions=ALL)["w"]
    rows = rows_of(x.astype(np.float64), window)
    assert found.count == len(rows)
    assert np.allclose(found.sums["sum"], rows.sum(0), rtol=1e-5)
    assert np.allclose(found.sums["product"], rows.T @ rows, rtol=1e-5, atol=1e-3)
    assert np.allclose(found.covariance, np.cov(rows.T, ddof=0), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(window=windows(), biased=st.booleans())
def test_what_a_convolution_gives_follows_from_what_it_reads(
    window: Window, biased: bool
) -> None:
    """Outputs beside inputs: sums, products and rows as onnxruntime computes them."""
    size = (7, 6)[: len(window.kernel)]
    x, weight = images(5, 3, *size), images(4, 3, *window.kernel)
    arrays = {"w": weight, "b": np.arange(4, dtype=np.float32)}
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"] if biased else ["x", "w"],
        ["y"],
        "conv",
        strides=window.strides,
        pads=window.pads,
        dilations=window.dilations,
    )
    proto = model_of([node], arrays, {"x": x.shape[1:]}, "y")
    columns = (Columns("y"), Columns("x", window=window))
    asked = {"both": Products(columns, keep=5)}
    found = gather(*opened(proto, x), asked, positions=ALL)["both"]
    y = np.moveaxis(outputs(proto, x=x), 1, -1).reshape(-1, 4)
    rows = np.concatenate([y, rows_of(x, window)], 1).astype(np.float64)
    assert np.allclose(found.sums["sum"], rows.sum(0), atol=1e-3)
    assert np.allclose(found.sums["product"], rows.T @ rows, rtol=1e-4, atol=1e-2)
    assert found.sample is not None
    kept = found.sample.matrix.astype(np.float64)  # all five samples, in another order
    assert np.allclose(kept.T @ kept, rows.T @ rows, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_moments_of_a_convolution(dtype: int) -> None:
    """Sums over every position; counts are exact."""
    proto = small(dtype)
    x = images(70, 3, 7, 6)
    element = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    z = outputs(proto, x=x.astype(element)).astype(np.float64)
    found = gather(*opened(proto, x), {"z": Moments("z", 1, KINDS)})["z"]
    assert found.count == 70 * 42
    assert np.array_equal(found.positive, (z > 0).sum((0, 2, 3)))
    assert np.allclose(found.sums["sum"], z.sum((0, 2, 3)), rtol=1e-4)
    assert np.allclose(found.sums["square"], np.square(z).sum((0, 2, 3)), rtol=1e-4)


def test_counts_know_the_smallest_numbers() -> None:
    """What is positive counts, however small; zero and negative numbers don't."""
    x = np.zeros((1, 1, 2, 3), np.float32)
    x[0, 0] = [[1e-37, -1e-37, 0], [3e38, np.float32(-0.0), 2]]
    node = helper.make_node("Identity", ["x"], ["y"], "same")
    proto = model_of([node], {}, {"x": (1, 2, 3)}, "y")
    found = gather(*opened(proto, x), {"y": Moments("y", 1, ("positive",))})
    assert found["y"].positive == [3]


@pytest.mark.parametrize(("shape", "axis"), [((5,), 1), ((4, 5), -1), ((4, 5), 1)])
def test_moments_of_vectors_and_sequences(shape: tuple[int, ...], axis: int) -> None:
    """Any rank, channels first or last."""
    x = images(40, *shape)
    node = helper.make_node("Relu", ["x"], ["y"], "relu")
    proto = model_of([node], {}, {"x": shape}, "y")
    found = gather(*opened(proto, x), {"y": Moments("y", axis, KINDS)})["y"]
    y = np.moveaxis(np.maximum(x, 0), axis, -1).reshape(-1, x.shape[axis])
    assert found.count == len(y)
    assert np.array_equal(found.positive, (y > 0).sum(0))
    assert np.allclose(found.sums["square"], np.square(y).sum(0), rtol=1e-5)


def same(one: Stats, other: Stats) -> None:
    assert one.count == other.count
    for kind in one.sums:
        assert np.allclose(one.sums[kind], other.sums[kind], rtol=1e-4, atol=1e-3)
    assert (one.sample is None) == (other.sample is None)
    if one.sample and other.sample:
        assert np.array_equal(one.sample.keys, other.sample.keys)
        assert np.allclose(one.sample.rows, other.sample.rows, atol=1e-5)


def everything() -> dict[str, Any]:
    window = Window((3, 3), (1, 1), (1,) * 4, (1, 1))
    both = (Columns("x", window=window), Columns("y"))
    return {"rows": Products(both, keep=20), "counts": Moments("z")}


@settings(max_examples=20, deadline=None)
@given(value=st.floats(-1e3, 1e3, width=32), bias=st.floats(-3, 3, width=32))
def test_constants_have_no_covariance(value: float, bias: float) -> None:
    """Exactly: what rounding leaves of them would be taken for something to fit to."""
    x = images(64, 2, 6, 5)
    x[:, 1] = value
    weight = np.array([[1.0, 0.5], [0.0, 0.3]], np.float32)[..., None, None]
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")
    constants = {"w": weight, "b": np.full(2, bias, np.float32)}
    proto = model_of([node], constants, {"x": x.shape[1:]}, "y")
    wanted = {"all": Products((Columns("x"), Columns("y")))}
    found = gather(*opened(proto, x), wanted)["all"].covariance
    assert not found[[1, 3]].any()
    assert not found[:, [1, 3]].any()
    assert found[0, 0] == pytest.approx(x[:, 0].var(), rel=0.2)
    assert found[0, 2] != 0 or abs(value) > 100  # lost beside a large constant


def test_order_batches_and_shards_make_no_difference() -> None:
    """Sampled positions follow from the samples; shards add up to the whole."""
    x = images(50, 3, 7, 6)
    model, shapes, data = opened(small(), x)
    collector = Collector(model, shapes, everything())
    whole = collector.over(data)
    shuffled = data.take(np.random.default_rng(1).permutation(50))
    others = [
        collector.over(shuffled),
        collector.over(replace(shuffled, batch_size=7)),
    ]
    for other in others:
        for name in whole:
            same(whole[name], other[name])
    shards = [collector.over(data.take(p)) for p in np.array_split(np.arange(50), 3)]
    for name in whole:
        same(whole[name], shards[2][name] + shards[0][name] + shards[1][name])


def test_many_samples_give_few_rows_each() -> None:
    """As many as their matrix needs of all samples; shards still add up."""
    x = images(2000, 3, 7, 6)
    model, shapes, data = opened(small(), x)
    collector = Collector(model, shapes, everything(), samples=4000)
    whole = collector.over(data)
    assert whole["rows"].count == 2000 * rows_per_sample(3 * 9 + 8, 4000) == 2000 * 3
    assert whole["counts"].count == 2000 * 7 * 6
    shards = [collector.over(data.take(p)) for p in np.split(np.arange(2000), 2)]
    same(whole["rows"], shards[1]["rows"] + shards[0]["rows"])
    full = Collector(model, shapes, everything()).over(data)["rows"]
    assert full.count == 2000 * 10
    spread = np.sqrt(full.variance)
    assert np.allclose(whole["rows"].mean, full.mean, atol=0.1 * spread.max())


def test_rows_per_sample() -> None:
    """Enough for the columns, never more than ten, never none."""
    assert rows_per_sample(1408, 500) == 10
    assert rows_per_sample(1408, 4000) == 6  # 16 × 1408 rows
    assert rows_per_sample(91, 4000) == 3
    assert rows_per_sample(91, 10**6) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_marks_follow_from_a_samples_bytes(dtype: Any) -> None:
    """Alike for alike samples in any batch, unlike where one element differs."""
    x = (images(64, 3, 5, 7) * 50).astype(dtype)  # no multiple of eight bytes
    whole = marks(Batch({"x": x}, None), 0)
    assert len(set(whole.tolist())) == 64
    assert np.array_equal(marks(Batch({"x": x[40:5:-1]}, None), 0), whole[40:5:-1])
    changed = x.copy()
    changed[:, 2, 4, 6] += 1
    assert not set(marks(Batch({"x": changed}, None), 0)) & set(whole)
    assert not set(marks(Batch({"x": x}, None), 1)) & set(whole)
    swapped = marks(Batch({"a": x[:9], "b": x[9:18]}, None), 0)
    assert not set(marks(Batch({"a": x[9:18], "b": x[:9]}, None), 0)) & set(swapped)


def test_uniform_numbers_are_uniform() -> None:
    """Mean and variance of each position's numbers, and no two positions alike."""
    drawn = uniform(marks(Batch({"x": images(4000, 5)}, None), 3), 4)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.allclose(drawn.mean(0), 1 / 2, atol=0.03)
    assert np.allclose(drawn.var(0), 1 / 12, atol=0.01)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.08


def test_two_models_side_by_side() -> None:
    """Columns of a changed copy stand beside the original's, what they share is one."""
    x = images(30, 3, 7, 6)
    model, shapes, data = opened(small(), x)
    changed = model.clone()
    weight = changed.graph.initializers["b"]
    assert weight.const_value is not None
    bias = weight.const_value.numpy() + 1
    weight.const_value = ir.Tensor(bias, name="b")
    pair = Products((Columns("y"), Columns("y", model=1)))
    collector = Collector(model, shapes, {"y": pair}, others=[(changed, shapes)])
    mean = collector.over(data)["y"].mean
    assert np.allclose(mean[8:] - mean[:8], 1, atol=1e-5)
    twin = Collector(model, shapes, {"y": pair}, others=[(model.clone(), shapes)])
    mean = twin.over(data)["y"].mean
    assert np.array_equal(mean[8:], mean[:8])


def test_activations_that_are_not_finite() -> None:
    """The layer is named."""
    nodes = [
        helper.make_node("Exp", ["x"], ["e"], "exp"),
        helper.make_node("Exp", ["e"], ["y"], "again"),
    ]
    proto = model_of(nodes, {}, {"x": (4,)}, "y")
    wanted = {"again": Products((Columns("y", -1),))}
    with pytest.raises(SqueezeError, match="'again' are NaN or Inf"):
        gather(*opened(proto, images(8, 4) + 9), wanted)
