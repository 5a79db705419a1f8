"""squeeze check: statuses, levels, flags and files, over real subprocesses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import click
import onnx
import pytest
from onnx import TensorProto, helper

from squeeze.budget.advice import COMMANDS, Case, remedy
from squeeze.budget.subject import Costs, LayerCosts
from squeeze.cli import cli, run
from tests.builders import SAMPLES

CIFAR = SAMPLES / "cifar10_cnn.onnx"  # 39,559,168 MACs, 411,786 parameters
DIGITS = SAMPLES / "digits_cnn.onnx"


def _unknown_op(path: Path, op: str = "Mystery") -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node(op, ["x"], ["m"], name="odd", domain="me"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 8])],
        [value("y", TensorProto.FLOAT, [1, 8])],
        value_info=[value("m", TensorProto.FLOAT, [1, 8])],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("me", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)


def _dynamic(path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [value("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, ir_version=8), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a baseline that the rows below name."""
    place = tmp_path_factory.mktemp("gate")
    for file in (CIFAR, DIGITS, SAMPLES / "digits_test.npz"):
        (place / file.name).symlink_to(file)
    _unknown_op(place / "unknown.onnx")
    _dynamic(place / "dynamic.onnx")
    (place / "text.onnx").write_text("hello\n")
    table = '[[check]]\nmodel = "cifar10_cnn.onnx"\nbaseline = "base.json"\n'
    (place / "base.toml").write_text(table + "macs = { max_increase = '0%' }\n")
    _squeeze(place, "--budget", "base.toml", "--update-baseline")
    return place


