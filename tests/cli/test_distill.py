"""`squeeze distill` from the outside: report, files, interruption, what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from squeeze.cli import run as squeeze_cli
from tests.builders import SAMPLES

DIGITS = str(SAMPLES / "digits_cnn.onnx")
IMAGES = str(SAMPLES / "digits.npz")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in subprocesses: two threads on a busy machine wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A converted digits network with random weights."""
    path = tmp_path / "student.onnx"
    arguments = ["convert", DIGITS, "--to", "effnet", "--no-bench", "-o", str(path)]
    assert squeeze_cli(arguments) == 0
    return path


def _arguments(student: Path, *more: str) -> list[str]:
    return ["distill", str(student), "--teacher", DIGITS, "--data", IMAGES, *more]


def test_without_torch_the_message_says_how_to_install_it(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without PyTorch: status 2 and the extra's name, nothing written."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert squeeze_cli(_arguments(student)) == 2
    assert "pip install 'squeeze[train]'" in capsys.readouterr().err
    assert [f.name for f in student.parent.iterdir()] == ["student.onnx"]


def test_help_imports_neither_torch_nor_numpy() -> None:
    """`squeeze distill --help` comes at once."""
    code = "import sys, squeeze.cli; squeeze.cli.run(['distill', '--help']); "
    code += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--teacher" in done.stdout
    assert done.stdout.strip().endswith("False False")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--data", IMAGES], 2, "--teacher"),
        (["--teacher", DIGITS], 2, "--data"),
        (["--teacher", DIGITS, "--data", "none.npz"], 2, "no such file"),
        (["--teacher", "none.onnx", "--data", IMAGES], 2, "none.onnx: no such file"),
        (["--teacher", DIGITS, "--data", IMAGES, "--epochs", "0"], 2, "--epochs"),
        (["--teacher", DIGITS, "--data", IMAGES, "--resume"], 2, "no checkpoint"),
        (["--teacher", DIGITS, "--data", IMAGES, "--seed", "-1"], 2, "--seed"),
        (["--teacher", DIGITS, "--data", IMAGES, "--minutes", "nan"], 2, "--minutes"),
        (
            ["--teacher", DIGITS, "--data", IMAGES, "--html", "gone/page.html"],
            2,
            "gone: no such folder",
        ),
        (
            ["--teacher", DIGITS, "--data", IMAGES, "-o", "/proc/out.onnx"],
            3,
            "/proc/out.onnx.checkpoint: can't write",
        ),
        (["--teacher", DIGITS, "--data", IMAGES, "--device", "cuda"], 2, "no GPU"),
        (["--teacher", DIGITS, "--data", str(SAMPLES / "adder.npz")], 3, "adder.npz"),
        (
            ["--teacher", str(SAMPLES / "cifar10_cnn.onnx"), "--data", IMAGES],
            3,
            "digits.npz",
        ),
    ],
)
def test_what_is_wrong_has_its_message_and_status(
    arguments: list[str],
    status: int,
    message: str,
    student: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad usage is 2, what doesn't fit is 3; no traceback, no file."""
    torch = pytest.importorskip("torch")
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert squeeze_cli(["distill", str(student), *arguments]) == status
    captured = capsys.readouterr().err
    assert message in captured
    assert "Traceback" not in captured
    assert [f.name for f in student.parent.iterdir()] == ["student.onnx"]


def test_json_page_and_output(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON document on stdout, quiet in a pipe, a page with the learning curve."""
    pytest.importorskip("torch")
    page = student.with_name("curve.html")
    capsys.readouterr()
    more = ("--epochs", "3", "--json", "--html", str(page))
    assert squeeze_cli(_arguments(student, *more)) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["schema"] == 1
    assert document["output"] == str(student.with_name("student.distilled.onnx"))
    assert [e["epoch"] for e in document["history"]] == [1, 1, 2]
    assert document["after"]["loss"] < document["before"]["loss"]
    assert document["history"][-1]["score"]["accuracy"] is not None
    assert captured.err == ""
    assert '"line": true' in page.read_text()
    assert sorted(f.name for f in student.parent.iterdir()) == [
        "curve.html",
        "student.distilled.onnx",
        "student.onnx",
    ]


def test_killed_and_resumed_writes_the_same_file(student: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle leaves no output; --resume ends in the same bytes."""
    pytest.importorskip("torch")
    out, whole = tmp_path / "out.onnx", tmp_path / "whole.onnx"
    assert squeeze_cli(_arguments(student, "--epochs", "4", "-o", str(whole))) == 0
    arguments = _arguments(student, "--epochs", "4", "-o", str(out))
    process = subprocess.Popen(
        [sys.executable, "-m", "squeeze", *arguments], stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "out.onnx.checkpoint"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(float(np.random.default_rng().uniform(0, 0.2)))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert squeeze_cli(arguments) == 2
    assert squeeze_cli([*arguments, "--resume"]) == 0
    assert not checkpoint.exists()
    assert _weights(out) == _weights(whole)


def _weights(path: Path) -> dict[str, bytes]:
    import onnx

    return {t.name: t.raw_data for t in onnx.load(path).graph.initializer}


def test_defaults_from_squeeze_toml(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model` of squeeze.toml is the teacher, `data.path` the data."""
    pytest.importorskip("torch")
    text = f'model = "{DIGITS}"\n[data]\npath = "{IMAGES}"\n[distill]\nepochs = 1\n'
    (tmp_path / "squeeze.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert squeeze_cli(["distill", str(student)]) == 0
    assert (tmp_path / "student.distilled.onnx").exists()


def test_networks_of_different_inputs_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A student that takes something else is told what, with status 3."""
    pytest.importorskip("torch")
    words = ["distill", str(SAMPLES / "adder_mlp.onnx"), "-o", str(tmp_path / "o.onnx")]
    words += ["--teacher", str(SAMPLES / "digits_cnn.onnx")]
    assert squeeze_cli([*words, "--data", str(SAMPLES / "digits.npz")]) == 3
    assert "input 'input' takes [2]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
