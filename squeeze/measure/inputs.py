"""Inputs made up for models that come without data: seeded, of the right type."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from squeeze.errors import SqueezeError
from squeeze.session import Session

Feeds = dict[str, np.ndarray]

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def random_feeds(
    session: Session, shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> Feeds:
    """One batch for every input: normal floats, integers 0 and 1 (valid as indices)."""
    rng = np.random.default_rng(seed)
    return {
        i.name: _random(i.name, i.type, shapes.get(i.name), rng)
        for i in session.get_inputs()
    }


def _random(
    name: str, kind: str, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> np.ndarray:
    dtype = _TYPES.get(kind)
    if dtype is None or shape is None:
        raise SqueezeError(
            f"input {name!r} of type {kind} can't be made up; pass --data"
        )
    if np.dtype(dtype).kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
