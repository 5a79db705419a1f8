"""Real graphs: the zoo's, with seeded random weights filled in once, and onnx's own.

The zoo is a folder of light .onnx files with `light.py`, which writes weights of the
recorded moments, and `published.jsonl`, torchvision's figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

ZOO = Path(__file__).parents[3] / "shared" / "zoo"
FILLED = Path(tempfile.gettempdir()) / "squeeze-zoo"
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """--zoo FOLDER and model files, which every script over the zoo takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder of .onnx files")
    parser.add_argument("models", nargs="*", type=Path, help="files instead of the zoo")
    return parser


def paths(given: argparse.Namespace) -> list[Path]:
    """The models named, else the zoo's."""
    return list(given.models) or filled(given.zoo)


def filled(zoo: Path, pattern: str = "*") -> list[Path]:
    """The zoo's graphs; with weights where light.py lies beside them."""
    found = sorted(
        path
        for path in zoo.glob(f"{pattern}.onnx")
        if not path.stem.startswith("light_")
    )
    if not found and pattern == "*":
        raise SystemExit(f"{zoo}: no .onnx files; pass --zoo")
    fill = zoo / "light.py"
    return [_filled(path, fill) for path in found] if fill.is_file() else found


def light(pattern: str = "*") -> list[Path]:
    """onnx's own light models."""
    return sorted(LIGHT.glob(f"{pattern}.onnx"))


def _filled(path: Path, fill: Path) -> Path:
    FILLED.mkdir(exist_ok=True)
    out = FILLED / path.name
    if not out.is_file():
        command = [sys.executable, str(fill), "fill", str(path), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def published(zoo: Path) -> dict[str, dict[str, Any]]:
    """torchvision's GMACs and parameters by model name."""
    lines = (zoo / "published.jsonl").read_text().splitlines()
    return {(row := json.loads(line))["model"]: row for line in lines}
