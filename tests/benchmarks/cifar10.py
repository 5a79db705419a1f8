"""CIFAR-10 as the sample network was trained on it, and that network."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
FOLDER = ROOT.parent / "shared" / "data" / "cifar10"
MODEL = ROOT / "sample_models" / "cifar10_cnn.onnx"


def split(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images (N, 3, 32, 32) and labels of a split's archive of JPEGs."""
    sys.path.insert(0, str(ROOT / "sample_models"))
    from build import cifar_split

    x, labels = cifar_split(path)
    return x.numpy(), labels.numpy()
