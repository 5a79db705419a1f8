"""Costs against published and hand-counted figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import squeeze
from squeeze.errors import SqueezeError, UsageError
from tests.builders import SAMPLES, Net, cifar_baseline, standard_mobilenet

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def test_cifar_baseline_matches_the_definitions(tmp_path: Path) -> None:
    """The definitions' check values for EffNet's baseline hold exactly."""
    totals = squeeze.profile(cifar_baseline().save(tmp_path / "m.onnx")).totals
    assert totals.macs == 39_559_168
    assert totals.flops == 79_462_410
    assert totals.params == 411_786
    assert totals.weight_bytes == 4 * 411_786
    assert totals.peak_activation_bytes == 524_288
    assert totals.uncounted_ops == ()


def test_sample_network_costs_what_the_built_one_does() -> None:
    """The trained sample has the baseline's costs."""
    totals = squeeze.profile(SAMPLES / "cifar10_cnn.onnx").totals
    assert (totals.macs, totals.params) == (39_559_168, 411_786)


def test_standard_mobilenet(tmp_path: Path) -> None:
    """MobileNets, Table 4: 4866 M multiply-adds and 29.3 M parameters."""
    totals = squeeze.profile(standard_mobilenet().save(tmp_path / "m.onnx")).totals
    assert totals.macs == 4_867_293_184
    assert totals.params == 29_282_120


# torchvision's figures where the same network is there, in GMACs
PUBLISHED = {
    "resnet50": 4.089,
    "densenet121": 2.834,
    "squeezenet": 0.349,
    "vgg19": 19.632,
}


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda p: p.stem)
def test_light_models_are_counted_in_full(path: Path) -> None:
    """The models inside onnx (opset 9, IR 3, ConstantOfShape weights) are profiled."""
    result = squeeze.profile(path)
    assert result.totals.uncounted_ops == ()
    assert result.totals.params > 1_000_000
    published = PUBLISHED.get(path.stem.removeprefix("light_"))
    if published:
        assert result.totals.macs / 1e9 == pytest.approx(published, rel=0.005)


def _op_model(
    node: onnx.NodeProto, inputs: dict[str, tuple], weights: dict
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(k, TensorProto.FLOAT, v)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


OPS = {
    "strided conv": (
        helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1] * 4),
        {"x": (1, 4, 9, 9)},
        {"w": _zeros(6, 4, 3, 3), "b": _zeros(6)},
        (6 * 25 * 36, 2 * 6 * 25 * 36 + 6 * 25),
    ),
    "grouped conv": (
        helper.make_node("Conv", ["x", "w"], ["y"], group=2),
        {"x": (1, 4, 5, 5)},
        {"w": _zeros(6, 2, 3, 3)},
        (6 * 9 * 18, 2 * 6 * 9 * 18),
    ),
    "transposed conv": (
        helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2]),
        {"x": (1, 4, 5, 5)},
        {"w": _zeros(4, 3, 2, 2), "b": _zeros(3)},
        (100 * 3 * 4, 2 * 100 * 12 + 3 * 100),
    ),
    "gemm, transposed a": (
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=1),
        {"x": (7, 2)},
        {"w": _zeros(7, 5), "b": _zeros(5)},
        (2 * 5 * 7, 2 * 70 + 10),
    ),
    "batched matmul": (
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        {"x": (3, 4, 5)},
        {"w": _zeros(5, 6)},
        (3 * 4 * 6 * 5, 2 * 360),
    ),
    "einsum": (
        helper.make_node("Einsum", ["x", "w"], ["y"], equation="bij,jk->bik"),
        {"x": (2, 3, 4)},
        {"w": _zeros(4, 5)},
        (2 * 3 * 4 * 5, 240),
    ),
    "max pool": (
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
        {"x": (1, 4, 9, 9)},
        {},
        (0, 4 * 16 * 9),
    ),
    "batch norm": (
        helper.make_node("BatchNormalization", ["x", *"abcd"], ["y"]),
        {"x": (1, 4, 3, 3)},
        {k: _zeros(4) for k in "abcd"},
        (0, 2 * 36),
    ),
}


@pytest.mark.parametrize("case", OPS, ids=str)
def test_cost_of_an_op(case: str, tmp_path: Path) -> None:
    """Each row of the table agrees with a count by hand."""
    node, inputs, weights, expected = OPS[case]
    onnx.save(_op_model(node, inputs, weights), tmp_path / "m.onnx")
    totals = squeeze.profile(tmp_path / "m.onnx").totals
    assert (totals.macs, totals.flops) == expected


