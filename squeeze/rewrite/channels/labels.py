"""Channel labels: a vectorised union-find, and the reasons why some may not go.

A label is an integer. Positive labels are channels, joined into units by `unite`.
Labels of 0 and below are pinned: 0 belongs to an axis that has no channels (space,
batch, tokens), −k carries reason k. Pinned labels never join anything; what is united
with one is protected with its reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PLAIN = "coupled with an axis that can't shrink"


class Labels:
    """Labels, the units they form, and what protects them."""

    def __init__(self) -> None:
        self._parent = np.arange(1024, dtype=np.int64)
        self._size = 1
        self._reasons: list[str] = [PLAIN]
        self._numbers: dict[str, int] = {PLAIN: 0}
        self._protected: list[tuple[Array, int]] = []
        self._zeros: dict[int, Array] = {}

    def __len__(self) -> int:
        return self._size

    def fresh(self, count: int) -> Array:
        """`count` new labels."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):  # grow geometrically: appending is quadratic
            grown = np.arange(max(self._size, 2 * len(self._parent)), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return np.arange(start, self._size, dtype=np.int64)

    def plain(self, count: int) -> Array:
        """An axis without channels: the same array for every axis of that length."""
        if count not in self._zeros:
            self._zeros[count] = np.zeros(count, np.int64)
        return self._zeros[count]

    def pinned(self, count: int, reason: str) -> Array:
        """An axis that may not shrink, and why."""
        return np.full(count, -self._number(reason), np.int64)

    def _number(self, reason: str) -> int:
        number = self._numbers.setdefault(reason, len(self._reasons))
        if number == len(self._reasons):
            self._reasons.append(reason)
        return number

    def find(self, labels: Array) -> Array:
        """The unit of each label; pinned labels are themselves."""
        roots = self._parent[np.maximum(labels, 0)]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                break
            roots = above
        positive = labels > 0
        self._parent[labels[positive]] = roots[positive]  # path compression
        found: Array = np.where(positive, roots, labels)
        return found

    def unite(self, a: Array, b: Array) -> None:
        """Join labels pairwise."""
        if a is b:
            return
        a, b = self.find(a), self.find(b)
        low, high = np.minimum(a, b), np.maximum(a, b)
        differ = low != high
        if not differ.any():
            return
        low, high = low[differ], high[differ]
        pinned = low <= 0
        if pinned.any():
            for number in np.unique(low[pinned]):
                self._protected.append((high[low == number], -int(number)))
            low, high = low[~pinned], high[~pinned]
        while len(low):
            np.minimum.at(self._parent, high, low)
            a, b = self.find(low), self.find(high)
            low, high = np.minimum(a, b), np.maximum(a, b)
            differ = low != high
            low, high = low[differ], high[differ]

    def collapse(self, grid: Array, axis: int) -> Array:
        """Unite a grid of labels along one axis; one label per line remains."""
        first: Array = grid.take(0, axis)
        flat = np.broadcast_to(np.expand_dims(first, axis), grid.shape)
        self.unite(flat.reshape(-1), grid.reshape(-1))
        return first

    def protect(self, labels: Array, reason: str) -> None:
        """Forbid the removal of these labels' units."""
        positive = labels[labels > 0]
        if len(positive):
            self._protected.append((positive, self._number(reason)))

    def roots(self) -> Array:
        """The unit of every label, by label."""
        return self.find(np.arange(self._size, dtype=np.int64))

    def reasons(self) -> dict[int, str]:
        """Protected units and the reason of each; a specific one beats `PLAIN`."""
        why: dict[int, str] = {}
        for labels, number in sorted(self._protected, key=lambda item: item[1] == 0):
            for root in np.unique(self.find(labels)):
                if root > 0:
                    why.setdefault(int(root), self._reasons[number])
        return why
