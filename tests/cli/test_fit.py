"""convert and factorize with data, on the command line: what is said, and done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from squeeze.cli import run as squeeze
from tests.builders import SAMPLES, Net, images
from tests.builders import run as outputs

Capture = pytest.CaptureFixture[str]
FITS = {
    "convert": ["--to", "depthwise-separable", "--fit", "data", "--no-keep-first"],
    "factorize": ["--rank", "4", "--round-to", "1"],
}
commands = pytest.mark.parametrize("command", FITS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two convolutions and a classifier, over 3×8×8 inputs."""
    net = Net(["N", 3, 8, 8])
    net.conv(3, 16)
    net.node("Relu")
    net.conv(16, 16)
    net.node("Relu")
    net.node("GlobalAveragePool")
    net.node("Flatten")
    net.gemm(16, 5)
    return net.save(tmp_path_factory.mktemp("fit") / "net.onnx")


def fitted(
    capsys: Capture, command: str, model: Path, *more: str
) -> tuple[int, dict[str, Any], str]:
    """(exit status, the JSON report, stderr)."""
    common = [
        "--no-bench",
        "--no-simplify",
        "--json",
        "-o",
        str(model.parent / "o.onnx"),
    ]
    capsys.readouterr()
    status = squeeze([command, str(model), *FITS[command], *common, *more])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else {}, captured.err


X = images(60, 3, 8, 8)
BAD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "name": ({"pictures": X}, "no array for input 'x'; it has pictures"),
    "shape": ({"x": X[:, :2]}, "don't fit input 'x' [3, 8, 8]"),
    "rank": ({"x": X[:, 0]}, "don't fit input 'x'"),
    "text": ({"x": np.full((60, 3, 8, 8), "a")}, "for input 'x' float32"),
    "complex": ({"x": X.astype(complex)}, "complex128 data for input 'x'"),
    "NaN": ({"x": np.where(X > 3, np.nan, X)}, "NaN or Inf in the data for input 'x'"),
    "Inf": ({"x": np.where(X > 3, np.inf, X)}, "NaN or Inf"),
    "lengths": ({"x": X, "labels": np.zeros(9, int)}, "different lengths"),
    "labels": ({"x": X, "labels": np.zeros(60)}, "one integer class per sample"),
    "none": ({"x": X[:0]}, "holds no samples"),
    "one": ({"x": X[:1]}, "too few to hold a fifth out; pass --eval-data"),
}


