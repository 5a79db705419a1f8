"""Predicted times: the published table, real bytes, and bad device files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from squeeze import model as models
from squeeze import rules, shapes
from squeeze.cost import device, profile
from squeeze.errors import RuleError, UsageError
from squeeze.measure import calibrate
from tests.builders import Net

# the 2012-dated MobileNets paper, Table 4: (kind, channels out, stride, seconds); rows
# 4 and 24 are printed there before their stride
PAPER = [
    ("full", 32, 1, 1.35475e-06),
    ("dw", 32, 1, 4.51584e-07),
    ("pw", 64, 1, 3.21126e-06),
    ("dw", 64, 2, 2.25792e-07),
    ("pw", 64, 1, 1.60563e-06),
    ("dw", 64, 1, 2.25792e-07),
    ("pw", 128, 1, 3.21126e-06),
    ("dw", 128, 1, 4.51584e-07),
    ("pw", 128, 1, 6.42253e-06),
    ("dw", 128, 1, 4.51584e-07),
    ("pw", 128, 1, 6.42253e-06),
    ("dw", 128, 1, 4.51584e-07),
    ("pw", 256, 1, 1.28451e-05),
    *[("dw", 256, 1, 9.03168e-07), ("pw", 256, 1, 2.56901e-05)] * 5,
    ("dw", 256, 2, 2.25792e-07),
    ("pw", 256, 1, 6.42253e-06),
    ("dw", 256, 1, 2.25792e-07),
    ("pw", 256, 1, 6.42253e-06),
]


def _paper_network(path: Path) -> Path:
    net, cin = Net([1, 3, 28, 28]), 3
    for kind, cout, stride, _ in PAPER:
        k = 1 if kind == "pw" else 3
        net.conv(
            cin,
            cout,
            (k, k),
            bias=False,
            group=cin if kind == "dw" else 1,
            strides=[stride, stride],
            pads=[k // 2] * 4,
        )
        cin = cout
    return net.save(path)


def _predict(path: Path, constants: device.Device) -> device.Prediction:
    model = models.load(path)
    inferred = shapes.infer(model)
    counted = profile(model, shapes=inferred)
    return device.predict(model.graph, inferred, counted, constants)


def test_compute_times_are_those_of_the_paper(tmp_path: Path) -> None:
    """Every row of Table 4's compute column, to the digits that it prints."""
    found = _predict(
        _paper_network(tmp_path / "m.onnx"), device.load("mobilenets-paper")
    )
    assert len(found.layers) == 27
    for layer, (*_, seconds) in zip(found.layers, PAPER, strict=True):
        assert layer.compute_s == pytest.approx(seconds, rel=5e-6)


def test_memory_overflows_once_near_the_end_as_in_the_paper(tmp_path: Path) -> None:
    """All that is held moves out when 1 MB is passed, and the count starts again."""
    found = _predict(
        _paper_network(tmp_path / "m.onnx"), device.load("mobilenets-paper")
    )
    over = [i for i, layer in enumerate(found.layers) if layer.exceeded]
    assert over
    first = found.layers[over[0]]
    assert first.held_bytes > 1e6 >= found.layers[over[0] - 1].held_bytes
    assert first.binds == "movement"
    assert first.moved_bytes > first.held_bytes
    assert found.layers[over[0] + 1].held_bytes < first.held_bytes
    first_layer = found.layers[0]
    assert first_layer.moved_bytes == 3 * 28 * 28 + 32 * 3 * 9  # input and weights


def test_layer_times_add_up(tmp_path: Path) -> None:
    """A layer is compute plus movement; full overlap takes the longer of the two."""
    path = _paper_network(tmp_path / "m.onnx")
    constants = device.load("phone-cpu")
    for layer in _predict(path, constants).layers:
        assert layer.time_s == max(layer.compute_s, layer.movement_s)
    for layer in _predict(path, device.load("cortex-m7")).layers:
        assert layer.time_s == layer.compute_s + layer.movement_s


def test_dominating_layers_are_the_slowest(tmp_path: Path) -> None:
    """The layers named as dominating take half of the time, and no fewer would."""
    found = _predict(_paper_network(tmp_path / "m.onnx"), device.load("cortex-m7"))
    worst = found.dominating()
    times = sorted((layer.time_s for layer in found.layers), reverse=True)
    assert [layer.time_s for layer in worst] == times[: len(worst)]
    assert sum(times[: len(worst)]) >= found.total_s / 2
    assert sum(times[: len(worst) - 1]) < found.total_s / 2


def test_every_shipped_device_says_where_its_constants_come_from() -> None:
    """Each file loads, and has a description and a source."""
    names = rules.names("devices")
    assert {"mobilenets-paper", "cortex-m4", "cortex-m7", "phone-cpu"} <= set(names)
    for name in names:
        found = device.load(name)
        assert found.description
        assert found.source


