"""Sharing a budget out over layers, by a price per unit of cost (Lagrange).

Each layer has a menu: leave it alone, or one of its choices with a cost and a loss.
For a price λ per unit of cost every layer takes its best choice on its own; λ is
bisected to the budget. What the last step left over buys the best single upgrades.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from squeeze.errors import SqueezeError

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
STEPS = 100  # halvings of the price: down to rounding


@dataclass(frozen=True)
class Option(Generic[Item]):
    """One choice for a layer. Loss is in units that add up over layers."""

    cost: float
    loss: float
    item: Item


def allocate(
    menus: Mapping[Key, Sequence[Option[Item]]], budget: float
) -> dict[Key, Option[Item]]:
    """The options of least total loss whose costs add up to `budget` at most.

    Raises SqueezeError where even the cheapest of every menu cost more.
    """
    floor = sum(min(o.cost for o in menu) for menu in menus.values())
    if floor > budget:
        raise SqueezeError(f"out of reach: the cheapest choices leave {floor:,.0f}")
    low, high = 0.0, 1.0
    while _total(_taken(menus, high)) > budget:
        high *= 4
        if high > 1e300:  # cheapest of all: only losses of 0 are left to tell apart
            return {k: min(m, key=lambda o: (o.cost, o.loss)) for k, m in menus.items()}
    if _total(_taken(menus, 0.0)) <= budget:
        return _taken(menus, 0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _total(_taken(menus, middle)) > budget:
            low = middle
        else:
            high = middle
    return _upgraded(menus, _taken(menus, high), budget)


def _taken(
    menus: Mapping[Key, Sequence[Option[Item]]], price: float
) -> dict[Key, Option[Item]]:
    return {
        key: min(menu, key=lambda o: (o.loss + price * o.cost, o.cost))
        for key, menu in menus.items()
    }


def _total(taken: Mapping[Key, Option[Item]]) -> float:
    return sum(option.cost for option in taken.values())


def _upgraded(
    menus: Mapping[Key, Sequence[Option[Item]]],
    taken: dict[Key, Option[Item]],
    budget: float,
) -> dict[Key, Option[Item]]:
    """Spend what is left on the upgrades that save the most loss per cost."""
    left = budget - _total(taken)
    while True:
        best: tuple[float, Key, Option[Item]] | None = None
        for key, menu in menus.items():
            have = taken[key]
            for option in menu:
                more, gain = option.cost - have.cost, have.loss - option.loss
                if gain > 0 and more <= left:
                    rate = gain / max(more, 1e-9)
                    if best is None or rate > best[0]:
                        best = (rate, key, option)
        if best is None:
            return taken
        _, key, option = best
        left -= option.cost - taken[key].cost
        taken = {**taken, key: option}
