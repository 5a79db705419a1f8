"""`squeeze width` and `squeeze resolution`: MobileNets, Tables 6, 7 and 9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from squeeze.cli import cli
from squeeze.rewrite.resolution import pooling_matrix
from tests.builders import SAMPLES, Net, run, standard_mobilenet
from tests.rewrite.test_prune import channels, invoke, weights_of

CNN = SAMPLES / "digits_cnn.onnx"
FAST = ("--no-bench", "--no-simplify")


@pytest.fixture(scope="module")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full MobileNet converted to depthwise-separable blocks."""
    folder = tmp_path_factory.mktemp("mobilenet")
    full, made = standard_mobilenet().save(folder / "full.onnx"), folder / "m.onnx"
    found = invoke("convert", full, "--to", "depthwise-separable", "-o", made, *FAST)
    assert found["after"]["macs"] == 568_740_352
    return made


@pytest.mark.parametrize(
    ("multiplier", "macs", "weights"),
    [
        ("0.75", 325_400_448, 2_569_144),
        ("0.5", 149_497_088, 1_320_648),
        ("0.25", 41_030_272, 464_600),
    ],
)
def test_table_6(
    separable: Path, tmp_path: Path, multiplier: str, macs: int, weights: int
) -> None:
    """Width multipliers of the converted network, exactly."""
    output = tmp_path / "o.onnx"
    found = invoke("width", separable, "--multiplier", multiplier, "-o", output, *FAST)
    assert found["after"]["macs"] == macs
    total = sum(
        int(np.prod(t.dims))
        for t in onnx.load(output).graph.initializer
        if len(t.dims) > 1 or t.dims[:1] == [1000]
    )
    assert total == weights


@pytest.mark.parametrize(
    ("multiplier", "size", "macs"),
    [
        ("0.857", 192, 418_121_728),
        ("0.714", 160, 290_675_200),
        ("0.571", 128, 186_400_768),
    ],
)
def test_table_7(
    separable: Path, tmp_path: Path, multiplier: str, size: int, macs: int
) -> None:
    """Resolutions, by multiplier to the nearest pixel and by size, exactly."""
    for option in (("--multiplier", multiplier), ("--size", size)):
        output = tmp_path / "o.onnx"
        found = invoke("resolution", separable, *option, "-o", output, *FAST)
        assert found["after"]["macs"] == macs
        assert found["changes"][0]["details"]["size"] == [[224, 224], [size, size]]


def test_table_9(separable: Path, tmp_path: Path) -> None:
    """Width 0.5 and resolution 160 together: 76 M."""
    thin, small = tmp_path / "thin.onnx", tmp_path / "small.onnx"
    invoke("width", separable, "--multiplier", 0.5, "-o", thin, *FAST)
    found = invoke("resolution", thin, "--size", "160x160", "-o", small, *FAST)
    assert found["after"]["macs"] == 76_524_800


def test_several_widths_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line per multiplier, with exact decimals, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    options = [x for m in ("1", "0.29", "0.5") for x in ("--multiplier", m)]
    found = invoke("width", CNN, *options)
    macs = [w["macs"] for w in found["widths"]]
    assert macs[0] > macs[2] > macs[1]
    assert not list(tmp_path.iterdir())


def test_width_is_an_exact_decimal(tmp_path: Path) -> None:
    """floor(0.29 · 100) is 29, as decimals are, not as floats are."""
    net = Net(["N", 3, 8, 8])
    net.node("Relu", net.conv(3, 100, name="one"))
    net.conv(100, 4)
    output = tmp_path / "o.onnx"
    model = net.save(tmp_path / "m.onnx")
    found = invoke("width", model, "--multiplier", "0.29", "-o", output, *FAST)
    assert channels(found)["one"] == [100, 29]


def test_width_keeps_the_first_or_draws_afresh(tmp_path: Path) -> None:
    """--keep first takes leading channels; --init random keeps none of the weights."""
    output = tmp_path / "o.onnx"
    old = weights_of(CNN)["conv1.weight"]

    def first_layer(*options: str) -> np.ndarray:
        invoke("width", CNN, "--multiplier", 0.5, "-o", output, *FAST, *options)
        graph = onnx.load(output).graph
        name = next(n.input[1] for n in graph.node if n.name == "conv1")
        (tensor,) = (t for t in graph.initializer if t.name == name)
        return onnx.numpy_helper.to_array(tensor)

    np.testing.assert_array_equal(first_layer("--keep", "first"), old[:8])
    fresh = first_layer("--init", "random")
    assert fresh.shape == (8, 1, 3, 3)
    assert not np.isin(fresh, old).any()


