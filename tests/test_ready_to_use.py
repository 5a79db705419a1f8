"""What projects plug in: the action, the hook, and the sample models' own budget."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from squeeze.cli import run
from tests.builders import SAMPLES

ROOT = SAMPLES.parent


def test_the_sample_models_keep_their_budget() -> None:
    """What CI runs: the committed baseline fits the committed models."""
    assert run(["check", "--budget", str(SAMPLES / "squeeze.toml")]) == 0


@pytest.mark.parametrize(
    ("limit", "status", "passed"), [("1G", 0, "true"), ("1M", 1, "false")]
)
def test_the_action_ends_in_the_status_of_the_gate(
    limit: str, status: int, passed: str, tmp_path: Path
) -> None:
    """Its script hands on status and reports; a model's name with blanks is one."""
    (tmp_path / "my net.onnx").symlink_to(SAMPLES / "cifar10_cnn.onnx")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "squeeze"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m squeeze "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "SQUEEZE_MODELS": "my net.onnx\n",
        "SQUEEZE_ARGS": f"--max-macs {limit}",
        "SQUEEZE_BUDGET": "",
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    script = ROOT / ".github" / "squeeze-check.sh"
    done = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    outputs = dict(
        line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines()
    )
    assert outputs["passed"] == passed
    assert Path(outputs["report"]).read_text("utf-8").startswith("<!-- squeeze-check")
    assert Path(outputs["json"]).read_text("utf-8").startswith("{")


def test_the_action_runs_no_input_as_a_command() -> None:
    """Inputs reach the shell as variables only; every input named is declared."""
    text = (ROOT / "action.yml").read_text("utf-8")
    declared = {*re.findall(r"^  ([\w-]+):$", text.split("outputs:")[0], re.MULTILINE)}
    assert {*re.findall(r"inputs\.([\w-]+)", text)} <= declared
    for line in text.splitlines():
        if line.strip().startswith("run:"):
            assert "${{" not in line