def test_running_statistics_and_scalars_are_no_parameters(tmp_path: Path) -> None:
    """BatchNormalization counts scale and shift; its mean and variance do not."""
    net = Net([1, 3, 8, 8])
    net.conv(3, 4, bias=False)
    net.batch_norm(4)
    net.node(
        "Clip", net.value_before, net.weight(np.array(0.0)), net.weight(np.array(6.0))
    )
    totals = squeeze.profile(net.save(tmp_path / "m.onnx")).totals
    assert totals.params == 4 * 27 + 2 * 4


def test_tied_weights_count_once(tmp_path: Path) -> None:
    """One initializer read by two layers is one set of parameters."""
    net = Net([1, 8])
    name = net.weight(np.zeros((8, 8)))
    net.node("MatMul", "x", name)
    net.node("MatMul", net.value_before, name)
    totals = squeeze.profile(net.save(tmp_path / "m.onnx")).totals
    assert (totals.params, totals.macs) == (64, 128)


def test_unknown_op_is_listed(tmp_path: Path) -> None:
    """An op without a row is named, never counted as zero in silence."""
    net = Net([1, 4, 8, 8])
    net.conv(4, 4)
    model = net.model()
    node = model.graph.node.add(op_type="Magic", domain="my.ops", name="magic")
    node.input.append(model.graph.output[0].name)
    node.output.append("z")
    model.opset_import.add(domain="my.ops", version=1)
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "m.onnx")
    assert squeeze.profile(tmp_path / "m.onnx").totals.uncounted_ops == (
        "my.ops::Magic",
    )


def test_dynamic_size_is_an_error_that_says_what_to_pass(tmp_path: Path) -> None:
    """A dynamic width needs --input-shape; the batch defaults to 1."""
    net = Net(["N", 3, "H", "W"])
    net.conv(3, 4)
    path = net.save(tmp_path / "m.onnx")
    with pytest.raises(SqueezeError, match="--input-shape x:1,3,224,224"):
        squeeze.profile(path)
    assert squeeze.profile(path, {"": (1, 3, 8, 8)}).totals.macs == 64 * 4 * 27
    assert squeeze.profile(path, {"x": (2, 3, 8, 8)}).totals.macs == 2 * 64 * 4 * 27
    with pytest.raises(UsageError, match="no input 'y'"):
        squeeze.profile(path, {"y": (1, 3, 8, 8)})
    with pytest.raises(UsageError, match="doesn't fit"):
        squeeze.profile(path, {"x": (1, 4, 8, 8)})


def test_compression_of_the_data_is_flagged_at_four(tmp_path: Path) -> None:
    """EffNet, Table 1: a 2×2 pool compresses the data 4 times."""
    layers = squeeze.profile(cifar_baseline().save(tmp_path / "m.onnx")).layers
    pools = [layer for layer in layers if layer.op == "MaxPool"]
    assert [layer.output_elements for layer in pools] == [16384, 8192, 4096]
    assert all(layer.bottleneck for layer in pools)
    assert not any(layer.bottleneck for layer in layers if layer.op == "Conv")


def test_shape_arithmetic_is_followed(tmp_path: Path) -> None:
    """A Reshape whose target is computed from Shape still has a known size."""
    net = Net(["N", 4, 6, 6])
    shape = net.node("Shape", "x")
    batch = net.node("Gather", shape, net.weight(np.array([0])))
    target = net.node("Concat", batch, net.weight(np.array([-1])), axis=0)
    net.node("Reshape", "x", target)
    name = net.weight(np.zeros((144, 5)))
    net.node("MatMul", net.value_before, name)
    assert squeeze.profile(net.save(tmp_path / "m.onnx")).totals.macs == 720


def test_peak_counts_what_is_still_needed(tmp_path: Path) -> None:
    """A skip keeps its tensor alive until the Add."""
    net = Net([1, 4, 8, 8])
    one = net.conv(4, 4)
    net.conv(4, 4)
    net.conv(4, 4)
    net.node("Add", net.value_before, one)
    result = squeeze.profile(net.save(tmp_path / "m.onnx"))
    tensor = 4 * 4 * 64
    assert result.totals.peak_activation_bytes == 3 * tensor
