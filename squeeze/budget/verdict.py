"""Verdicts: one result per limit and model, and the report that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from squeeze.budget.baseline import ModelChange
from squeeze.budget.metrics import METRICS
from squeeze.budget.units import Quantity, show

Status = Literal["within", "over", "unmeasured"]
WITHIN, OVER, UNMEASURED = 0, 1, 3  # exit statuses


@dataclass(frozen=True)
class Share:
    """A layer and what it weighs of the whole."""

    layer: str
    amount: int
    share: float


@dataclass(frozen=True)
class Result:
    """One limit on one model, or on one of its layers.

    `value`, `baseline` and `limit` are in base units: elements, bytes, milliseconds,
    shares as fractions of 1, and latency as a ratio to the reference. `limit` is what
    the value was compared with, None where it could not be told.
    """

    name: str
    model: str
    metric: str
    level: str
    bound: str
    wanted: str
    status: Status
    limit: float | None = None
    value: float | None = None
    baseline: float | None = None
    reason: str = ""
    layer: str | None = None
    interval: tuple[float, float] | None = None
    heaviest: tuple[Share, ...] = ()
    remedy: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "within"

    @property
    def fails(self) -> bool:
        """Whether the gate closes because of it."""
        return not self.passed and self.level == "error"

    @property
    def subject(self) -> str:
        return f"{self.model}: {self.layer}" if self.layer else self.model


@dataclass(frozen=True)
class Report:
    """All results of a run, and what changed against the baselines."""

    results: tuple[Result, ...]
    changes: tuple[ModelChange, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.status == WITHIN

    @property
    def status(self) -> int:
        """The exit status: 3 beats 1, for a gate that can't measure can't judge."""
        failing = {r.status for r in self.results if r.fails}
        if "unmeasured" in failing:
            return UNMEASURED
        return OVER if failing else WITHIN

    def failures(self) -> Sequence[Result]:
        """What did not pass, errors before warnings."""
        return sorted(
            (r for r in self.results if not r.passed), key=lambda r: not r.fails
        )


# -- judging ------------------------------------------------------------------------


def effective(bound: str, quantity: Quantity, baseline: Fraction | None) -> Fraction:
    """The limit in the metric's base unit; a relative one starts at the baseline."""
    if bound in ("max", "min"):
        return quantity.amount
    assert baseline is not None
    if bound == "max_drop":
        return baseline - quantity.amount
    if quantity.family == "percent":
        return baseline * (1 + quantity.amount)
    return baseline + quantity.amount


def within(bound: str, value: Fraction, limit: Fraction) -> bool:
    """Exactly on the limit is within it."""
    return value >= limit if bound in ("min", "max_drop") else value <= limit


def excess(metric: str, bound: str, value: Fraction, limit: Fraction) -> str:
    """By how much, as "20 M (3.3 %) over 600 M"."""
    family = METRICS[metric].family
    low = bound in ("min", "max_drop")
    gap = abs(value - limit)
    amount = show(gap, "points" if family == "share" else family)
    relative = (
        f" ({show(gap / limit, 'percent')})" if limit and family != "share" else ""
    )
    return f"{amount}{relative} {'under' if low else 'over'} {show(limit, family)}"
