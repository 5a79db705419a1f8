"""What every rewrite reports: one list of changes, done or refused."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from squeeze.cost import Totals
from squeeze.errors import UsageError
from squeeze.measure.fidelity import Fidelity
from squeeze.measure.latency import Latency

if TYPE_CHECKING:
    from squeeze.recover.run import Distilled


@dataclass(frozen=True)
class Cost:
    """What a part of the graph costs."""

    macs: int
    flops: int
    params: int


@dataclass(frozen=True)
class Limit:
    """An amount: a share of what there is, or so many."""

    value: Fraction
    is_share: bool

    def of(self, whole: float) -> float:
        return (
            float(self.value * Fraction(whole)) if self.is_share else float(self.value)
        )

    @property
    def number(self) -> int | float:
        """A float for a share, an int for so many: as the Python API takes it."""
        return float(self.value) if self.is_share else round(self.value)


@dataclass(frozen=True)
class Change:
    """One thing done to a site, or refused with the reason.

    `details` holds what belongs to the method: {block, params}, {channels},
    {method, rank}. `fit_error` is relative, on held-out positions.
    """

    site: str
    action: str
    applied: bool
    reason: str = ""
    before: Cost | None = None
    after: Cost | None = None
    fit_error: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What a rewrite hands back: the model, its changes, notes for the user."""

    model: ir.Model
    changes: Sequence[Change]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """A finished rewrite, as reported. `model` is the rewritten model in memory.

    `trained` says how distillation went, where it was asked for.
    """

    input: str
    output: str | None
    before: Totals
    after: Totals
    changes: tuple[Change, ...]
    latency: Latency | None
    fidelity: Fidelity | None
    notes: tuple[str, ...]
    model: ir.Model
    trained: Distilled | None = None

    @property
    def applied(self) -> int:
        return sum(change.applied for change in self.changes)


def selector(only: Iterable[str], skip: Iterable[str]) -> Callable[[str], str | None]:
    """A function from a layer's name to the reason why it is left alone, or None."""
    wanted = [_matcher(p) for p in only]
    unwanted = [_matcher(p) for p in skip]

    def reason(name: str) -> str | None:
        if wanted and not any(match(name) for match in wanted):
            return "not in --only"
        if any(match(name) for match in unwanted):
            return "in --skip"
        return None

    return reason


def named(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the --only/--skip patterns names the layer."""
    return any(_matcher(p)(name) for p in patterns)


def _matcher(pattern: str) -> Callable[[str], bool]:
    if not pattern.startswith("re:"):
        return lambda name: name == pattern or fnmatch.fnmatchcase(name, pattern)
    try:
        compiled = re.compile(pattern[3:])
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error
    return lambda name: compiled.search(name) is not None
