"""Columns that follow from others: what a convolution gives, from what it reads.

Their sums and products are linear in those of the inputs, so they are computed once at
the end instead of being taken out of every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.wanted import Columns, Window
from squeeze.model import constant

Array = np.ndarray


@dataclass(frozen=True)
class Linear:
    """Columns y = weight · x + bias of the request's columns number `source`.

    weight (O, D), bias (O,), in float64.
    """

    source: int
    weight: Array
    bias: Array


def linear_columns(
    columns: Sequence[Columns], values: Sequence[Mapping[str, ir.Value]]
) -> dict[int, Linear]:
    """The columns that a dense convolution gives from others of the same request.

    `values` are the graph's by name, per model.
    """
    found = {}
    for index, one in enumerate(columns):
        node = values[one.model][one.value].producer()
        if one.window or one.axis != 1 or node is None or node.op_type != "Conv":
            continue
        arrays = [constant(node, i) for i in range(1, len(node.inputs))]
        if node.attributes.get_int("group", 1) != 1 or any(a is None for a in arrays):
            continue
        weight = np.asarray(arrays[0], np.float64)
        bias = np.zeros(len(weight)) if len(arrays) == 1 else arrays[1]
        window = Window.of(node, weight.shape[2:])
        for source, other in enumerate(columns):
            value = values[other.model][other.value]
            if other.window == window and value is node.inputs[0]:
                matrix = weight.reshape(len(weight), -1)
                found[index] = Linear(source, matrix, np.asarray(bias, np.float64))
    return found


@dataclass(frozen=True)
class Layout:
    """Where a request's columns come from: slices of those that are there, or Linear.

    A `Linear`'s source is never one itself: it has a window.
    """

    parts: tuple[slice | Linear, ...]

    @property
    def plain(self) -> bool:
        return not any(isinstance(part, Linear) for part in self.parts)

    def sums(self, count: int, total: Array) -> Array:
        """(D',) sums of all columns from those that are there, (D,)."""
        return np.ravel(self._apply(total[None], np.array([count])))

    def products(self, count: int, total: Array, product: Array) -> Array:
        """(D', D') products of all columns from those that are there, (D, D)."""
        half = self._apply(product, total)  # columns are whole, rows are not
        return self._apply(half.T, self.sums(count, total))

    def rows(self, rows: Array) -> Array:
        """(R, D') from (R, D)."""
        return self._apply(rows, np.ones(len(rows), rows.dtype))

    def _apply(self, matrix: Array, ones: Array) -> Array:
        """Columns appended: (R, D) → (R, D'); `ones` (R,) is what biases go with."""
        made = []
        for part in self.parts:
            if isinstance(part, slice):
                made.append(matrix[:, part])
                continue
            source = self.parts[part.source]
            assert isinstance(source, slice)
            weight, bias = (a.astype(matrix.dtype) for a in (part.weight, part.bias))
            made.append(matrix[:, source] @ weight.T + np.outer(ones, bias))
        return np.concatenate(made, axis=1)