def test_width_refits_on_data(tmp_path: Path) -> None:
    """With data the thinned network stays closer to the original than without."""
    errors = []
    for extra in ([], ["--no-refit"]):
        found = invoke(
            "width", CNN, "--multiplier", 0.75, "--data", SAMPLES / "digits.npz",
            "-o", tmp_path / "o.onnx", *FAST, *extra,
        )  # fmt: skip
        errors.append(found["fidelity"]["relative_error"])
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("multiplier", ["0", "1.5", "-1", "wide"])
def test_bad_multipliers(multiplier: str, tmp_path: Path) -> None:
    """Outside (0, 1] is bad usage."""
    for command in ("width", "resolution"):
        options = ("--multiplier", multiplier, "-o", tmp_path / "o.onnx")
        invoke(command, CNN, *options, status=2)


def test_flatten_into_a_layer_is_refused_or_pooled(tmp_path: Path) -> None:
    """A layer that reads a whole map names the remedy; --adapt pool takes it."""
    output = tmp_path / "o.onnx"
    found = invoke("resolution", CNN, "--size", 6, "-o", output, *FAST, status=3)
    assert "--adapt pool" in found["error"]
    assert not output.exists()
    pooled = ("--size", 6, "--adapt", "pool", "-o", output)
    found = invoke("resolution", CNN, *pooled, *FAST)
    x = np.random.default_rng(0).random((3, 1, 6, 6), np.float32)
    assert run(output, input=x)[0].shape == (3, 10)
    assert [c["action"] for c in found["changes"]] == ["resolution", "pool"]


def test_resize_in_front_keeps_the_input(tmp_path: Path) -> None:
    """Callers go on feeding the old size."""
    net = Net(["N", 3, 16, 16])
    a = net.node("GlobalAveragePool", net.node("Relu", net.conv(3, 8)))
    net.value = net.node("Flatten", a)
    net.gemm(8, 4)
    model, output = net.save(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    found = invoke(
        "resolution", model, "--multiplier", 0.5, "--resize-input", "-o", output, *FAST
    )
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16), np.float32)
    assert run(output, x=x)[0].shape == (2, 4)
    assert found["after"]["macs"] < 0.3 * found["before"]["macs"]


@pytest.mark.parametrize(("size", "smaller"), [(16, 8), (22, 13), (37, 3), (224, 193)])
def test_resize_meets_the_size_to_the_pixel(
    size: int, smaller: int, tmp_path: Path
) -> None:
    """A factor that floats round down loses no pixel; the table says both sizes."""
    net = Net(["N", 3, size, size])
    net.node("Relu", net.conv(3, 4))
    model, output = net.save(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    words = ["resolution", str(model), "--size", str(smaller), "--resize-input"]
    shown = CliRunner().invoke(cli, [*words, "-o", str(output), *FAST])
    assert shown.exit_code == 0, shown.output
    assert f"size {size}×{size} → {smaller}×{smaller}" in shown.output
    x = np.zeros((1, 3, size, size), np.float32)
    assert run(output, x=x)[0].shape[2:] == (smaller, smaller)


def test_constants_that_hold_the_size_are_adapted(tmp_path: Path) -> None:
    """A pool over the whole map and a Reshape with its size both follow."""
    net = Net([1, 3, 16, 16])
    a = net.node("Relu", net.conv(3, 8))
    b = net.node("Reshape", a, net.weight(np.array([1, 8, 256])))
    c = net.node("Reshape", b, net.weight(np.array([1, 8, 256, 1])))
    d = net.node("AveragePool", c, kernel_shape=[256, 1])
    net.value = net.node("Reshape", d, net.weight(np.array([1, 8])))
    net.gemm(8, 4)
    model, output = net.save(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    invoke("resolution", model, "--size", "12x10", "-o", output, *FAST)
    x = np.random.default_rng(0).standard_normal((1, 3, 12, 10), np.float32)
    assert run(output, x=x)[0].shape == (1, 4)


@pytest.mark.parametrize(("size", "grid"), [(7, 4), (3, 4), (8, 4), (5, 1)])
def test_pooling_matrix(size: int, grid: int) -> None:
    """Every bin of adaptive pooling is a mean; together they see every pixel."""
    matrix = pooling_matrix(size, grid)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    assert matrix.any(0).all()
