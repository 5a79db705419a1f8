"""What removal broke is repaired: by least squares, else mean and spread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squeeze.rewrite import refit
from tests.builders import SAMPLES, Net, run
from tests.rewrite.test_prune import invoke

DIGITS = SAMPLES / "digits.npz"


def weight(net: Net, *shape: int) -> str:
    return net.weight(net.rng.standard_normal(shape) / np.sqrt(shape[0]))


def grouped(net: Net) -> None:
    net.conv(16, 8, group=2, name="reader")


def transposed(net: Net) -> None:
    kernel = weight(net, 16, 4, 2, 2)
    given = [net.value_before, kernel, net.weight(np.ones(8))]
    net.node("ConvTranspose", *given, name="reader", group=2, strides=[2, 2])


def same_padding(net: Net) -> None:
    net.conv(16, 8, name="reader", auto_pad="SAME_UPPER", bias=False)


def scaled_gemm(net: Net) -> None:
    net.node("GlobalAveragePool")
    net.node("Flatten")
    given = [net.value_before, weight(net, 16, 8), net.weight(np.ones(8))]
    net.node("Gemm", *given, name="reader", alpha=0.5, beta=2.0)


def saved(tmp_path: Path, reader: Callable[[Net], Any]) -> tuple[Path, np.ndarray]:
    """conv → Relu → reader, and images beside it."""
    net = Net(["N", 3, 8, 8])
    net.conv(3, 16, name="one")
    net.node("Relu")
    reader(net)
    x = np.random.default_rng(0).standard_normal((200, 3, 8, 8), np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    return net.save(tmp_path / "m.onnx"), x


def pruned(tmp_path: Path, model: Path, *words: str) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / "out.onnx"
    given = ["prune", model, "--ratio", "0.5", "--by", "l2", "-o", out, "--no-bench"]
    return out, invoke(*given, "--no-simplify", *words)


def moments(model: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = np.moveaxis(run(model, x=x)[0], 1, 0).reshape(8, -1)
    return y.mean(1), y.std(1)


@pytest.mark.parametrize("reader", [grouped, transposed, same_padding, scaled_gemm])
def test_readers_without_a_refit_get_their_moments_back(
    reader: Callable[[Net], Any], tmp_path: Path
) -> None:
    """Means and spreads of the outputs are the original's, and only with data."""
    model, x = saved(tmp_path, reader)
    data = str(tmp_path / "d.npz")
    mean, spread = moments(model, x)
    out, found = pruned(tmp_path, model, "--data", data, "--eval-data", data)
    repairs = {c["site"]: c["details"].get("repair") for c in found["changes"]}
    assert repairs == {"one": None, "reader": "mean and spread"}
    assert "repaired by mean and spread: reader" in found["notes"]
    now, width = moments(out, x)
    np.testing.assert_allclose(now, mean, atol=1e-3 * spread.max())
    np.testing.assert_allclose(width, spread, rtol=1e-3)
    out, _ = pruned(tmp_path, model)
    bare, narrow = moments(out, x)
    assert np.abs(bare - mean).max() > 0.1 * spread.max()
    assert np.abs(narrow / spread - 1).max() > 0.1


def test_depthwise_between_two_layers(tmp_path: Path) -> None:
    """A depthwise layer is repaired on the way, the dense one behind it refitted."""

    def chain(net: Net) -> None:
        net.conv(16, 16, group=16, name="depthwise")
        net.node("Relu")
        net.conv(16, 8, (1, 1), name="reader")

    model, _ = saved(tmp_path, chain)
    _, found = pruned(tmp_path, model, "--data", str(tmp_path / "d.npz"))
    repairs = {c["site"]: c["details"].get("repair") for c in found["changes"]}
    assert repairs["depthwise"] == "mean and spread"
    assert repairs["reader"] == "least squares"


