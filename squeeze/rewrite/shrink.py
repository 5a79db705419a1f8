"""shrink: the best mixture of pruning, low rank and separable convolutions.

Channels couple layers, so how much of the way pruning goes is one number for the whole
network: a few are tried. From there every layer takes the best of its menu (low rank of
several kinds, depthwise-separable, or leaving it) under the rest of the budget. Each
mixture is fitted to the original in network order; the layers that are left as they are
are then refitted to what the others have become. It is judged by its outputs on samples
that it was not fitted to, with that last step and without; the best one stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import session
from squeeze import shapes as shaping
from squeeze.calibrate.data import Data
from squeeze.cost import profile
from squeeze.errors import SqueezeError, UsageError, nearest
from squeeze.model import node_name
from squeeze.rewrite import factorize, prune
from squeeze.rewrite.affine import LAYERS, affine_axis
from squeeze.rewrite.fit.source import FitData
from squeeze.rewrite.plan import Change, Limit, Outcome, Result, selector
from squeeze.rewrite.refit import Network, refit
from squeeze.rewrite.run import Options, run
from squeeze.rewrite.samples import repairs, with_repair
from squeeze.shapes import Shapes

METHODS = ("prune", "factorize", "convert")
# menus of the methods that act on one layer, as `factorize` names them
MENUS: dict[frozenset[str], factorize.Method] = {
    frozenset({"factorize", "convert"}): "any",
    frozenset({"factorize"}): "auto",
    frozenset({"convert"}): "separable",
}
EFFORTS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the way that pruning goes

Array = np.ndarray


@dataclass(frozen=True)
class Goal:
    """What the model may cost, by which methods, and which layers stay as they are."""

    macs: Limit
    methods: frozenset[str] = frozenset(METHODS)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    round_to: int = 8

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise UsageError(f"--with: no method {name!r}{nearest(name, METHODS)}")
        if not self.methods:
            raise UsageError(f"--with: name some of {', '.join(METHODS)}")

    @property
    def menu(self) -> factorize.Method | None:
        return MENUS.get(self.methods - {"prune"})


@dataclass(frozen=True)
class Trial:
    """A mixture: pruned to `share` of the MACs, the rest of the way layer by layer."""

    share: float
    outcome: Outcome
    macs: int
    error: float


def shrink(
    model: ir.Model | str | os.PathLike[str],
    goal: Goal,
    data: FitData,
    options: Options | None = None,
) -> Result:
    """Bring a model to `goal.macs` by the mixture that keeps its outputs best.

    Raises UsageError without data, SqueezeError where no mixture reaches the target.
    """
    if data.data is None:
        raise UsageError(
            "shrink fits and judges on data: pass --data (no labels needed)"
        )
    return run(
        model,
        lambda m, shapes: _best(m, shapes, goal, data),
        options or Options(),
        data.fidelity,
    )


def _best(model: ir.Model, shapes: Shapes, goal: Goal, data: FitData) -> Outcome:
    found = data.open(model, shapes)
    whole = profile(model, shapes=shapes).totals.macs
    target = goal.macs.of(whole)
    held = data.calibration(model, shapes).held
    judge = Judge(model, held)
    trials: list[Trial] = []
    failures: list[str] = []
    shares = _shares(target / whole, goal)
    for share in shares:
        try:
            trials.append(_trial(model, shapes, goal, share, target, data, judge))
        except SqueezeError as error:
            failures.append(str(error))
    if not trials:
        raise SqueezeError(
            f"--macs {target:,.0f}: no mixture gets there: {failures[0]}"
        )
    best = min(trials, key=lambda t: t.error)
    tried = ", ".join(f"{t.share:.0%}: {t.error:.3g}" for t in trials)
    notes = [
        f"output error by how far pruning went, on {len(held)} samples not fitted to: "
        f"{tried}; kept {best.share:.0%}",
        f"{len(found.calibration)} samples of {found.calibration.name} used in all",
    ]
    return replace(best.outcome, notes=[*notes, *best.outcome.notes])


def _shares(target: float, goal: Goal) -> list[float]:
    """Shares of the MACs that pruning leaves, from 1 down to the target."""
    if "prune" not in goal.methods or target >= 1:
        return [1.0]
    if goal.menu is None:
        return [target]
    return [target**effort for effort in EFFORTS]


def _trial(
    model: ir.Model,
    shapes: Shapes,
    goal: Goal,
    share: float,
    target: float,
    data: FitData,
    judge: Judge,
) -> Trial:
    work = models.copy(model)
    changes: Sequence[Change] = ()
    notes: list[str] = []
    if share < 1:
        outcome = _pruned(work, shapes, goal, share, data)
        work, changes = outcome.model, outcome.changes
        notes += outcome.notes
    now = shaping.infer(work, _given(work, shapes))
    if goal.menu is not None and profile(work, shapes=now).totals.macs > target:
        choice = factorize.Choice(
            factorize.Goal(macs=int(target)),
            method=goal.menu,
            only=goal.only,
            skip=goal.skip,
            round_to=goal.round_to,
        )
        outcome = factorize.apply(work, now, choice, data)
        work, changes = outcome.model, _merged(changes, outcome.changes)
        notes += outcome.notes
        now = shaping.infer(work, _given(work, shapes))
    macs = profile(work, shapes=now).totals.macs
    if macs > target:
        raise SqueezeError(f"{macs:,} MACs are the least that this mixture reaches")
    made = Trial(share, Outcome(work, changes, notes), macs, judge.error(work))
    refitted = _refitted(made, Network(model, shapes), now, goal, data, judge)
    return min(made, refitted, key=lambda t: t.error)


def _refitted(
    trial: Trial,
    original: Network,
    shapes: Shapes,
    goal: Goal,
    data: FitData,
    judge: Judge,
) -> Trial:
    """The layers that are left refitted to what the others have become."""
    work = models.copy(trial.outcome.model)
    changes = trial.outcome.changes
    left, replaced = _left(original, work, shapes, changes, goal)
    fitting = data.calibration(original.model, original.shapes).fitting
    done = refit(
        original, Network(work, shapes), left, fitting, data.seed, replaced=replaced
    )
    if not done:
        return trial
    by_name = {one.layer: one for one in done}
    outcome = Outcome(
        work,
        [with_repair(c, by_name.get(c.site)) for c in changes],
        [*trial.outcome.notes, repairs(done)],
    )
    return replace(trial, outcome=outcome, error=judge.error(work))


def _left(
    original: Network,
    work: ir.Model,
    shapes: Shapes,
    changes: Sequence[Change],
    goal: Goal,
) -> tuple[dict[str, Array], set[str]]:
    """Layers that have all of their outputs, as masks; and the nodes that differ."""
    then = {node_name(n): n for n in original.model.graph}
    known = {v.name for n in original.model.graph for v in n.outputs}
    taken = {c.site for c in changes if c.applied}
    left_alone = selector(goal.only, goal.skip)
    masks: dict[str, Array] = {}
    replaced: set[str] = set()
    for node in work.graph:
        name = node_name(node)
        if name not in then or name in taken:
            replaced.add(name)
        elif (
            node.op_type in LAYERS
            and left_alone(name) is None
            and {v.name for v in node.outputs} <= known
        ):
            channels = shapes.need(node.outputs[0], node)[affine_axis(node)]
            masks[name] = np.ones(channels, bool)
    return masks, replaced


def _given(model: ir.Model, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    names = {v.name for v in model.graph.inputs}
    return {name: shape for name, shape in shapes.inputs.items() if name in names}


def _pruned(
    model: ir.Model, shapes: Shapes, goal: Goal, share: float, data: FitData
) -> Outcome:
    plan = prune.Plan(
        by="energy",
        macs=Limit(Fraction(share).limit_denominator(10**6), True),
        only=goal.only,
        skip=goal.skip,
        round_to=goal.round_to,
    )
    fitting = data.calibration(model, shapes).fitting
    return prune.transform(model, shapes, plan, fitting, data.seed)


class Judge:
    """Relative error of outputs on calibration samples held out of every fit.

    The original is opened and run once; its outputs are kept.
    """

    def __init__(self, original: ir.Model, data: Data) -> None:
        self._data = data
        self._outputs = list(self._run(original))
        self._whole = sum(_square(a) for batch in self._outputs for a in batch)

    def error(self, made: ir.Model) -> float:
        """‖made − original‖ / ‖original‖ over all outputs; inf where not finite."""
        pairs = zip(self._outputs, self._run(made), strict=True)
        wrong = sum(
            _square(np.subtract(b, a, dtype=np.float64))
            for then, now in pairs
            for a, b in zip(then, now, strict=True)
        )
        error = float(np.sqrt(wrong / (self._whole or 1.0)))
        return error if np.isfinite(error) else float("inf")

    def _run(self, model: ir.Model) -> Iterator[list[Array]]:
        runner = session.of(model)
        for batch in self._data:
            yield [np.asarray(a) for a in runner.run(None, batch.inputs)]


def _square(array: Array) -> float:
    return float(np.square(array, dtype=np.float64).sum())


def _merged(pruned: Sequence[Change], cut: Sequence[Change]) -> list[Change]:
    """One line per layer: what was done to it in all, against the original's cost."""
    before = {change.site: change for change in pruned}
    merged = []
    for change in cut:
        first = before.pop(change.site, None)
        merged.append(_joined(first, change) if first else _named(change))
    return [*merged, *before.values()]


def _joined(first: Change, second: Change) -> Change:
    if not second.applied:
        return first
    second = _named(second)
    if not first.applied:
        return replace(second, before=first.before or second.before)
    return replace(
        second,
        action=f"{first.action} + {second.action}",
        before=first.before,
        details={**first.details, **second.details},
    )


def _named(change: Change) -> Change:
    """A separable convolution is what `convert` makes."""
    if change.details.get("method") != "separable":
        return change
    return replace(change, action="convert")
