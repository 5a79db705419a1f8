"""Peak memory as onnxruntime plans it, against its own arena."""

from __future__ import annotations

from pathlib import Path

import pytest

from squeeze.measure import cases
from tests.benchmarks.peak_memory import arena_peak
from tests.builders import SAMPLES, Net


def _branches(path: Path) -> Path:
    """Two branches of different length and a residual: order and reuse matter."""
    net = Net([1, 8, 32, 32])
    first = net.conv(8, 16, pads=[1] * 4)
    left = net.node("Relu", first)
    left = net.conv(16, 16, source=left, pads=[1] * 4)
    left = net.node("Sigmoid", left)
    right = net.conv(16, 16, (1, 1), source=first)
    right = net.node("HardSwish", right)
    net.node("Mul", left, right)
    both = net.value
    net.node("Add", both, first)
    net.node("Concat", net.value, both, axis=1)
    net.node("GlobalAveragePool", net.value)
    return net.save(path)


@pytest.mark.parametrize("name", ["cifar10_cnn.onnx", "digits_autoencoder.onnx"])
def test_peak_is_the_arenas_for_the_samples(name: str) -> None:
    """Predicted bytes are within one alignment step per buffer of the arena's."""
    _same(SAMPLES / name)


def test_peak_is_the_arenas_where_branches_meet(tmp_path: Path) -> None:
    """Order, in-place kernels, functions and buffers taken over are as predicted."""
    _same(_branches(tmp_path / "m.onnx"))


def _same(path: Path) -> None:
    case = cases.load(path)
    (candidate,) = cases.candidates([case])
    arena = arena_peak(path, candidate.feeds)
    assert case.costs.runtime_peak.bytes == pytest.approx(arena, abs=2048)


def test_nodes_that_work_in_place_are_named() -> None:
    """Relu after a convolution overwrites it; the peak falls."""
    case = cases.load(SAMPLES / "cifar10_cnn.onnx")
    assert case.costs.runtime_peak.in_place == ("relu1", "relu2", "relu3")
    assert case.costs.runtime_peak.bytes < case.costs.totals.peak_activation_bytes


def test_live_bytes_per_layer_reach_the_peak() -> None:
    """The layer of the peak has the peak's bytes, and no layer has more."""
    costs = cases.load(SAMPLES / "cifar10_cnn.onnx").costs
    live = {layer.name: layer.live_bytes for layer in costs.layers}
    assert max(live.values()) == costs.totals.peak_activation_bytes == 524_288
    assert live[costs.peak_layer] == 524_288
