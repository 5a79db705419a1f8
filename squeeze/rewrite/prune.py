"""Prune: take out the channels that matter least, and repair what that broke."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze.calibrate.data import Data, Split
from squeeze.cost import profile
from squeeze.errors import SqueezeError, UsageError, nearest
from squeeze.measure import latency
from squeeze.rewrite import criteria
from squeeze.rewrite.affine import LAYERS
from squeeze.rewrite.channels import changes as views
from squeeze.rewrite.channels import choose, prepare, trace
from squeeze.rewrite.channels.choose import Cell, Floors
from squeeze.rewrite.channels.exact import exact, fold_constants
from squeeze.rewrite.channels.trace import Array, Family, Trace
from squeeze.rewrite.plan import Change, Limit, Outcome, Result, selector
from squeeze.rewrite.refit import Network
from squeeze.rewrite.run import Options, run
from squeeze.rewrite.samples import Removing, Samples
from squeeze.rewrite.sensitivity import weighted
from squeeze.shapes import Shapes

LATENCY_TRIALS = 7
MAX_ROUNDS = 100

Between = Callable[[ir.Model], ir.Model]


@dataclass(frozen=True)
class Plan:
    """What to prune: threshold, ratio, macs, params or latency; or by="outlier"."""

    by: str | None = None
    threshold: Limit | None = None
    ratio: Fraction | None = None
    macs: Limit | None = None
    params: Limit | None = None
    latency: Limit | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    min_channels: int = 1
    round_to: int | None = None
    refit: bool = True
    rounds: int = 1
    distort: float = 0.0
    attention: str = "dims"

    @property
    def targets(self) -> list[str]:
        names = ("threshold", "ratio", "macs", "params", "latency")
        return [n for n in names if getattr(self, n) is not None]

    @property
    def criterion(self) -> str:
        """The one asked for; else the best that the target and the data allow."""
        return self.by or ("activations" if self.threshold is not None else "")

    @property
    def floors(self) -> Floors:
        default = 8 if {"macs", "params", "latency"} & set(self.targets) else 1
        return Floors(self.min_channels, self.round_to or default)


def prune(
    model: ir.Model | str | os.PathLike[str],
    plan: Plan,
    samples: Samples | None = None,
    options: Options | None = None,
    between: Between | None = None,
) -> Result:
    """Prune a model to `plan`, refit on `samples`, and report.

    `between` is given the pruned and refitted model after every round, the last one
    included if something went, and returns it trained: with other weights, in the same
    graph. The next round starts from there and refits to it.

    Raises UsageError where the plan asks for nothing or lacks data, SqueezeError where
    the target can't be reached.
    """
    samples, options = samples or Samples(), options or Options()
    plan = _checked(plan, samples)
    if not isinstance(model, ir.Model):
        model = models.load(Path(model))
    trains = between is not None or options.train is not None
    samples = replace(samples, training=trains)
    state = _Channels(samples, options.seed, plan=plan, between=between)
    return run(model, state.transform, options, state.fidelity)


def cyclic(plan: Plan) -> bool:
    """Whether more may go in another round: a target is reached in the first."""
    return plan.threshold is not None or plan.by == "outlier"


def transform(
    model: ir.Model, shapes: Shapes, plan: Plan, data: Data, seed: int = 0
) -> Outcome:
    """Prune a model in memory, fitted to `data`: a step of another rewrite."""
    state = _Channels(Samples(), seed, Split(data, data, ""), plan=plan)
    return state.transform(model, shapes)


def _checked(plan: Plan, samples: Samples) -> Plan:
    if plan.by is not None and plan.by not in criteria.TABLE:
        raise UsageError(f"no criterion {plan.by!r}{nearest(plan.by, criteria.TABLE)}")
    if len(plan.targets) > 1:
        raise UsageError(f"--{' and --'.join(plan.targets)}: choose one of them")
    if not plan.targets and plan.by != "outlier":
        raise UsageError(
            "say how much to prune: --threshold 0, --ratio 0.5, --macs 50%, --params "
            "or --latency 80%; or --explain to see what could go"
        )
    if samples.data is None:
        needing = criteria.TABLE.get(plan.criterion)
        if needing is not None and needing.needs_data:
            raise UsageError(
                f"--by {plan.criterion} counts on data: pass --data, "
                "or --by l1 or l2, which need none"
            )
    if not plan.criterion:
        plan = replace(plan, by="energy" if samples.data is not None else "l2")
    return plan


@dataclass(kw_only=True)
class _Channels(Removing):
    """One pruning: what `run` calls back into."""

    plan: Plan
    between: Between | None = None

    def transform(self, model: ir.Model, shapes: Shapes) -> Outcome:
        self.open(model, shapes, self._exactly)
        prepared = prepare(model, shapes)
        untouched = original = Network(prepared.model.clone(), prepared.shapes)
        found = trace(prepared, self.plan.attention)
        goal = self._goal(found)
        reason = selector(self.plan.only, self.plan.skip)
        all_changes: list[Change] = []
        masks: dict[str, Array] = {}
        removed = False
        for number in range(self._rounds):
            before = model
            if number:
                model = self._between(model, number)
                if self.between is not None:  # what was trained is what to repair to
                    original, masks = Network(model.clone(), shapes), {}
                elif self.plan.distort:
                    self.repair(
                        original, Network(model, shapes), masks, self.plan.refit
                    )
                found = trace(prepare(model, shapes), self.plan.attention)
            keep = goal(found)
            removed |= not keep.all()
            if keep.all() and number and self.between is None:
                model = before  # nothing came of the distortion
                break
            shapes, changes, kept = views.apply(found, keep, "prune", reason)
            masks = _composed(masks, kept) if masks else kept
            all_changes = views.merged(all_changes, changes) if number else changes
            still = not self.plan.distort and self.between is None
            if keep.all() and (number or still):
                break
            if not keep.all() and (not self._exactly or self.plan.distort):
                now = Network(model, shapes)
                self.repair(original, now, masks, self.plan.refit)
        if not removed:  # whatever was distorted and trained to find something
            model, shapes = untouched.model, untouched.shapes
        elif self.between is not None and not keep.all():
            model = self.between(model)
        self._report(found, original, Network(model, shapes))
        return Outcome(model, self.told(all_changes), self.notes)

    def _between(self, model: ir.Model, number: int) -> ir.Model:
        """The model with which the next round starts: distorted, trained."""
        if self.plan.distort:
            model = model.clone()
            self._distort(model, number)
        return model if self.between is None else self.between(model)

    @property
    def _exactly(self) -> bool:
        """Whether only what changes no output may go."""
        zero = self.plan.threshold is not None and self.plan.threshold.value == 0
        return zero and self.plan.criterion == "activations"

    @property
    def _rounds(self) -> int:
        return min(self.plan.rounds, MAX_ROUNDS) if cyclic(self.plan) else 1

    # -- what goes -----------------------------------------------------------------

    def _goal(self, found: Trace) -> Callable[[Trace], Array]:
        """A function from a trace to the mask of what stays."""
        plan = self.plan
        if plan.threshold is not None and plan.criterion == "activations":
            return self._by_count
        if plan.threshold is not None:
            return self._by_score
        if plan.by == "outlier":
            return self._outliers
        if plan.ratio is not None:
            kept = choose.share(1 - plan.ratio, plan.floors.round_to)
            least = plan.min_channels
            return lambda t: choose.thin(
                t,
                self._families(t),
                self._scores(t),
                lambda n: max(kept(n), min(n, least)),
            )
        return self._to_target

    def _families(self, found: Trace) -> list[Family]:
        """Families that --only and --skip leave: a family goes whole or not at all."""
        return choose.selected(found, selector(self.plan.only, self.plan.skip))

    def _scores(self, found: Trace) -> Array:
        return criteria.TABLE[self.plan.criterion].score(self.context(found))

    def _only_these(self, found: Trace, keep: Array, scores: Array) -> Array:
        """Undo what lies outside the chosen families or below the floors."""
        kept = found.full.copy()
        for family in self._families(found):
            for cell in choose.cells(found, family):
                kept[cell.units] = keep[cell.units]
                self._floor(kept, cell, scores)
        return choose.refill(found, kept, scores)

    def _floor(self, keep: Array, cell: Cell, scores: Array) -> None:
        count = int(keep[cell.units].sum())
        least = (
            self.plan.floors.count(count, cell) if count < len(cell.units) else count
        )
        if least > count:
            gone = cell.units[~keep[cell.units]]
            order = np.argsort(-scores[gone], kind="stable")
            keep[gone[order[: least - count]]] = True

    def _by_count(self, found: Trace) -> Array:
        """Units active no more often than the threshold says (thesis §2.2.2).

        At 0 only what changes no output: see `channels.exact`.
        """
        assert self.data is not None
        assert self.plan.threshold is not None
        limit = self.plan.threshold
        if self._exactly:
            safe = exact(found, self.data)
            scores = (~safe.removable).astype(float)
            keep = self._only_these(found, ~safe.removable, scores)
            fold_constants(found, keep, safe)
            return keep
        context = self.context(found)
        counts = (criteria.shares if limit.is_share else criteria.counts)(context)
        return self._only_these(found, counts > float(limit.value), counts)

    def _by_score(self, found: Trace) -> Array:
        scores = self._scores(found)
        assert self.plan.threshold is not None
        limit = self.plan.threshold
        keep = found.full.copy()
        for family in found.families:
            top = float(scores[family.units].max())
            keep[family.units] = scores[family.units] > limit.of(top)
        return self._only_these(found, keep, scores)

    def _outliers(self, found: Trace) -> Array:
        """Units below mean − 2·std over their layer's units (thesis §2.2.3)."""
        scores = self._scores(found)
        keep = found.full.copy()
        for family in found.families:
            values = scores[family.units]
            limit = values.mean() - criteria.OUTLIER * values.std()
            keep[family.units] = values >= limit
        return self._only_these(found, keep, scores)

    @property
    def _weighs(self) -> bool:
        """Whether layers count by what silencing them does to the outputs.

        That tells little of what a refit leaves: with one, shares of each layer's own
        outputs lose less.
        """
        predicts = criteria.TABLE[self.plan.criterion].predicts_error
        return predicts and self.data is not None and not self.plan.refit

    def _to_target(self, found: Trace) -> Array:
        plan, scores = self.plan, self._scores(found)
        saved = choose.savings(found)
        families = self._families(found)
        if self._weighs:
            assert self.data is not None
            scores = weighted(found, families, scores, self.data)

        def reach(measure: choose.Measure, goal: float) -> Array | None:
            return choose.to_target(
                found, families, scores, saved, plan.floors, measure, goal
            )

        def need(
            measure: choose.Measure, limit: Limit, whole: float, what: str
        ) -> Array:
            keep = reach(measure, limit.of(whole))
            if keep is None:
                least = reach_floor(found, families, scores, plan.floors)
                raise SqueezeError(
                    f"--{what}: the least that pruning can reach here is "
                    f"{100 * measure(least) / whole:.1f} %; lower --min-channels or "
                    "--round-to, or prune more layers"
                )
            return keep

        if plan.macs is not None:
            whole = float(found.macs(found.full))
            return need(found.macs, plan.macs, whole, "macs")
        if plan.params is not None:
            all_of_them = profile(found.model, shapes=found.shapes).totals.params
            fixed = all_of_them - found.params(found.full)
            return need(
                lambda k: found.params(k) + fixed, plan.params, all_of_them, "params"
            )
        assert plan.latency is not None
        return self._to_latency(found, reach)

    def _to_latency(
        self, found: Trace, reach: Callable[[choose.Measure, float], Array | None]
    ) -> Array:
        """Bisect the share of MACs until the measured latency fits."""
        limit = self.plan.latency
        assert limit is not None
        whole = found.macs(found.full)
        timer = _Timer(found, self.seed, self.plan.attention)
        low, high, best = 0.0, 1.0, None
        guess = float(limit.value) if limit.is_share else 0.5
        for _ in range(LATENCY_TRIALS):
            keep = reach(found.macs, guess * whole)
            if keep is None:
                low = max(low, guess)
            else:
                before, after = timer.time(keep)
                allowed = limit.of(before) if limit.is_share else float(limit.value)
                if after <= allowed:
                    low, best = guess, keep
                else:
                    high = guess
            guess = (low + high) / 2
        if best is None:
            raise SqueezeError("--latency: pruning alone can't reach this here")
        return best

    def _distort(self, model: ir.Model, number: int) -> None:
        """Perturb weights by rand(shape)·(1 − var(weights)) (thesis §2.2.2)."""
        rng = np.random.default_rng([self.seed, number])
        for node in model.graph:
            weight = models.constant(node, 1)
            if node.op_type in LAYERS and weight is not None:
                noise = (
                    rng.random(weight.shape) * (1 - weight.var()) * self.plan.distort
                )
                value = node.inputs[1]
                assert value is not None
                changed = (weight + noise).astype(weight.dtype)
                value.const_value = ir.Tensor(changed, name=value.name)

    # -- what to tell ---------------------------------------------------------------

    def _report(self, found: Trace, before: Network, after: Network) -> None:
        if self._exactly and not self.plan.distort and self.between is None:
            assert self.data is not None
            worst = difference(before, after, self.data)
            self.notes.append(
                f"largest difference of an output on the {len(self.data)} samples: "
                f"{worst:.2g}"
            )
        elif found.inexact.any():
            self.notes.append("statistics over channels (normalisation) shift a little")
        if found.barriers:
            ops = sorted({b.op for b in found.barriers})
            self.notes.append(
                f"{len(found.barriers)} nodes block pruning ({', '.join(ops)}); "
                "--explain lists them"
            )


