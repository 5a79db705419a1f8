"""factorize: layers as products of thinner ones, by low rank.

Fully connected layers become two (Çallı 2017, §2.6; by truncated SVD, or output-PCA
where there is data), convolutions a k×k and a 1×1 (output-PCA: Zhang et al. 2015), a
k×1 and a 1×k (Jaderberg et al. 2014), or 1×1, k×k, 1×1 (Tucker-2: Kim et al. 2016).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from squeeze.calibrate.stats import Stats
from squeeze.cost.layers import count, profile
from squeeze.errors import SqueezeError, UsageError
from squeeze.model import node_name
from squeeze.rewrite import sites
from squeeze.rewrite.allocate import Option, allocate
from squeeze.rewrite.fit import low_rank, source, waves
from squeeze.rewrite.fit.low_rank import Cut, Layer
from squeeze.rewrite.fit.source import FitData
from squeeze.rewrite.plan import Change, Cost, Outcome, Result, selector
from squeeze.rewrite.run import Options, run
from squeeze.shapes import Shapes

Method = Literal["auto", "pca", "spatial", "tucker", "separable", "any"]
LOW_RANK = ("pca", "spatial", "tucker")  # what "auto" chooses from; "any": all
SHARES = tuple(i / 16 for i in range(1, 16))  # of the full rank: an allocator's menu
DEFAULT_ENERGY = 0.99


@dataclass(frozen=True)
class Goal:
    """What decides the ranks: one of the first three, or a budget over all layers.

    `rank` is a number, a share of the full rank, or "evbmf". `macs` and `params` are
    what the whole model may cost.
    """

    energy: float | None = None
    rank: int | float | Literal["evbmf"] | None = None
    macs: int | float | None = None
    params: int | float | None = None

    @property
    def budget(self) -> str:
        if self.macs is not None:
            return "macs"
        return "params" if self.params is not None else ""

    def limit(self, before: Cost) -> float:
        """The budget as a count; shares (floats up to 1) are of the model as it is."""
        value = self.macs if self.macs is not None else self.params
        assert value is not None
        whole = before.macs if self.macs is not None else before.params
        return value * whole if isinstance(value, float) else value


@dataclass(frozen=True)
class Choice:
    """What to factorise, and how."""

    goal: Goal
    method: Method = "auto"
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    round_to: int = 8
    allow_costlier: bool = False


def factorize(
    model: ir.Model | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    energy: float | None = None,
    rank: int | float | Literal["evbmf"] | None = None,
    macs: int | float | None = None,
    params: int | float | None = None,
    method: Method = "auto",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    round_to: int = 8,
    allow_costlier: bool = False,
    data: FitData | None = None,
    options: Options | None = None,
) -> Result:
    """Replace layers by low-rank products.

    Give one of `energy` (the share to keep, 0.99 if nothing is given), `rank` (an int,
    a share of the full rank as a float, or "evbmf"), `macs` or `params` (what the whole
    model may cost; floats are shares). Writes to `output` if one is given.
    """
    given = [v for v in (energy, rank, macs, params) if v is not None]
    if len(given) > 1:
        raise UsageError("give one of --energy, --rank, --macs and --params")
    goal = Goal(DEFAULT_ENERGY if not given else energy, rank, macs, params)
    choice = Choice(goal, method, only, skip, round_to, allow_costlier)
    options = options or Options()
    if output is not None:
        options = replace(options, output=Path(output))
    data = data or FitData()
    return run(
        model, lambda m, shapes: apply(m, shapes, choice, data), options, data.fidelity
    )


def apply(model: ir.Model, shapes: Shapes, choice: Choice, data: FitData) -> Outcome:
    """Choose a rank for every layer, then put the factors in, in network order."""
    planned = _layers(model, shapes, choice)
    notes: list[str] = []
    calibration = None
    stats: dict[str, Stats] = {}
    if data.data is not None:
        calibration = data.calibration(model, shapes)
        layers = [p.layer for p in planned if p.layer is not None]
        stats = low_rank.statistics(model, shapes, layers, calibration)
    planned = _chosen(model, shapes, planned, choice, stats)
    del stats
    taken = [p for p in planned if p.cut is not None]
    errors: dict[str, low_rank.Task] = {}
    if calibration is not None and taken:
        original = model.clone()
        tasks = [low_rank.task(_layer(p), _cut(p), original, shapes) for p in taken]
        waves.run(original, model, tasks, calibration, shapes.inputs)
        errors = {t.name: t for t in tasks}
        notes.append(source.described(calibration))
        notes += waves.shortages({t.name: t.few for t in tasks})
    else:
        for one in taken:
            low_rank.task(_layer(one), _cut(one), None, shapes).graft(model.graph)
        if taken:
            notes.append("ranks and factors from the weights alone; --data fits better")
    return Outcome(model, [_change(p, choice, errors) for p in planned], notes)


# -- the plan -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Planned:
    """A layer with its choice: a cut, or the reason for none."""

    name: str
    layer: Layer | None
    reason: str = ""
    before: Cost | None = None
    cut: Cut | None = None
    after: Cost | None = None
    details: Mapping[str, object] = field(default_factory=dict)


def _layer(planned: _Planned) -> Layer:
    assert planned.layer is not None
    return planned.layer


def _cut(planned: _Planned) -> Cut:
    assert planned.cut is not None
    return planned.cut


def _layers(model: ir.Model, shapes: Shapes, choice: Choice) -> list[_Planned]:
    """Every layer with weights, in graph order, or why it is left alone."""
    left_alone = selector(choice.only, choice.skip)
    convolutions = {c.node: c for c in sites.find(model, shapes)}
    found = []
    for node in model.graph:
        layer, reason = low_rank.layer(node, convolutions.get(node), shapes)
        if layer is None and not reason:
            continue
        name = layer.name if layer else node_name(node)
        before = Cost(*count(layer.nodes if layer else [node], shapes))
        reason = left_alone(name) or reason
        found.append(_Planned(name, None if reason else layer, reason, before))
    return found


def _chosen(
    model: ir.Model,
    shapes: Shapes,
    planned: Sequence[_Planned],
    choice: Choice,
    stats: Mapping[str, Stats],
) -> list[_Planned]:
    if choice.goal.budget:
        return _budgeted(model, shapes, planned, choice, stats)
    found = []
    for one in planned:
        if one.layer is None:
            found.append(one)
            continue
        scale = low_rank.Scale.of(one.layer, stats.get(one.name))
        options = [
            _priced(one, cut, shapes, choice)
            for method in _methods(one.layer, choice)
            if (cut := _wanted_cut(scale, method, choice)) is not None
        ]
        paying = [o for o in options if o.cut is not None]
        best = min(paying, key=lambda o: o.after.macs if o.after else 0, default=None)
        found.append(best or (options[0] if options else _none(one, choice)))
    return found


def _none(planned: _Planned, choice: Choice) -> _Planned:
    return replace(planned, reason=f"{choice.method} does not apply to this layer")


def _methods(layer: Layer, choice: Choice) -> list[str]:
    """The layer's methods that the choice allows; a rank alone means output-PCA."""
    if choice.method == "any":
        return list(layer.methods)
    if choice.method != "auto":
        return [m for m in layer.methods if m == choice.method or not layer.site]
    if choice.goal.rank is not None:
        return list(layer.methods[:1])
    return [m for m in layer.methods if m in LOW_RANK]


