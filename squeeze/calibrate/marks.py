"""Marks of samples: random numbers that follow from a sample's bytes and nothing else.

What is drawn by them depends on neither the order nor the batching of the data.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from squeeze.calibrate.data import Batch

Array = np.ndarray
WORD = 8  # bytes that are hashed as one number
STEP = np.uint64(0x9E3779B97F4A7C15)  # of the generator's counter
MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shifts and factors


def marks(batch: Batch, seed: int) -> Array:
    """(N,) in uint64: a hash of each sample's inputs.

    Each input is a sum of its 64-bit words times random factors, modulo 2⁶⁴
    (multilinear hashing: Carter and Wegman 1979), which one product of a matrix with a
    vector finds for the whole batch.
    """
    total = np.full(len(batch), seed % 2**64, np.uint64)
    for name in sorted(batch.inputs):
        words = _words(batch.inputs[name])
        total = _mixed(total + STEP) + words @ _factors(words.shape[1])
    return _mixed(total)


def uniform(marked: Array, count: int) -> Array:
    """(N, count) numbers in [0, 1) for N marks: SplitMix64 (Steele et al. 2014)."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * STEP
    return np.asarray((_mixed(marked[:, None] + steps) >> np.uint64(11)) * 2.0**-53)


def _mixed(numbers: Array) -> Array:
    """Every bit of a number depends on all of its bits."""
    for shift, factor in MIXERS:
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(numbers ^ (numbers >> np.uint64(31)))


def _words(values: Array) -> Array:
    """(N, words) in uint64: the bytes of each sample, filled up with zeros."""
    count = len(values)
    size = values.nbytes // count
    found = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(count, size)
    if rest := size % WORD:
        found = np.pad(found, ((0, 0), (0, WORD - rest)))
    return found.view(np.uint64)


@lru_cache(maxsize=8)
def _factors(count: int) -> Array:
    """The same random odd numbers every time."""
    drawn = np.random.default_rng(count).integers(0, 2**64, count, np.uint64)
    return np.asarray(drawn | np.uint64(1))
