"""Batches for training: shuffled by seed, read ahead, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from squeeze.calibrate.data import Data
from squeeze.errors import SqueezeError
from squeeze.recover.check import as_input
from squeeze.recover.module import input_sizes, placed

CACHE_BYTES = 2 * 10**9  # data up to this size is read once and kept
CHUNK = 4096  # samples read together where data streams past,
CHUNK_BYTES = 2**28  # and less of large ones

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Fed:
    """Inputs by name on the device, and labels where there are any.

    `samples` are positions in the data. `view` tells pictures of a sample apart: with
    the same number they are the same. `again` says that an epoch showed this one.
    """

    inputs: Inputs
    labels: Tensor | None
    samples: Tensor | None = None
    view: int | None = None
    again: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def split(self, size: int) -> Iterator[Fed]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            labels, samples = (
                None if v is None else v[part] for v in (self.labels, self.samples)
            )
            inputs = {k: v[part] for k, v in self.inputs.items()}
            yield Fed(inputs, labels, samples, self.view, self.again)

    def to(self, device: torch.device) -> Fed:
        labels = None if self.labels is None else self.labels.to(device)
        inputs = {k: placed(v, device) for k, v in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, labels=labels)


class Feed:
    """Training samples, in an order that follows from the seed and the epoch alone.

    Small data is read once. Larger data is read in chunks of neighbouring samples:
    the order of chunks and the order inside each are shuffled.
    """

    def __init__(self, data: Data, batch: int, seed: int) -> None:
        self._data, self._seed = data, seed
        self.batch = min(batch, len(data))
        self._bytes = sample_bytes(data)
        small = self._bytes * len(data) <= CACHE_BYTES
        self._cached = self._read_all() if small else None
        self._chunk: tuple[int, Fed] | None = None

    def __len__(self) -> int:
        """Batches per epoch; the last incomplete one is left for another order."""
        return len(self._order(0))

    @property
    def labelled(self) -> bool:
        return read(self._data.take(np.arange(1))).labels is not None

    def _read_all(self) -> Fed:
        return read(self._data)

    def _order(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(chunk, positions in it) of every batch."""
        rng = np.random.default_rng((self._seed, epoch))
        size = len(self._data) if self._cached is not None else self._chunk_size()
        starts = np.arange(0, len(self._data), size)
        batches = []
        for chunk in rng.permutation(len(starts)):
            inside = rng.permutation(min(size, len(self._data) - starts[chunk]))
            whole = len(inside) // self.batch * self.batch
            batches += [
                (int(chunk), inside[i : i + self.batch])
                for i in range(0, whole, self.batch)
            ]
        return batches

    def _chunk_size(self) -> int:
        size = min(CHUNK, CHUNK_BYTES // self._bytes)
        return max(size // self.batch, 1) * self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Fed]:
        """The epoch's batches from the `start`-th on, each read while one trains."""
        order = self._order(epoch)[start:]
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._batch, *order[0]) if order else None
            for following in [*order[1:], None]:
                assert ahead is not None
                fed = ahead.result()
                ahead = pool.submit(self._batch, *following) if following else None
                yield fed

    def _batch(self, chunk: int, positions: np.ndarray) -> Fed:
        whole, first = self._cached, 0
        if whole is None:
            first = chunk * self._chunk_size()
            if self._chunk is None or self._chunk[0] != chunk:
                last = min(first + self._chunk_size(), len(self._data))
                self._chunk = None  # before the next is read: one in memory at a time
                self._chunk = (chunk, read(self._data.take(np.arange(first, last))))
            whole = self._chunk[1]
        index = torch.from_numpy(positions)
        labels = None if whole.labels is None else whole.labels[index]
        inputs = {k: v[index] for k, v in whole.inputs.items()}
        return Fed(inputs, labels, index + first)


def sample_bytes(data: Data) -> int:
    """Of one sample's inputs."""
    sizes = [np.prod(s.shape[1:], dtype=int) * s.dtype.itemsize for s in data.specs]
    return max(int(sum(sizes)), 1)


def feeds_for(model: ir.Model, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The inputs for onnxruntime: at the sizes and in the types that `model` takes."""
    types = {v.name: v.dtype for v in model.graph.inputs}
    sized = resized(inputs, input_sizes(model.graph))
    return {k: _as_type(v, types.get(k)) for k, v in sized.items()}


def _as_type(x: Tensor, kind: ir.DataType | None) -> np.ndarray:
    array: np.ndarray = x.contiguous().numpy()
    return array if kind is None else array.astype(kind.numpy())


def read(data: Data) -> Fed:
    """All samples of `data` in memory."""
    batches = list(data)
    inputs = {
        name: as_input(np.concatenate([b.inputs[name] for b in batches]))
        for name in batches[0].inputs
    }
    labels = [b.labels for b in batches if b.labels is not None]
    together = (
        torch.from_numpy(np.concatenate(labels))
        if len(labels) == len(batches)
        else None
    )
    return Fed(inputs, together)


# -- sizes --------------------------------------------------------------------------


def image_axes(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(channels, height, width) axes of an image input, None for anything else."""
    if len(shape) != 4 or min(shape) < 1:
        return None
    if shape[1] in (1, 3, 4):
        return 1, 2, 3
    return (3, 1, 2) if shape[3] in (1, 3, 4) else None


def resized(
    inputs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Inputs:
    """Images at another network's size, for students of a lower resolution."""
    result = {}
    for name, x in inputs.items():
        wanted, axes = shapes.get(name), image_axes(tuple(x.shape))
        if wanted is None or tuple(x.shape[1:]) == wanted[1:]:
            result[name] = x
            continue
        if axes is None or len(wanted) != x.ndim or wanted[axes[0]] != x.shape[axes[0]]:
            raise SqueezeError(
                f"input {name!r} takes {list(wanted[1:])}, the other network's takes "
                f"{list(x.shape[1:])}; only an image's height and width may differ"
            )
        c, h, w = axes
        image = x if c == 1 else x.permute(0, 3, 1, 2)
        size = (wanted[h], wanted[w])
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
        result[name] = image if c == 1 else image.permute(0, 2, 3, 1)
    return result