def _wanted_cut(scale: low_rank.Scale, method: str, choice: Choice) -> Cut | None:
    goal = choice.goal
    if goal.energy is not None:
        return scale.by_energy(method, goal.energy, choice.round_to)
    if goal.rank == "evbmf":
        return scale.by_evbmf(method, choice.round_to)
    assert goal.rank is not None and not isinstance(goal.rank, str)
    if isinstance(goal.rank, float):
        return scale.by_share(method, goal.rank, choice.round_to)
    return scale.by_rank(method, goal.rank)


def _priced(one: _Planned, cut: Cut, shapes: Shapes, choice: Choice) -> _Planned:
    """With its cost; refused where it costs as much as the layer."""
    assert one.layer is not None and one.before is not None
    after = low_rank.cost(one.layer, cut, shapes)
    if after.macs >= one.before.macs and not choice.allow_costlier:
        most = low_rank.break_even(one.layer, cut.method, one.before, shapes)
        return replace(
            one,
            reason=f"{cut.method} at rank {cut.text} costs {after.macs:,} MACs, not "
            f"less than the {one.before.macs:,} it replaces; ranks up to {most} pay",
        )
    return replace(one, cut=cut, after=after)


def _budgeted(
    model: ir.Model,
    shapes: Shapes,
    planned: Sequence[_Planned],
    choice: Choice,
    stats: Mapping[str, Stats],
) -> list[_Planned]:
    """Ranks by the allocator, over all layers that may be touched.

    Layers count alike. Weights by what a small error in one layer does to the outputs
    miss that later layers are fitted to make up for it: they shield early layers too
    much (cifar10_cnn at 24.5 % of its MACs: output error 0.156 against 0.139).
    """
    totals = profile(model, shapes=shapes).totals
    whole = Cost(totals.macs, totals.flops, totals.params)
    key = choice.goal.budget
    menus: dict[int, list[Option[_Planned]]] = {}
    fixed = float(getattr(whole, key))
    for index, one in enumerate(planned):
        if one.layer is None or one.before is None:
            continue
        dense = getattr(one.before, key)
        fixed -= dense
        kept = replace(one, reason="left as it is: the budget is met without it")
        menus[index] = [Option(dense, 0.0, kept)]
        scale = low_rank.Scale.of(one.layer, stats.get(one.name))
        for cut in _menu(scale, choice):
            after = low_rank.cost(one.layer, cut, shapes)
            if after.macs < one.before.macs or choice.allow_costlier:
                taken_ = replace(one, cut=cut, after=after)
                loss = scale.error(cut)
                menus[index].append(Option(getattr(after, key), loss, taken_))
    limit = choice.goal.limit(whole)
    try:
        taken = allocate(menus, limit - fixed)
    except SqueezeError as error:
        least = fixed + sum(min(o.cost for o in m) for m in menus.values())
        raise SqueezeError(
            f"--{key} {limit:,.0f} is out of reach: low rank leaves at least "
            f"{least:,.0f} of {getattr(whole, key):,}; raise it, or convert as well"
        ) from error
    return [taken[i].item if i in taken else one for i, one in enumerate(planned)]


def _menu(scale: low_rank.Scale, choice: Choice) -> list[Cut]:
    """Cuts at several shares of the full rank."""
    found = {
        (method, cut.ranks): cut
        for method in _methods(scale.layer, replace(choice, goal=Goal(energy=1.0)))
        for share in SHARES
        for cut in [scale.by_share(method, share, choice.round_to)]
    }
    return list(found.values())


def _change(
    planned: _Planned, choice: Choice, fitted: Mapping[str, low_rank.Task]
) -> Change:
    if planned.cut is None:
        return Change(
            planned.name, "factorize", False, planned.reason, planned.before, None
        )
    rank = planned.cut.ranks[0] if len(planned.cut.ranks) == 1 else planned.cut.ranks
    details: dict[str, object] = {"method": planned.cut.method, "rank": rank}
    done = fitted.get(planned.name)
    return Change(
        planned.name,
        "factorize",
        True,
        "",
        planned.before,
        planned.after,
        fit_error=done.error if done else None,
        details=details,
    )