def _squeeze(
    place: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    return subprocess.run(
        [sys.executable, "-m", "squeeze", "check", *arguments],
        cwd=place,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# what a check holds → (exit status, statuses of its results)
ROWS: dict[str, tuple[str, int, list[str]]] = {
    "within": ('model="cifar*.onnx"\nmacs={max="39559168"}', 0, ["within"]),
    "over by one": ('model="cifar*.onnx"\nmacs={max=39559167}', 1, ["over"]),
    "over, warned": (
        'model="cifar*.onnx"\nmacs={max="1M", level="warn"}',
        0,
        ["over"],
    ),
    "unknown op": ('model="unknown.onnx"\nmacs={max="1G"}', 3, ["unmeasured"]),
    "unknown op, warned": (
        'model="unknown.onnx"\nmacs={max="1G", level="warn"}',
        0,
        ["unmeasured"],
    ),
    "unknown op, ignored": (
        'model="unknown.onnx"\nignore_ops=["me::Mystery"]\nmacs={max="1G"}',
        0,
        ["within"],
    ),
    "unknown op, its file size": (
        'model="unknown.onnx"\nfile_size={max="1MB"}',
        0,
        ["within"],
    ),
    "dynamic shape": ('model="dynamic.onnx"\nmacs={max="1G"}', 3, ["unmeasured"]),
    "dynamic shape, told": (
        'model="dynamic.onnx"\ninput_shape=[1,3,8,8]\nmacs={max="1G"}',
        0,
        ["within"],
    ),
    "not measured beats over": (
        'model=["unknown.onnx","cifar10_cnn.onnx"]\nmacs={max="1M"}',
        3,
        ["unmeasured", "over"],
    ),
    "no model": ('model="text.onnx"\nmacs={max="1G"}', 3, ["unmeasured"]),
    "missing data": (
        'model="digits_cnn.onnx"\naccuracy={min="90%",data="none.npz"}',
        3,
        ["unmeasured"],
    ),
    "no data named": (
        'model="digits_cnn.onnx"\naccuracy={min="90%"}',
        3,
        ["unmeasured"],
    ),
    "missing data, warned": (
        'model="digits_cnn.onnx"\naccuracy={min="90%",data="none.npz",level="warn"}',
        0,
        ["unmeasured"],
    ),
    "accuracy": (
        'model="digits_cnn.onnx"\naccuracy={min="90%",data="digits_test.npz"}',
        0,
        ["within"],
    ),
    "accuracy too low": (
        'model="digits_cnn.onnx"\naccuracy={min="99.9%",data="digits_test.npz"}',
        1,
        ["over"],
    ),
    "agreement with itself": (
        'model="digits_cnn.onnx"\nagreement={min="100%",data="digits_test.npz",'
        'reference="digits_cnn.onnx"}',
        0,
        ["within"],
    ),
    "missing reference, warned by default": (
        'model="digits_cnn.onnx"\nlatency={max_increase="10%",reference="no.onnx"}',
        0,
        ["unmeasured"],
    ),
    "missing reference, an error": (
        'model="digits_cnn.onnx"\n'
        'latency={max_increase="10%",reference="no.onnx",level="error"}',
        3,
        ["unmeasured"],
    ),
    "its own baseline": (
        'model="cifar10_cnn.onnx"\nbaseline="base.json"\nmacs={max_increase="0%"}',
        0,
        ["within"],
    ),
    "a model as the baseline": (
        'model="cifar10_cnn.onnx"\nbaseline="digits_cnn.onnx"\n'
        'macs={max_increase="10%"}',
        1,
        ["over"],
    ),
    "a model that the baseline lacks": (
        'model="digits_cnn.onnx"\nbaseline="base.json"\nmacs={max_increase="0%"}',
        3,
        ["unmeasured"],
    ),
    "missing baseline": (
        'model="digits_cnn.onnx"\nbaseline="no.json"\nmacs={max_increase="0%"}',
        2,
        [],
    ),
    "a glob that matches nothing": ('model="no*.onnx"\nmacs={max="1G"}', 2, []),
    "a missing model": ('model="no.onnx"\nmacs={max="1G"}', 2, []),
    "an unknown key": ('model="cifar*.onnx"\nmax={macs="1G"}', 2, []),
    "an unknown unit": ('model="cifar*.onnx"\nmacs={max="1m"}', 2, []),
    "a check that limits nothing": ('model="cifar*.onnx"', 2, []),
    "a layer over": (
        'model="cifar*.onnx"\n[[check.layer]]\nmatch="conv*"\nmacs={max="10M"}',
        1,
        ["over", "over"],
    ),
    "layers of an op within": (
        'model="cifar*.onnx"\n[[check.layer]]\nop="Gemm"\nmacs={max="10M"}',
        0,
        ["within"],
    ),
    "a layer that isn't there": (
        'model="cifar*.onnx"\n[[check.layer]]\nmatch="head*"\nmacs={max="10M"}',
        3,
        ["unmeasured"],
    ),
    "a layer of unknown cost": (
        'model="unknown.onnx"\n[[check.layer]]\nmatch="odd"\nmacs={max="10M"}',
        3,
        ["unmeasured"],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_status_and_level(row: str, folder: Path) -> None:
    """Each status and level, as a user's process sees it."""
    check, status, expected = ROWS[row]
    file = folder / f"{row.replace(' ', '-')}.toml"
    file.write_text(f"[[check]]\n{check}\n")
    done = _squeeze(folder, "--budget", file.name, "--json")
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if status == 2:
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        return
    document = json.loads(done.stdout)
    assert [r["status"] for r in document["results"]] == expected
    assert document["passed"] is (status == 0)
    assert document["status"] == status
    failing = [r for r in document["results"] if not r["passed"]]
    assert all(r["reason"] for r in failing)


def test_interrupted_is_never_1(folder: Path) -> None:
    """Ctrl-C while latency is measured ends in 130."""
    (folder / "slow.toml").write_text(
        '[[check]]\nmodel="cifar10_cnn.onnx"\n'
        'latency={max_increase="0.001%",reference="cifar10_cnn.onnx",seconds=60}\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(SAMPLES.parent)}
    code = (
        "import signal, sys, time, squeeze.budget.ratio as r\n"
        "from squeeze.cli import run\n"
        # a shell's background jobs inherit that it is ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "r.measure = lambda *a: (print('started', flush=True), time.sleep(60))\n"
        "sys.exit(run(['check', '--budget', 'slow.toml']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_crash_is_never_1(debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours ends in 70, with or without its traceback."""
    monkeypatch.setenv("SQUEEZE_DEBUG", debug)
    monkeypatch.setattr("squeeze.budget.gate.run", lambda *a: 1 / 0)
    assert run(["check", str(CIFAR), "--max-macs", "1G"]) == 70


def test_a_reader_that_went_away_keeps_the_verdict(folder: Path) -> None:
    """`squeeze check | head -1` of a model over budget still fails."""
    command = f"'{sys.executable}' -m squeeze check cifar10_cnn.onnx --max-macs 1M"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["--max-macs", "600M"], 0),
        (["--max-macs", "1M"], 1),
        (["--max-params", "5M", "--max-file-size", "1kB"], 1),
        (["--max-peak-memory", "512KiB"], 0),
        (["--max-macs", "600m"], 2),
        (["--max-macs-increase", "0%", "--baseline", str(CIFAR)], 0),
        (["--max-macs-increase", "0%"], 2),
        (["--budget", "x.toml", "--max-macs", "1M"], 2),
        ([], 2),
        (["--baseline", str(CIFAR)], 2),
        (["--min-accuracy", "5%"], 3),
    ],
)
def test_limits_as_options_need_no_file(
    flags: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--max-macs and friends work in a folder without a configuration."""
    monkeypatch.chdir(tmp_path)
    assert run(["check", str(CIFAR), *flags]) == status
    if status == 2:
        assert capsys.readouterr().err.startswith("squeeze: ")


def test_pyproject_and_models_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[[tool.squeeze.check]] is read; models narrow the run; strangers are refused."""
    monkeypatch.chdir(tmp_path)
    for file in (CIFAR, DIGITS):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "pyproject.toml").write_text(
        '[[tool.squeeze.check]]\nmodel = "*_cnn.onnx"\nmacs = { max = "1M" }\n'
    )
    assert run(["check"]) == 1
    capsys.readouterr()
    assert run(["check", "digits_cnn.onnx", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 1
    (tmp_path / "other.onnx").symlink_to(DIGITS)
    (tmp_path / "stranger.txt").write_text("")
    assert run(["check", "stranger.txt"]) == 2
    assert "no check of pyproject.toml holds this model" in capsys.readouterr().err


def test_init_proposes_limits_that_pass_and_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--init writes limits 5 % above today: they pass now, and not 10 % lower."""
    monkeypatch.chdir(tmp_path)
    for file in (CIFAR, DIGITS):
        (tmp_path / file.name).symlink_to(file)
    _dynamic(tmp_path / "dynamic.onnx")
    assert run(["check", "--init"]) == 0
    text = (tmp_path / "squeeze.toml").read_text()
    assert text.startswith("# Budgets")
    assert 'macs = { max = "41.6M" }  # today 39.56 M' in text
    assert "# macs: input 'x' has a dynamic size" in text
    assert run(["check"]) == 0
    (tmp_path / "squeeze.toml").write_text(text.replace('"41.6M"', '"37M"'))
    assert run(["check"]) == 1
    assert run(["check", "--init"]) == 2  # it has checks already
    assert "has checks already" in capsys.readouterr().err


def test_update_baseline_is_stable_and_reviewable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same bytes; one line per layer; --why names the layer that grew."""
    monkeypatch.chdir(tmp_path)
    for file in (CIFAR, DIGITS):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "squeeze.toml").write_text(
        '[[check]]\nmodel = "*_cnn.onnx"\nbaseline = "b.json"\n'
        'macs = { max_increase = "0%" }\n'
    )
    baseline = tmp_path / "b.json"
    assert run(["check", "--update-baseline"]) == 0
    first = baseline.read_bytes()
    assert run(["check", "--update-baseline"]) == 0
    assert baseline.read_bytes() == first
    assert run(["check"]) == 0
    document = json.loads(first)
    layers = document["models"]["cifar10_cnn.onnx"]["layers"]
    assert list(layers) == sorted(layers)
    lines = [one for one in first.decode().splitlines() if '"conv2"' in one]
    assert len(lines) == 2  # of two models
    document["models"]["cifar10_cnn.onnx"]["layers"]["conv2"]["macs"] -= 1000
    document["models"]["cifar10_cnn.onnx"]["macs"] -= 1000
    del document["models"]["cifar10_cnn.onnx"]["layers"]["relu3"]
    document["models"]["gone.onnx"] = document["models"].pop("digits_cnn.onnx")
    baseline.write_text(json.dumps(document))
    capsys.readouterr()
    assert run(["check", "--why", "--json"]) == 3  # digits is new: not comparable
    found = json.loads(capsys.readouterr().out)
    kinds = {c["model"]: c["kind"] for c in found["changes"]}
    assert kinds == {
        "cifar10_cnn.onnx": "changed",
        "digits_cnn.onnx": "new",
        "gone.onnx": "removed",
    }
    changed = next(c for c in found["changes"] if c["kind"] == "changed")
    assert [(x["layer"], x["kind"]) for x in changed["layers"]] == [
        ("conv2", "changed"),
        ("relu3", "new"),
    ]
    assert run(["check", "--why"]) == 3
    shown = capsys.readouterr().out
    assert "layers that changed" in shown
    assert "+1 k" in shown


@pytest.mark.parametrize("metric", sorted(COMMANDS))
def test_every_remedy_is_a_command_with_these_options(metric: str) -> None:
    """What a failure tells the user to run is there, with the options it names."""
    costs = Costs({}, {"fc": LayerCosts("Gemm", {metric: 1, "params": 1})})
    shaped = replace(costs, input_shapes={"x": (1, 3, 8, 8)})
    case = Case("m.onnx", shaped, Fraction(1, 2), "d.npz", "r.onnx")
    words = remedy(metric, case).split()
    assert words[0] == "squeeze"
    if words[1] not in cli.list_commands(click.Context(cli)):
        pytest.skip(f"this version has no command {words[1]!r}")
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    known = {name for p in command.params for name in p.opts}
    assert {w for w in words if w.startswith("--")} <= known