GOOD = "internal_memory = 1e6\nbandwidth = 1e9\nmatrix = 1e9\nelementwise = 1e8\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "bandwith = 1", "bandwidth"),
        (GOOD.replace("matrix = 1e9", ""), "matrix is missing"),
        (GOOD.replace("1e9", "0", 1), "bandwidth must be more than 0"),
        (GOOD.replace("1e8", "-1"), "elementwise = -1"),
        (GOOD.replace("1e8", "nan"), "not a number"),
        (GOOD.replace("1e8", "'fast'"), "not a number"),
        (GOOD + 'overlap = "some"', "none, full"),
        (GOOD + "memory = 3", "accumulate, live"),
        (GOOD + "kinds = 3", "must be a table"),
        (GOOD + "[kinds]\ndepthwise = 0", "kinds.depthwise must be more than 0"),
        (GOOD + 'fused = "Relu"', "fused must be a list"),
        (GOOD + "channel_block = 0", "channel_block = 0"),
        (GOOD + "operations = 3", "must be a table"),
        ("not toml", "not valid TOML"),
        ("\xff", "not valid TOML"),
    ],
)
def test_bad_device_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    """A complaint names the file, the key and what it must hold."""
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(RuleError, match=message) as caught:
        device.load(str(file))
    assert str(file) in str(caught.value)


def test_an_unknown_device_names_the_nearest() -> None:
    """A misspelt name is answered with the right one."""
    with pytest.raises(UsageError, match="cortex-m7"):
        device.load("cortexm7")


def test_a_kind_may_have_its_own_throughput(tmp_path: Path) -> None:
    """Depthwise layers slow down by the factor given, the others stay."""
    path = _paper_network(tmp_path / "m.onnx")
    plain = device.load("mobilenets-paper")
    slower = replace(plain, kinds={"depthwise": plain.matrix / 4})
    pairs = zip(
        _predict(path, plain).layers, _predict(path, slower).layers, strict=True
    )
    for (kind, *_), (one, other) in zip(PAPER, pairs, strict=True):
        assert other.matrix_s == one.matrix_s * (4 if kind == "dw" else 1)


def test_this_machines_constants_make_a_device(tmp_path: Path) -> None:
    """What calibration writes is a valid device file with every constant measured."""
    file = tmp_path / "here.toml"
    seen: list[float] = []
    file.write_text(calibrate.device_file(1, seen.append, repeats=1), encoding="utf-8")
    found = device.load(str(file))
    assert seen[-1] == 1
    assert {"1×1", "depthwise", "grouped", "FC", "matmul"} == set(found.kinds)
    assert {"BatchNormalization", "Relu"} <= set(found.fused)
    assert found.internal_bandwidth >= found.bandwidth
    assert found.operations["Gelu"] < found.operations["LayerNormalization"]
    assert found.bandwidth > 1e8
    assert found.matrix > found.kinds["grouped"] / 10


def _small(path: Path) -> Path:
    """A convolution with its ReLU, a sigmoid, and a transposition."""
    net = Net([1, 16, 8, 8])
    net.conv(16, 16, pads=[1] * 4)
    net.node("Relu")
    net.node("Sigmoid")
    net.node("Transpose", perm=[0, 2, 3, 1])
    return net.save(path)


def test_fused_ops_cost_nothing_behind_a_convolution(tmp_path: Path) -> None:
    """A fused ReLU is free, and so is what is fused after it; alone it is not."""
    path, plain = _small(tmp_path / "m.onnx"), device.load("phone-cpu")
    both = replace(plain, fused=["Relu", "Sigmoid"])
    times = [layer.time_s for layer in _predict(path, both).layers]
    assert times[0] > 0
    assert times[1:] == [0, 0]
    only = _predict(path, replace(plain, fused=["Sigmoid"])).layers
    assert only[1].time_s > 0 < only[2].time_s


def test_nodes_that_move_data_take_time_where_the_device_says_how_fast(
    tmp_path: Path,
) -> None:
    """A transposition reads and writes its data at the internal bandwidth."""
    path, plain = _small(tmp_path / "m.onnx"), device.load("phone-cpu")
    assert _predict(path, plain).moving == ()
    found = _predict(path, replace(plain, internal_bandwidth=1e9))
    (moved,) = found.moving
    assert moved.op == "Transpose"
    assert moved.time_s == pytest.approx(2 * 16 * 8 * 8 * 4 / 1e9)
    assert found.total_s == pytest.approx(
        sum(layer.time_s for layer in found.layers) + moved.time_s
    )


def test_channels_that_do_not_fill_registers_are_slower(tmp_path: Path) -> None:
    """`unaligned` holds where channels are no multiple of the block, and only there."""
    plain = replace(device.load("phone-cpu"), channel_block=16)
    slow = replace(plain, unaligned={"3×3": plain.matrix / 10})
    for channels, factor in ((16, 1), (18, 10)):
        net = Net([1, channels, 8, 8])
        net.conv(channels, channels, pads=[1] * 4)
        path = net.save(tmp_path / f"{channels}.onnx")
        one, other = (_predict(path, d).layers[0].matrix_s for d in (plain, slow))
        assert other == pytest.approx(factor * one)


def test_an_op_may_have_its_own_throughput(tmp_path: Path) -> None:
    """A sigmoid is as slow as `operations` says, other elementwise ops stay."""
    path, plain = _small(tmp_path / "m.onnx"), device.load("phone-cpu")
    slower = replace(plain, operations={"Sigmoid": plain.elementwise / 5})
    pairs = zip(
        _predict(path, plain).layers, _predict(path, slower).layers, strict=True
    )
    for one, other in pairs:
        factor = 5 if one.op == "Sigmoid" else 1
        assert other.elementwise_s == pytest.approx(factor * one.elementwise_s)
