"""HTML pages: self-contained, with the JSON's figures, drawn by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from squeeze.cli import cli
from tests.builders import SAMPLES

CIFAR = str(SAMPLES / "cifar10_cnn.onnx")
DIGITS = str(SAMPLES / "digits_cnn.onnx")
DRY = ["--dry-run", "--no-simplify"]
DATA = ["--data", str(SAMPLES / "digits.npz"), "--samples", "64"]
TORCH = find_spec("torch") is not None
RES = ["--multiplier", "0.5", "--adapt", "pool"]
CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Pages by command, each with what --json prints in the same run."""
    folder = tmp_path_factory.mktemp("pages")
    out = str(folder / "new.onnx")
    commands = {
        "convert": ["convert", CIFAR, "--to", "effnet", "-o", out, "--no-bench"],
        "profile": ["profile", CIFAR, "--device", "cortex-m7"],
        "compare": ["compare", CIFAR, out, CIFAR, "--layers"],
        "bench": ["bench", CIFAR, out, "--runs", "20", "--threads", "1"],
        "layers": ["bench", CIFAR, "--layers", "--runs", "5", "--threads", "1"],
        "width": ["width", CIFAR, "--multiplier", "0.5", *DRY],
        "resolution": ["resolution", CIFAR, *RES, *DRY],
        "factorize": ["factorize", DIGITS, "--macs", "70%", *DRY],
        "prune": ["prune", DIGITS, "--macs", "70%", *DRY],
        "shrink": ["shrink", DIGITS, "--macs", "70%", *DATA, *DRY],
        "check": ["check", CIFAR, "--max-macs", "1G"],
        "rules": ["rules"],
        "block": ["rules", "effnet"],
        "device": ["rules", "cortex-m7"],
    }
    if TORCH:
        small = str(folder / "small.onnx")
        _run("width", DIGITS, "--multiplier", "0.5", "--no-bench", "-o", small)
        commands["distill"] = ["distill", small, "--teacher", DIGITS, *DATA[:2]]
        commands["distill"] += ["--epochs", "1"]
    return {
        name: (
            folder / f"{name}.html",
            _run(*given, "--json", "--html", str(folder / f"{name}.html")),
        )
        for name, given in commands.items()
    }


DRAWN = ["convert", "profile", "compare", "bench", "layers", "width"]
PLAIN = ["resolution", "factorize", "prune", "shrink", "check", "rules", "block"]
COMMANDS = [*DRAWN, *PLAIN, "device", *(["distill"] if TORCH else [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_holds_the_documents_figures(
    name: str, written: dict[str, tuple[Path, str]]
) -> None:
    """What the page draws from is what --json printed, figure by figure."""
    path, printed = written[name]
    text = path.read_text(encoding="utf-8")
    inside = re.search(
        r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S
    )
    assert inside is not None
    document, shown = json.loads(printed), json.loads(inside[1])
    assert {key: shown[key] for key in document} == document
    for key, value in re.findall(r'data-key="(\w+)" data-value="([^"]*)"', text):
        totals = document.get("after") or document
        if key in totals:
            assert str(totals[key]) == value


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_asks_nobody_for_anything(
    name: str, written: dict[str, tuple[Path, str]]
) -> None:
    """No address outside the page, and a policy that forbids one."""
    text = written[name][0].read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert links == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_draws_it(
    name: str, width: int, written: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """The scripts run: bars or points appear, one per layer or model, and no error."""
    assert CHROMIUM is not None
    path, printed = written[name]
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path}",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Uncaught" not in done.stderr
    document = json.loads(printed)
    rows = len(re.findall(r'class="row"', done.stdout))
    if name == "profile":
        assert rows == len(document["layers"])
    elif name in ("convert", "width"):
        assert done.stdout.count('<i class="after"') == rows
        assert rows == sum(c["before"] is not None for c in document["changes"])
    elif name == "layers":
        assert rows == len(document["models"][0]["layers"])
    elif name == "compare":
        assert rows == len(document["models"][0]["layers"])
        assert done.stdout.count("<circle") == 1 + len(document["models"])
    else:
        assert done.stdout.count("<circle") == len(document["models"])


def test_every_reporting_command_writes_pages_and_markdown() -> None:
    """--html and --markdown are there wherever --json is."""
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        names = {option.name for option in command.params}
        assert "as_json" not in names or {"html", "as_markdown"} <= names, name
