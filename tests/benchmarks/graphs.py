"""Where the real graphs are: the zoo's, filled with random weights, and onnx's own.

The zoo is a folder of light .onnx files with `light.py`, which writes weights of the
recorded moments, and `published.jsonl`, torchvision's figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def filled(zoo: Path, folder: Path, pattern: str = "*") -> list[Path]:
    """The zoo's graphs with weights, written into `folder`, and onnx's light models."""
    made = []
    for path in sorted(zoo.glob(f"{pattern}.onnx")):
        target = folder / path.name
        if not target.exists():
            command = [sys.executable, str(zoo / "light.py"), "fill"]
            subprocess.run([*command, str(path), str(target)], check=True)
        made.append(target)
    return made + sorted(LIGHT.glob(f"{pattern}.onnx"))


def published(zoo: Path) -> dict[str, dict[str, Any]]:
    """torchvision's GMACs and parameters by model name."""
    lines = (zoo / "published.jsonl").read_text().splitlines()
    return {(row := json.loads(line))["model"]: row for line in lines}