@commands
@pytest.mark.parametrize("bad", BAD)
def test_data_that_does_not_fit(
    command: str, bad: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Status 3, the file and what is wrong with it named, nothing written."""
    arrays, message = BAD[bad]
    np.savez(tmp_path / "d.npz", **arrays)
    written = tmp_path / "out.onnx"
    status, _, error = fitted(
        capsys, command, model, "--data", str(tmp_path / "d.npz"), "-o", str(written)
    )
    assert status == 3, error
    assert message in error
    assert "d.npz" in error
    assert not written.exists()


@commands
def test_places_without_data(
    command: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """An empty folder is 3, a missing one 2; each says what it looked for."""
    status, _, error = fitted(capsys, command, model, "--data", str(tmp_path))
    assert status == 3
    assert "no .npz files, images or test_data_set_N" in error
    missing = str(tmp_path / "none")
    status, _, error = fitted(capsys, command, model, "--data", missing)
    assert status == 2
    assert "no such file or folder" in error


def test_integer_inputs(tmp_path: Path, capsys: Capture) -> None:
    """Float data for an integer input is refused; integers are taken."""
    rng = np.random.default_rng(0)
    arrays = {"table": rng.normal(size=(20, 32)), "w": rng.normal(size=(32, 32))}
    weights = [
        numpy_helper.from_array(a.astype(np.float32), k) for k, a in arrays.items()
    ]
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["g"], "embed"),
        helper.make_node("MatMul", ["g", "w"], ["y"], "fc"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.INT64, ["N", 6])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [given], [made], weights)
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    tokens = rng.integers(0, 20, (50, 6))
    for x, status in ((tokens, 0), (tokens.astype(np.float32), 3)):
        np.savez(tmp_path / "d.npz", x=x)
        data = str(tmp_path / "d.npz")
        found, report, error = fitted(capsys, "factorize", path, "--data", data)
        assert found == status, error
        assert "float32 data for the int64 input" in error or report["changes"]


@commands
def test_labels_are_optional(
    command: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Without labels the outputs are compared; with them, the accuracy as well."""
    for arrays, scored in (({}, False), ({"labels": np.arange(60) % 5}, True)):
        np.savez(tmp_path / "d.npz", x=X, **arrays)
        data = str(tmp_path / "d.npz")
        status, report, error = fitted(capsys, command, model, "--data", data)
        assert status == 0, error
        fidelity = json.dumps(report["fidelity"])
        assert "48 samples" in fidelity and "last 12 held out" in fidelity
        assert (report["fidelity"]["accuracy_after"] is not None) == scored, fidelity


@commands
def test_few_samples_are_told_of(
    command: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Fits that lean on their start say so, and still run."""
    np.savez(tmp_path / "d.npz", x=X[:5])
    data = str(tmp_path / "d.npz")
    status, report, error = fitted(capsys, command, model, "--data", data)
    assert status == 0, error
    assert "few samples for" in error
    assert "more --samples help" in error
    assert any(c["applied"] and c["fit_error"] is not None for c in report["changes"])


@commands
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_layers_that_never_vary(
    command: str, value: float, tmp_path: Path, capsys: Capture
) -> None:
    """Constant data: no crash, and on that data the outputs are the original's."""
    net = Net(["N", 3, 8, 8])
    for cin in (3, 16):
        net.conv(cin, 16, pads=[0, 0, 0, 0])  # at a border, a padded layer varies
        net.node("Relu")
    model = net.save(tmp_path / "m.onnx")
    x = np.full((40, 3, 8, 8), value, np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    written = tmp_path / "o.onnx"
    more = ["--data", str(tmp_path / "d.npz"), "-o", str(written)]
    status, report, error = fitted(capsys, command, model, *more)
    assert status == 0, error
    errors = [c["fit_error"] for c in report["changes"] if c["applied"]]
    assert errors
    assert all(np.isfinite(e) for e in errors)
    made, wanted = outputs(written, x=x)[0], outputs(model, x=x)[0]
    assert np.allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())


@commands
def test_bfloat16_is_rewritten_and_not_run(
    command: str, tmp_path: Path, capsys: Capture
) -> None:
    """Fitted to the weights and reported as not verified; data can't be run through."""
    net = Net(["N", 3, 8, 8])
    net.conv(3, 16)
    net.node("Relu")
    proto = net.model()
    for weight in proto.graph.initializer:
        array = numpy_helper.to_array(weight).astype(ml_dtypes.bfloat16)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    path = tmp_path / "b.onnx"
    onnx.save(proto, path)
    arguments = [*FITS[command], "--no-bench", "--json", "-o", str(tmp_path / "o.onnx")]
    arguments = [a for a in arguments if a not in ("--fit", "data")]
    assert squeeze([command, str(path), *arguments]) == 0
    captured = capsys.readouterr()
    assert sum(c["applied"] for c in json.loads(captured.out)["changes"]) == 1
    assert "not verified" in captured.err
    kinds = {w.data_type for w in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert kinds == {TensorProto.BFLOAT16}
    np.savez(tmp_path / "d.npz", x=X)
    status, _, error = fitted(capsys, command, path, "--data", str(tmp_path / "d.npz"))
    assert status == 3
    assert "does not run here" in error
    assert "weights alone" in error


# -- budgets ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("share", ["75%", "50%"])
def test_convert_to_a_budget(
    share: str, data: bool, tmp_path: Path, capsys: Capture
) -> None:
    """--macs decides which sites are converted, and with which multiplier."""
    command = ["convert", str(SAMPLES / "digits_cnn.onnx"), "--to"]
    command += ["depthwise-separable", "--macs", share, "--no-bench", "--json"]
    command += ["-o", str(tmp_path / "o.onnx")]
    command += ["--data", str(SAMPLES / "digits.npz")] if data else []
    assert squeeze(command) == 0
    report = json.loads(capsys.readouterr().out)
    limit = float(share[:-1]) / 100
    left = report["after"]["macs"] / report["before"]["macs"]
    assert limit / 2 < left <= limit
    applied = [c for c in report["changes"] if c["applied"]]
    assert applied
    assert all("multiplier" in c["details"]["params"] for c in applied)


def test_a_budget_out_of_reach(tmp_path: Path, capsys: Capture) -> None:
    """Status 3, what can be reached, nothing written."""
    path = str(SAMPLES / "digits_cnn.onnx")
    written = tmp_path / "o.onnx"
    for command in (
        ["convert", path, "--to", "depthwise-separable", "--macs", "0.1%"],
        ["factorize", path, "--macs", "0.1%"],
        ["factorize", path, "--params", "10"],
    ):
        assert squeeze([*command, "-o", str(written)]) == 3
        assert "out of reach" in capsys.readouterr().err
        assert not written.exists()


@pytest.mark.parametrize("amount", ["50%", "12k"])
def test_parameters_as_a_budget(amount: str, tmp_path: Path, capsys: Capture) -> None:
    """factorize --params is met, by layers that it counts the same way."""
    path = SAMPLES / "digits_cnn.onnx"
    written = tmp_path / "o.onnx"
    command = ["factorize", str(path), "--params", amount, "-o", str(written)]
    assert squeeze([*command, "--no-bench", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    whole = report["before"]["params"]
    limit = whole / 2 if amount == "50%" else 12_000
    assert limit / 2 < report["after"]["params"] <= limit
    saved = sum(
        c["before"]["params"] - c["after"]["params"]
        for c in report["changes"]
        if c["applied"]
    )
    assert whole - report["after"]["params"] == saved


# -- choices ------------------------------------------------------------------------


def applied(report: dict[str, Any]) -> dict[str, Any]:
    return {c["site"]: c["details"] for c in report["changes"] if c["applied"]}


def test_what_is_fitted_to(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """--fit auto is data if there is any, else the weights; none leaves random ones."""
    np.savez(tmp_path / "d.npz", x=X)
    data = ["--data", str(tmp_path / "d.npz")]
    found: dict[str, Callable[[str], bool]] = {
        "data": lambda fit: "least squares" in fit or fit == "closed form",
        "weights": lambda fit: fit == "closed form",
    }
    for fit, more, kind in (
        ("auto", data, "data"),
        ("auto", [], "weights"),
        ("weights", data, "weights"),
        ("data", data, "data"),
    ):
        status, report, error = fitted(capsys, "convert", model, "--fit", fit, *more)
        assert status == 0, error
        details = applied(report)
        assert all(found[kind](d["fit"]) for d in details.values()), details
        scored = [c["fit_error"] is not None for c in report["changes"] if c["applied"]]
        assert set(scored) == {kind == "data"}
    status, report, error = fitted(capsys, "convert", model, "--fit", "none")
    assert status == 0
    assert "not fitted" in error
    status, _, error = fitted(capsys, "convert", model)
    assert status == 2
    assert "pass --data" in error


def test_selected_layers_methods_and_rounding(model: Path, capsys: Capture) -> None:
    """--only, --skip, --method and --round-to mean what they say."""
    rank = ["--rank", "40%", "--allow-costlier"]
    _, report, _ = fitted(capsys, "factorize", model, *rank, "--only", "conv*")
    assert set(applied(report)) == {"conv0", "conv2"}
    skip = ["--skip", "re:^conv", "--round-to", "4"]
    _, report, _ = fitted(capsys, "factorize", model, *rank, *skip)
    assert applied(report) == {"gemm6": {"method": "pca", "rank": 4}}
    for method in ("pca", "spatial", "tucker", "separable"):
        _, report, _ = fitted(
            capsys, "factorize", model, *rank, "--method", method, "--only", "conv2"
        )
        (details,) = applied(report).values()
        assert details["method"] == method
    _, report, _ = fitted(capsys, "factorize", model, "--rank", "evbmf")
    for change in report["changes"]:
        assert change["applied"] or change["reason"]
