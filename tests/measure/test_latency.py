"""Timing: what is told apart, what is refused, what is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from squeeze import session
from squeeze.errors import SqueezeError, UsageError
from squeeze.measure import cases, latency, layers
from squeeze.measure.latency import Settings
from tests.builders import SAMPLES, Net

QUICK = Settings(seconds=0.5, threads=1, level=0.99)


def _net(path: Path, convolutions: int) -> Path:
    net = Net([1, 16, 24, 24])
    for _ in range(convolutions):
        net.conv(16, 16, pads=[1] * 4)
    return net.save(path)


def test_a_model_with_one_more_convolution_is_slower(tmp_path: Path) -> None:
    """Three convolutions against two: the interval excludes 1."""
    paths = [_net(tmp_path / f"{n}.onnx", n) for n in (2, 3)]
    loaded = [cases.load(path) for path in paths]
    settings = replace(QUICK, clock="processor")  # other jobs' time is not in it
    found = latency.bench(cases.candidates(loaded), settings)
    assert found.ratios[0].verdict == "slower"
    assert found.ratios[0].low > 1


def test_times_are_ordered_and_counted(tmp_path: Path) -> None:
    """Fastest ≤ 5 % ≤ median ≤ 95 %, and --runs asks for at least that many."""
    case = cases.load(_net(tmp_path / "m.onnx", 1))
    settings = Settings(runs=40, seconds=0.5, threads=1)
    seen: list[float] = []
    found = latency.bench(cases.candidates([case]), settings, seen.append)
    timing = found.timings[0]
    assert 0 < timing.min_ms <= timing.p5_ms <= timing.median_ms <= timing.p95_ms
    assert 40 <= timing.runs <= 80
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.93, 1.21, "no difference shown"),
        (0.5, 0.99, "faster"),
        (1.01, 2, "slower"),
    ],
)
def test_verdict_follows_the_interval(low: float, high: float, verdict: str) -> None:
    """Only an interval without 1 supports a claim."""
    assert latency.Ratio(1.0, low, high, 0.95).verdict == verdict


def _mixed_inputs(path: Path) -> Path:
    """Integer indices, a boolean mask and a float: three inputs."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gather", ["x", "index"], ["g"]),
        helper.make_node("Where", ["mask", "g", "g"], ["y"]),
    ]
    inputs = [
        info("x", TensorProto.FLOAT, [4, 3]),
        info("index", TensorProto.INT64, [2]),
        info("mask", TensorProto.BOOL, [2, 3]),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [info("y", TensorProto.FLOAT, [2, 3])]
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_integer_boolean_and_several_inputs_are_made_up(tmp_path: Path) -> None:
    """Such a model is timed like any other."""
    case = cases.load(_mixed_inputs(tmp_path / "m.onnx"))
    found = latency.bench(cases.candidates([case]), QUICK)
    assert found.timings[0].median_ms > 0


def test_a_provider_that_is_not_there_is_named() -> None:
    """The message lists what this onnxruntime has."""
    with pytest.raises(UsageError, match="cpu"):
        session.provider("warp-drive")
    assert session.provider("CPU") == session.provider("cpuexecutionprovider")


def test_a_model_that_fails_at_run_time_is_named(tmp_path: Path) -> None:
    """Indices out of range: the message has the file and the reason, no traceback."""
    case = cases.load(_mixed_inputs(tmp_path / "m.onnx"))
    feeds = {
        "x": np.zeros((4, 3), np.float32),
        "index": np.array([7, 9]),
        "mask": np.ones((2, 3), bool),
    }
    bad = latency.Candidate(case.path, feeds)
    with pytest.raises(SqueezeError, match=r"m\.onnx: fails at run time"):
        latency.bench([bad], QUICK)


@pytest.mark.parametrize("name", ["cifar10_cnn.onnx", "digits_autoencoder.onnx"])
def test_layer_lines_sum_to_the_whole(name: str) -> None:
    """All lines add up to the run; MACs are all mapped, through fusion and renaming."""
    case = cases.load(SAMPLES / name)
    (candidate,) = cases.candidates([case])
    found = layers.timeline(
        candidate, case.model, case.costs, Settings(seconds=0.3, threads=1)
    )
    assert sum(line.time_ms for line in found.lines) == pytest.approx(found.run_ms)
    assert sum(line.share for line in found.lines) == pytest.approx(1)
    assert sum(line.macs for line in found.lines) == case.costs.totals.macs
    named = {line.name for line in found.lines if line.kind == "layer"}
    heavy = {layer.name for layer in case.costs.layers if layer.macs}
    assert heavy <= named


def test_layers_without_names_are_mapped(tmp_path: Path) -> None:
    """A node without a name is known by its output; its time is a layer's."""
    model = onnx.load(SAMPLES / "cifar10_cnn.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "m.onnx")
    case = cases.load(tmp_path / "m.onnx")
    (candidate,) = cases.candidates([case])
    settings = Settings(seconds=0.2, threads=1)
    found = layers.timeline(candidate, case.model, case.costs, settings)
    assert all(line.kind != "runtime" for line in found.lines)
    assert sum(line.macs for line in found.lines) == case.costs.totals.macs
