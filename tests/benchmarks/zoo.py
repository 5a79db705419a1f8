"""The zoo's graphs with seeded random weights, filled once and kept."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ZOO = Path(__file__).parents[3] / "shared" / "zoo"
FILLED = Path(tempfile.gettempdir()) / "squeeze-zoo"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """--zoo FOLDER and model files, which every script over the zoo takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder of .onnx files")
    parser.add_argument("models", nargs="*", type=Path, help="files instead of the zoo")
    return parser


def paths(given: argparse.Namespace) -> list[Path]:
    """The models named, else the zoo's; filled where light.py lies beside them."""
    if given.models:
        return list(given.models)
    found = sorted(
        path for path in given.zoo.glob("*.onnx") if not path.stem.startswith("light_")
    )
    if not found:
        raise SystemExit(f"{given.zoo}: no .onnx files; pass --zoo")
    fill = given.zoo / "light.py"
    return [_filled(path, fill) for path in found] if fill.is_file() else found


def _filled(path: Path, fill: Path) -> Path:
    FILLED.mkdir(exist_ok=True)
    out = FILLED / path.name
    if not out.is_file():
        command = [sys.executable, str(fill), "fill", str(path), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out