def test_what_has_no_bias_is_named(tmp_path: Path) -> None:
    """A reader that nothing can be done for is listed with the reason."""

    def lrn(net: Net) -> None:
        net.node("LRN", name="norm", size=3)
        net.conv(16, 8, (1, 1), name="reader")

    model, _ = saved(tmp_path, lrn)
    _, found = pruned(tmp_path, model, "--data", str(tmp_path / "d.npz"))
    assert any(
        "not at all: norm (LRN has no weights of its own)" in note
        for note in found["notes"]
    )


def test_no_refit_restores_moments_only(tmp_path: Path) -> None:
    """--no-refit is better than nothing and worse than least squares."""
    errors = []
    for words in (["--data", DIGITS], ["--data", DIGITS, "--no-refit"]):
        found = invoke(
            "prune", SAMPLES / "digits_cnn.onnx", "--macs", "40%", *words,
            "-o", tmp_path / "o.onnx", "--no-bench", "--round-to", 1,
        )  # fmt: skip
        errors.append(found["fidelity"]["relative_error"])
    bare = tmp_path / "bare.onnx"
    model = SAMPLES / "digits_cnn.onnx"
    invoke("prune", model, "--macs", "40%", "-o", bare, "--no-bench", "--round-to", 1)
    x = np.load(SAMPLES / "digits_test.npz")["x"]
    then, now = run(model, x=x)[0], run(bare, x=x)[0]
    nothing = np.linalg.norm(now - then) / np.linalg.norm(then)
    assert errors[0] < 0.8 * errors[1]
    assert errors[1] < 0.8 * nothing


@pytest.mark.parametrize("behind", ["nothing", "batch norm", "matmul and bias"])
def test_residual_sums_are_the_targets(
    behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch's last layer also repairs what the skip has lost."""
    net = Net(["N", 6])
    stem = net.node("Gemm", "x", weight(net, 6, 32), net.weight(np.zeros(32)), name="a")
    stem = net.node("Relu", stem)
    skip = net.node("MatMul", stem, weight(net, 32, 8), name="skip")
    inner = net.node(
        "Gemm", stem, weight(net, 32, 128), net.weight(np.ones(128)), name="b"
    )
    inner = net.node("Relu", inner)
    y = net.node("MatMul", inner, weight(net, 128, 8), name="last")
    if behind == "batch norm":
        y = net.batch_norm(8)
    if behind == "matmul and bias":
        y = net.node("Add", y, net.weight(net.rng.standard_normal(8)))
    net.node("Add", skip, y, name="sum")
    net.node("Sigmoid")
    model = net.save(tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((2000, 6), np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    words = ("--data", str(tmp_path / "d.npz"), "--samples", "1500", "--only", "a")
    _, found = pruned(tmp_path, model, *words)
    monkeypatch.setattr(refit, "_residual", lambda node, shapes: None)
    _, alone = pruned(tmp_path, model, *words)
    error = found["fidelity"]["relative_error"]
    assert error < 0.95 * alone["fidelity"]["relative_error"]


def test_few_rows_do_not_pull_a_refit_off(tmp_path: Path) -> None:
    """A layer with more columns than rows is refitted, and held-out images agree.

    With the damping of layers that have rows enough it follows those few anywhere.
    """
    net = Net(["N", 3, 8, 8])
    net.conv(3, 16, name="one")
    net.node("Relu")
    net.node("Flatten")
    given = [net.value_before, weight(net, 16 * 64, 8), net.weight(np.zeros(8))]
    net.node("Gemm", *given, name="reader")
    model = net.save(tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((700, 3, 8, 8), np.float32)
    np.savez(tmp_path / "few.npz", x=x[:300])

    def error(*words: str) -> float:
        few = str(tmp_path / "few.npz")
        out, found = pruned(tmp_path, model, "--data", few, *words)
        assert any("reader" in note for note in found["notes"])
        then, now = (run(path, x=x[300:])[0] for path in (model, out))
        return float(np.linalg.norm(now - then) / np.linalg.norm(then))

    moments_only = error("--no-refit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("squeeze.rewrite.refit.DAMPINGS", 1)
        undamped = error()
    assert error() < 0.9 * min(moments_only, undamped)
