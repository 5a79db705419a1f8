"""What training asks of the machine: to keep freed memory, and how many threads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 2**31 - 1
SMALL_STEP = 5e8  # multiply-accumulates


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


@contextmanager
def suited_threads(macs: float) -> Iterator[None]:
    """While open, PyTorch works in one thread where a step is small.

    `macs` are the teacher's for a batch. Below half a billion two threads wait for each
    other longer than they save (digits_cnn, 4e7: 1.6 times the time; 3.6e8: 1.15 times;
    1.3e9: 0.95 times; cifar10_cnn, 5e9: 0.7 times).
    """
    before = torch.get_num_threads()
    if macs < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