def reach_floor(
    found: Trace, families: list[Family], scores: Array, floors: Floors
) -> Array:
    """The mask with every cell at its floor."""
    keep = found.full.copy()
    for family in families:
        for cell in choose.cells(found, family):
            order = np.argsort(-scores[cell.units], kind="stable")
            keep[cell.units[order[floors.count(0, cell) :]]] = False
    return choose.refill(found, keep, scores)


def _composed(
    first: Mapping[str, Array], second: Mapping[str, Array]
) -> dict[str, Array]:
    """Masks over the original's outputs after another removal."""
    result = {}
    for name, mask in first.items():
        whole = mask.copy()
        if name in second:
            whole[np.flatnonzero(mask)] = second[name]
        result[name] = whole
    return result


def difference(before: Network, after: Network, data: Data) -> float:
    """Largest absolute difference of any output over the data."""
    from squeeze import session

    runners = [session.of(net.model, optimize=False) for net in (before, after)]
    worst = 0.0
    for batch in data:
        one, two = (r.run(None, batch.inputs) for r in runners)
        for a, b in zip(one, two, strict=True):
            gap = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            worst = max(worst, float(gap.max(initial=0.0)))
    return worst


class _Timer:
    """Times trial prunings against the original."""

    def __init__(self, found: Trace, seed: int, attention: str) -> None:
        self._found, self._seed, self._attention = found, seed, attention

    def time(self, keep: Array) -> tuple[float, float]:
        """Milliseconds of the original and of the model with this mask."""
        found = self._found
        from squeeze.rewrite.channels.prepare import Prepared
        from squeeze.rewrite.channels.remove import remove

        trial = trace(
            Prepared(found.model.clone(), found.shapes, found.probe), self._attention
        )
        shapes = remove(trial, keep)
        with TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("before.onnx", "after.onnx")]
            for path, one in zip(paths, (found.model, trial.model), strict=True):
                ir.save(one, path, external_data=f"{path.stem}.data")
            timed = latency.side_by_side(
                paths[0], paths[1], found.shapes, shapes, self._seed
            )
        return timed.before_ms, timed.after_ms
