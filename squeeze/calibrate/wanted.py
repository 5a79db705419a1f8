"""What statistics can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

Array = np.ndarray


@dataclass(frozen=True)
class Window:
    """What a convolution reads: per spatial axis; pads are (begins…, ends…)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, kernel: Sequence[int]) -> Window:
        """The window of a Conv node whose pads are explicit."""
        axes = len(kernel)
        ints = node.attributes.get_ints
        return cls(
            tuple(kernel),
            tuple(ints("strides", ()) or (1,) * axes),
            tuple(ints("pads", ()) or (0,) * (2 * axes)),
            tuple(ints("dilations", ()) or (1,) * axes),
        )

    @property
    def padded(self) -> bool:
        """Whether taps may lie outside of the input."""
        return any(self.pads)

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Output size for a spatial input size."""
        axes = len(self.kernel)
        return tuple(
            (n + self.pads[a] + self.pads[a + axes] - self._reach(a)) // self.strides[a]
            + 1
            for a, n in enumerate(size)
        )

    def _reach(self, axis: int) -> int:
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1

    def taps(self, positions: Array, size: Sequence[int]) -> tuple[Array, Array]:
        """Flat input indices (…, K) that output `positions` read, and which are inside.

        A tap in the padding has index 0 and is not inside.
        """
        where = np.unravel_index(positions, self.grid(size))
        steps = np.unravel_index(np.arange(prod(self.kernel)), self.kernel)
        flat = np.zeros((*positions.shape, prod(self.kernel)), np.int64)
        inside = np.ones(flat.shape, bool)
        for axis, n in enumerate(size):
            at = where[axis][..., None] * self.strides[axis] - self.pads[axis]
            at = at + steps[axis] * self.dilations[axis]
            inside &= (at >= 0) & (at < n)
            flat = flat * n + at
        return np.where(inside, flat, 0), inside


@dataclass(frozen=True)
class Columns:
    """Columns of a row matrix: the channels of a value at a position.

    `axis` 1 is (N, C, *spatial), -1 is (…, C). With a `window` the columns are the
    im2col inputs (C, *kernel) of a convolution on the value, and positions are that
    convolution's outputs. `model` counts the collector's models.
    """

    value: str
    axis: int = 1
    window: Window | None = None
    model: int = 0


@dataclass(frozen=True)
class Products:
    """Wanted: sums and Gram matrix of columns side by side, at sampled positions.

    `keep` asks for the rows themselves as well, of that many samples at most.
    """

    columns: tuple[Columns, ...]
    keep: int = 0


@dataclass(frozen=True)
class Moments:
    """Wanted: per channel, over every position: sums of these kinds.

    "sum" · "square" · "positive" (how many are > 0).
    """

    value: str
    axis: int = 1
    kinds: tuple[str, ...] = ("sum", "square", "positive")
    model: int = 0


Wanted = Products | Moments
