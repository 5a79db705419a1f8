"""How many channels this machine computes at once."""

from __future__ import annotations

import platform
from pathlib import Path

AVX512, AVX2, NEON = 16, 8, 4
_FLAGS = Path("/proc/cpuinfo")


def vector_floats() -> int:
    """float32 lanes of the widest vectors: counts that aren't multiples waste them."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return NEON
    if _FLAGS.is_file() and "avx512f" in _FLAGS.read_text(encoding="utf-8"):
        return AVX512
    return AVX2
