"""How the C library keeps memory that a training step frees."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 2**31 - 1


@cache
def keep_freed() -> None:
    """Let freed blocks be used again instead of going back to the system.

    glibc gives large blocks back when they are freed, and the system clears the pages
    of the next one: a quarter of a training step on the CPU. Elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
