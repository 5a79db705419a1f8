"""`--distill` of the commands that rewrite, and training between prune's rounds."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from squeeze.cli import run as squeeze_cli
from tests.builders import SAMPLES, run

DIGITS = str(SAMPLES / "digits_cnn.onnx")
IMAGES = str(SAMPLES / "digits.npz")
TEST = str(SAMPLES / "digits_test.npz")
DATA = ["--data", IMAGES, "--samples", "64"]
CONVERT = ["convert", DIGITS, "--to", "effnet"]


def _json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert squeeze_cli([*arguments, "--no-bench", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "command",
    [
        CONVERT,
        ["prune", DIGITS, "--macs", "40%"],
        ["width", DIGITS, "--multiplier", "0.5"],
        ["factorize", DIGITS, "--macs", "50%"],
        ["shrink", DIGITS, "--macs", "50%", "--with", "factorize"],
    ],
    ids=lambda c: c[0],
)
def test_one_line_from_model_to_trained_result(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is the trained model, and what is reported is measured on it."""
    pytest.importorskip("torch")
    plain, trained = tmp_path / "plain.onnx", tmp_path / "trained.onnx"
    settings = ["--train", "epochs=3", "--train", "no-augment"]
    before = _json([*command, *DATA, "-o", str(plain)], capsys)
    after = _json([*command, *DATA, "-o", str(trained), "--distill", *settings], capsys)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["plain.onnx", "trained.onnx"]
    assert before["distilled"] is None
    learnt = after["distilled"]
    assert len(learnt["history"]) == 3
    assert learnt["after"]["loss"] < learnt["before"]["loss"]
    assert after["after"]["macs"] == before["after"]["macs"]
    with np.load(IMAGES) as images:
        held = images["x"][-learnt["held_out"] :]
    teacher, student = (run(Path(m), x=held)[0] for m in (DIGITS, trained))
    measured = after["fidelity"]["agreement"]
    assert measured == np.mean(teacher.argmax(1) == student.argmax(1))
    assert after["fidelity"]["samples"] == learnt["held_out"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--distill"], "pass --data"),
        ([*DATA, "--train", "epochs=3"], "goes with --distill"),
        ([*DATA, "--distill", "--dry-run"], "--dry-run writes nothing"),
        ([*DATA, "--distill", "--train", "epoch=3"], "--epochs"),
        ([*DATA, "--distill", "--train", "epochs=none"], "'none' is not a valid"),
        ([*DATA, "--distill", "--train", "label-weight=1"], "the data has no labels"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 2 with the remedy; what the command line shows is refused before work."""
    pytest.importorskip("torch")
    out = tmp_path / "out.onnx"
    bare = {"x": np.load(IMAGES)["x"]}
    np.savez(tmp_path / "bare.npz", **bare)
    more = [str(tmp_path / "bare.npz") if m == IMAGES else m for m in more]
    status = squeeze_cli([*CONVERT, *more, "--no-bench", "-o", str(out)])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    if "labels" in message:  # found by the training: what it starts from is there
        assert "is written, but not trained" in error
        assert status == 3
        assert run(out, x=bare["x"][:2])[0].shape == (2, 10)
    else:
        assert status == 2
        assert not out.exists()


def test_nothing_changed_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every site is refused there is nothing to recover."""
    pytest.importorskip("torch")
    out = ["-o", str(tmp_path / "out.onnx")]
    document = _json([*CONVERT, "--skip", "*", *DATA, "--distill", *out], capsys)
    assert document["distilled"] is None
    assert "not trained: nothing was changed" in document["notes"]


def test_killed_while_training_goes_on_as_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fitted model and a checkpoint remain; the same command names the way on."""
    pytest.importorskip("torch")
    out = tmp_path / "out.onnx"
    words = [*CONVERT, *DATA, "--no-bench", "-o", str(out), "--distill"]
    words += ["--train", "epochs=6", "--train", "batch=16"]
    words += ["--input-shape", "input:1,1,8,8"]
    command = [sys.executable, "-m", "squeeze", *words]
    checkpoint = tmp_path / "out.onnx.checkpoint"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    x = np.load(TEST)["x"]
    untrained = run(out, x=x)[0]
    assert squeeze_cli(words) == 2
    error = capsys.readouterr().err
    way = error.split("`")[1]
    assert way.startswith(f"squeeze distill {out} ")
    assert squeeze_cli(shlex.split(way)[1:]) == 0
    assert not checkpoint.exists()
    assert not np.array_equal(run(out, x=x)[0], untrained)


def test_training_between_rounds_lets_more_units_die(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cycle of the thesis (§2.2.2): an adder of 1000 units needs very few."""
    pytest.importorskip("torch")
    out, data = tmp_path / "adder.onnx", str(SAMPLES / "adder.npz")
    document = _json(
        [
            *("prune", str(SAMPLES / "adder_mlp.onnx"), "--threshold", "0"),
            *("--data", data, "-o", str(out), "--rounds", "3", "--distill-between"),
            *("--train", "l1=0.1", "--train", "epochs=10"),
        ],
        capsys,
    )
    assert document["changes"][0]["details"]["channels"][1] < 50
    assert document["fidelity"]["relative_error"] < 0.02
    x = np.random.default_rng(1).random((200, 2), np.float32)
    assert np.abs(run(out, x=x)[0][:, 0] - x.sum(1)).mean() < 0.02


def test_training_between_rounds_that_finds_nothing_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that were distorted and trained in vain are not what is written."""
    pytest.importorskip("torch")
    out = tmp_path / "out.onnx"
    words = ["prune", DIGITS, "--threshold", "0", "--min-channels", "1000", *DATA]
    words += ["--rounds", "2", "--distill-between", "--distort", "0.1"]
    words += ["--train", "epochs=1", "--distill", "-o", str(out)]
    document = _json(words, capsys)
    counts = [c["details"].get("channels", [0, 0]) for c in document["changes"]]
    assert all(before == after for before, after in counts)
    x = np.load(TEST)["x"]
    np.testing.assert_allclose(run(out, x=x)[0], run(Path(DIGITS), x=x)[0], atol=1e-4)


def test_training_between_needs_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    """One round has no between: the message says what to add."""
    pytest.importorskip("torch")
    words = ["prune", DIGITS, "--macs", "50%", *DATA, "--distill-between"]
    assert squeeze_cli(words) == 2
    assert "--rounds" in capsys.readouterr().err
