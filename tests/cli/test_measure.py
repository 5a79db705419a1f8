"""bench, compare and profile --device from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from squeeze.cli import run
from tests.builders import SAMPLES

DIGITS = str(SAMPLES / "digits_cnn.onnx")
CIFAR = str(SAMPLES / "cifar10_cnn.onnx")
TEST = str(SAMPLES / "digits_test.npz")


def test_bench_reports_models_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON document: the baseline first, the others with their ratio."""
    given = ["bench", CIFAR, "--baseline", DIGITS, "--runs", "16", "--seconds", "0.3"]
    assert run([*given, "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["baseline"] == DIGITS
    base, other = report["models"]
    assert base["ratio"] is None
    assert other["ratio_low"] <= other["ratio"] <= other["ratio_high"]
    assert other["verdict"] == "slower"
    assert other["macs"] == 39_559_168


def test_bench_layers_share_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """--layers gives lines that sum to the run, with MACs and GFLOP/s."""
    assert run(["bench", CIFAR, "--layers", "--seconds", "0.2", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    total = sum(line["time_ms"] for line in model["layers"])
    assert total == pytest.approx(model["profiled_ms"])
    conv = next(line for line in model["layers"] if line["name"] == "conv2")
    assert conv["gflops"] == pytest.approx(2e-6 * conv["macs"] / conv["time_ms"])


def test_compare_with_labels(capsys: pytest.CaptureFixture[str]) -> None:
    """Accuracy of both and a paired interval; costs side by side."""
    assert run(["compare", DIGITS, DIGITS, "--data", TEST, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"]["base"] == report["accuracy"]["new"] > 0.9
    assert report["outputs"][0]["max_abs"] == 0
    assert report["before"]["macs"] == report["after"]["macs"]
    assert report["finite"]


def test_compare_prints_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    """--markdown gives GitHub tables, and random inputs are called random."""
    assert run(["compare", DIGITS, DIGITS, "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| output |" in printed
    assert "random inputs" in printed


def test_profile_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    """--device adds times per layer that sum to the total, and the constants used."""
    assert run(["profile", CIFAR, "--device", "mobilenets-paper", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    total = sum(layer["time_s"] for layer in report["layers"])
    assert report["prediction"]["total_s"] == pytest.approx(total)
    assert report["prediction"]["device"]["matrix"] == 1e12
    conv = report["layers"][0]
    assert conv["matrix_s"] == pytest.approx(2 * conv["macs"] / 1e12)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench"], 2, "name a model"),
        (["bench", "gone.onnx"], 2, "no such file"),
        (["bench", DIGITS, "--provider", "tpu"], 2, "no provider"),
        (["bench", DIGITS, "--data", "gone.npz"], 2, "no such file"),
        (["compare", DIGITS, CIFAR], 3, "differ"),
        (["compare", DIGITS, DIGITS, "--data", str(SAMPLES / "adder.npz")], 3, "adder"),
        (["profile", DIGITS, "--device", "gone.toml"], 2, "no such file"),
        (["profile", DIGITS, "--device", "cortex"], 2, "cortex-m"),
        (["profile", DIGITS, "--html", "gone/page.html"], 2, "no such folder"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mistake ends in its exit status and a message that names it."""
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
