"""shrink: the target is kept, the mixture is no worse than its parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from squeeze.cli import cli
from squeeze.cli import run as squeeze_cli
from tests.builders import SAMPLES, run

MODEL = str(SAMPLES / "digits_cnn.onnx")
DATA = ["--data", str(SAMPLES / "digits.npz")]


def _shrink(out: Path, *words: str) -> dict:
    given = ["shrink", MODEL, *words, *DATA, "-o", str(out), "--no-bench", "--json"]
    result = CliRunner().invoke(cli, given)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", ["60%", "30%"])
def test_the_target_is_kept_and_the_network_works(target: str, tmp_path: Path) -> None:
    """MACs are at or under the target; digits it never saw are still told apart."""
    out = tmp_path / "out.onnx"
    report = _shrink(out, "--macs", target)
    share = float(target.rstrip("%")) / 100
    assert report["after"]["macs"] <= share * report["before"]["macs"]
    test = np.load(SAMPLES / "digits_test.npz")
    scores = run(out, x=test["x"])[0]
    assert (scores.argmax(1) == test["labels"]).mean() > 0.9


def test_the_mixture_is_judged_no_worse_than_its_parts(tmp_path: Path) -> None:
    """With every method to choose from, the judged error is the smallest."""

    def judged(methods: str) -> float:
        report = _shrink(tmp_path / "o.onnx", "--macs", "40%", "--with", methods)
        (note,) = [n for n in report["notes"] if n.startswith("output error by")]
        tried = note.split(": ", 1)[1].split("; kept")[0]
        return min(float(part.split(": ")[1]) for part in tried.split(", "))

    mixed = judged("prune,factorize,convert")
    assert mixed <= judged("prune") + 1e-9
    assert mixed <= judged("factorize") + 0.02


def test_every_layer_says_what_was_done(tmp_path: Path) -> None:
    """One line per layer, with the original's cost before."""
    report = _shrink(tmp_path / "o.onnx", "--macs", "40%")
    sites = [change["site"] for change in report["changes"]]
    assert sorted(sites) == ["conv1", "conv2", "conv3", "fc1"]
    assert all(c["applied"] or c["reason"] for c in report["changes"])


def test_layers_that_stay_are_refitted(tmp_path: Path) -> None:
    """What reads the cut layers is fitted to them, and its line and a note say so."""
    report = _shrink(tmp_path / "o.onnx", "--macs", "40%", "--with", "factorize")
    (last,) = [c for c in report["changes"] if c["site"] == "fc1"]
    assert not last["applied"]
    assert last["details"]["repair"] == "least squares"
    assert last["fit_error"] < last["details"]["error_before_refit"]
    assert "repaired by least squares: fc1" in report["notes"]
    left = ["--with", "factorize", "--skip", "fc1"]
    report = _shrink(tmp_path / "o.onnx", "--macs", "40%", *left)
    assert not any(note.startswith("repaired") for note in report["notes"])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--macs", "50%"], 2),  # no data
        (["--macs", "0.01%", *DATA], 3),
        (["--macs", "50%", "--with", "magic", *DATA], 2),
        (["--macs", "half", *DATA], 2),
    ],
)
def test_what_cannot_be_done(words: list[str], status: int, tmp_path: Path) -> None:
    """No data, an unreachable target, an unknown method: nothing is written."""
    out = tmp_path / "out.onnx"
    assert squeeze_cli(["shrink", MODEL, *words, "-o", str(out)]) == status
    assert not out.exists()
