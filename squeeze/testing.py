"""For tests of models: `assert_within(model, macs="600M")` in pytest or unittest.

A limit exceeded is an AssertionError with what `squeeze check` prints: by how much,
which layers weigh most, which command would help. A limit that can't be measured is a
SqueezeError: that test says nothing about the model, and it must not pass.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from squeeze.errors import SqueezeError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from squeeze.budget.config import Budget
    from squeeze.budget.verdict import Report, Result

__all__ = ["BudgetWarning", "assert_within"]


class BudgetWarning(UserWarning):
    """A limit at level `warn` that is exceeded or could not be measured."""


def assert_within(
    model: str | os.PathLike[str] | ir.Model | Sequence[str | os.PathLike[str]],
    budget: str | os.PathLike[str] | Mapping[str, Any] | Budget | None = None,
    **limits: Any,
) -> Report:
    """Fail the test unless the model keeps its budget.

    `budget` is a squeeze.toml or a mapping shaped like a `[[check]]`. `limits` are
    keys of a `[[check]]`; a bare value is its `max` (or its `min`):
    `assert_within("net.onnx", macs="600M", accuracy={"min": "90%", "data": "v.npz"})`.
    """
    from squeeze.budget.gate import check

    if budget is not None and limits:
        raise UsageError("a budget and limits as arguments: choose one of them")
    if budget is None:
        budget = {key: _limit(key, value) for key, value in limits.items()}
    report = check(model, budget)
    for result in report.failures():
        if not result.fails:
            warnings.warn(_line(result), BudgetWarning, stacklevel=2)
    lines = [_line(r) for r in report.failures() if r.fails]
    if any(r.fails and r.status == "unmeasured" for r in report.results):
        raise SqueezeError("\n".join(lines))
    if lines:
        raise AssertionError("\n".join(lines))
    return report


def _limit(key: str, value: Any) -> Any:
    """`macs="600M"` is short for `macs={"max": "600M"}`."""
    from squeeze.budget.metrics import METRICS

    if key in METRICS and not isinstance(value, Mapping):
        return {next(iter(METRICS[key].limits)): value}
    return value


def _line(result: Result) -> str:
    from squeeze.report import checks

    return f"{checks.headline(result)}: {checks.explanation(result)}"
