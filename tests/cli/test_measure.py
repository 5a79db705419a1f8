"""bench, compare and profile --device from the command line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import onnxruntime
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


def test_bench_against_itself_shows_the_noise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The baseline is listed once beside others, twice where it is all there is."""
    given = ["--runs", "16", "--seconds", "0.2", "--threads", "1", "--json"]
    for models in ([DIGITS], [DIGITS, CIFAR]):
        assert run(["bench", *models, "--baseline", DIGITS, *given]) == 0
        report = json.loads(capsys.readouterr().out)
        assert len(report["models"]) == 2


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
        (["bench", DIGITS, "--clock", "processor", "--threads", "2"], 2, "--threads"),
        (["rules", "cortexm7"], 2, "did you mean 'cortex-m7'"),
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


class _Runner:
    """A session that says it runs where it was asked to."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_providers(self) -> list[str]:
        return [self.name, "CPUExecutionProvider"]

    def get_inputs(self) -> list[object]:
        return []

    def run(self, names: object, feeds: object) -> None:
        raise RuntimeError("no kernel image is available for execution")


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An onnxruntime that lists CUDA."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    return monkeypatch


def _cuda_makes(monkeypatch: pytest.MonkeyPatch, made: object) -> None:
    """What becomes of a session that asks for CUDA: an object, or an error raised."""
    real = onnxruntime.InferenceSession

    def make(model: object, options: object, providers: list[str]) -> object:
        if providers == ["CPUExecutionProvider"]:
            return real(model, options, providers=providers)
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (RuntimeError("libcublas.so.12: cannot open"), "can't load it on CUDA: libcub"),
        (_Runner("CPUExecutionProvider"), "failed to start and onnxruntime fell back"),
        (_Runner("CUDAExecutionProvider"), "fails at run time (CUDA): no kernel image"),
    ],
)
def test_a_provider_that_fails_is_named_with_the_remedy(
    made: object,
    message: str,
    with_cuda: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is listed, but its session fails to start or to run: status 3, no figures."""
    _cuda_makes(with_cuda, made)
    assert run(["bench", DIGITS, "--provider", "cuda"]) == 3
    captured = capsys.readouterr()
    assert message in captured.err
    assert "leave --provider out" in captured.err
    assert captured.out == ""


def test_a_provider_that_runs_nothing_is_refused(
    with_cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its session starts and names it first, but every node ran on the CPU."""
    real = onnxruntime.InferenceSession

    def make(model: object, options: object, providers: list[str]) -> object:
        runner = real(model, options, providers=["CPUExecutionProvider"])
        if providers != ["CPUExecutionProvider"]:
            runner.get_providers = lambda: [*providers, "CPUExecutionProvider"]
        return runner

    with_cuda.setattr(onnxruntime, "InferenceSession", make)
    assert run(["bench", DIGITS, "--provider", "cuda"]) == 3
    assert "CUDA ran none of its nodes, CPU ran them" in capsys.readouterr().err


def test_rules_lists_and_shows_devices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Devices beside blocks, one in full, and a file of one's own validated."""
    assert run(["rules", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"effnet", "xception"} <= {block["name"] for block in listed["blocks"]}
    assert "cortex-m7" in {device["name"] for device in listed["devices"]}
    assert run(["rules", "cortex-m7"]) == 0
    assert "CMSIS-NN" in capsys.readouterr().out
    mine = tmp_path / "mine.toml"
    good = "internal_memory = 1e6\nbandwidth = 1e9\nmatrix = 1e9\nelementwise = 1e8\n"
    mine.write_text(good)
    assert run(["rules", "--check", str(mine)]) == 0
    mine.write_text(good.replace("1e8", "'fast'"))
    assert run(["rules", "--check", str(mine)]) == 2
    assert "elementwise = 'fast'" in capsys.readouterr().err


def _on_a_terminal(*arguments: str) -> str:
    """What the command writes to stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "squeeze", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # the terminal's end, on Linux
            while part := os.read(ours, 65536):
                written += part
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


@pytest.mark.parametrize(
    ("arguments", "titles"),
    [
        (["bench", DIGITS, "--seconds", "0.5", "--threads", "1"], ["timing"]),
        (["bench", DIGITS, "--layers", "--seconds", "0.5"], ["profiling"]),
        (["compare", DIGITS, DIGITS, "--layers"], ["comparing"]),
        (
            ["convert", DIGITS, "--to", "bottleneck", "--no-simplify", "-o"],
            ["rewriting", "writing", "timing"],
        ),
    ],
)
def test_progress_shows_on_a_terminal(
    arguments: list[str], titles: list[str], tmp_path: Path
) -> None:
    """A bar for every stage, timing within a rewrite included."""
    if arguments[-1] == "-o":
        arguments = [*arguments, str(tmp_path / "out.onnx")]
    shown = _on_a_terminal(*arguments)
    assert all(title in shown for title in titles)


def test_progress_is_silent_in_a_pipe() -> None:
    """Nothing but the report where nobody watches."""
    given = ["bench", DIGITS, "--seconds", "0.5", "--threads", "1"]
    command = [sys.executable, "-m", "squeeze", *given]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    assert "median" in piped.stdout
