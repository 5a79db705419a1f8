"""How close a rewritten model's outputs stay to the original's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fidelity:
    """Outputs of two models on the same inputs that nothing was fitted to.

    `relative_error` is ‖new − base‖ / ‖base‖ over all outputs; agreement is of the
    top class where an output holds class scores; accuracies need labels.
    """

    samples: int
    split: str
    relative_error: float
    max_abs_error: float
    agreement: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
