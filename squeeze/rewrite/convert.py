"""convert: standard convolutions become the blocks of published networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from squeeze.cost.layers import count
from squeeze.errors import RuleError, SqueezeError, UsageError
from squeeze.rewrite import blocks, sites
from squeeze.rewrite.allocate import Option, allocate
from squeeze.rewrite.blocks import Param, Rule
from squeeze.rewrite.build import Fragment, Refused, build, graft
from squeeze.rewrite.expressions import Value
from squeeze.rewrite.fit import blocks as blocks_fit
from squeeze.rewrite.fit import low_rank, source, waves
from squeeze.rewrite.fit.source import FitData
from squeeze.rewrite.plan import Change, Cost, Outcome, Result, named, selector
from squeeze.rewrite.run import Options, run
from squeeze.rewrite.sites import Candidate, Site
from squeeze.shapes import Shapes

MENU: tuple[Fraction | int, ...] = (
    *(Fraction(i, 8) for i in range(1, 8)),
    1,
    2,
    3,
    4,
    5,
    6,
    8,
)
UNFITTED = "new weights are not fitted"
Fit = Literal["auto", "weights", "data", "none"]
FINEST = 100  # parameters are searched in hundredths


@dataclass(frozen=True)
class Choice:
    """Which block goes where. None: as the rule says."""

    rule: Rule
    settings: Mapping[str, Value] = field(default_factory=dict)
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    keep_first: bool | None = None
    pool: Literal["keep", "absorb"] | None = None
    allow_costlier: bool = False
    seed: int = 0

    @property
    def absorbs(self) -> bool:
        return (self.pool or self.rule.pool) == "absorb"

    @property
    def keeps_first(self) -> bool:
        return self.rule.keep_first if self.keep_first is None else self.keep_first


@dataclass(frozen=True)
class Planned:
    """A convolution's change, and what to put there if it is applied."""

    change: Change
    site: Site | None = None
    fragment: Fragment | None = None


def convert(
    model: ir.Model | str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str] | None = None,
    *,
    settings: Mapping[str, str | Value] | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    keep_first: bool | None = None,
    pool: Literal["keep", "absorb"] | None = None,
    allow_costlier: bool = False,
    fit: Fit = "auto",
    data: FitData | None = None,
    macs: int | float | None = None,
    options: Options | None = None,
) -> Result:
    """Replace standard convolutions by the block `to` (a name, or a .toml's path).

    Writes to `output` if one is given; the rewritten model is in the result as well.
    New weights are fitted to `data` where there is any, else to the old weights.
    `macs` is what the whole model may cost (a float is a share): it decides which
    sites are converted, and with which value of the block's first number.
    Raises UsageError for an unknown block or parameter, RuleError for a bad rule.
    """
    rule = blocks.load(to)
    options = options or Options()
    if output is not None:
        options = replace(options, output=Path(output))
    choice = Choice(
        rule=rule,
        settings=rule.settings(settings or {}),
        only=only,
        skip=skip,
        keep_first=keep_first,
        pool=pool,
        allow_costlier=allow_costlier,
        seed=options.seed,
    )
    data = data or FitData()
    if fit == "data" and data.data is None:
        raise UsageError("--fit data needs data to fit to; pass --data")
    used = fit if fit != "auto" else ("weights" if data.data is None else "data")
    return run(
        model,
        lambda m, shapes: apply(m, shapes, choice, used, data, macs),
        options,
        data.fidelity,
    )


def apply(
    model: ir.Model,
    shapes: Shapes,
    choice: Choice,
    fit: Fit = "none",
    data: FitData | None = None,
    macs: int | float | None = None,
) -> Outcome:
    """Plan every convolution, then put the accepted blocks in, fitted as asked."""
    if macs is None:
        planned = plan(model, shapes, choice)
    else:
        planned = planned_for(model, shapes, choice, macs, data)
    taken = [p for p in planned if p.fragment is not None and p.site is not None]
    fitted: dict[str, Refit] = {}
    notes: list[str] = []
    if data is not None and data.data is not None:
        data.open(model, shapes)  # the result is measured on it, whatever is fitted
    if fit == "data" and taken:
        assert data is not None
        fitted, notes = _fitted(model, shapes, taken, data)
    else:
        for one in taken:
            assert one.site is not None and one.fragment is not None
            if fit == "weights":
                begun = blocks_fit.start(one.site, one.fragment)
                fitted[one.site.name] = Refit(begun.method)
            graft(model.graph, one.site, one.fragment)
        if taken:
            notes = [_weights_note(fitted)]
    changes = [
        replace(
            one.change,
            fit_error=fitted[one.change.site].error,
            details={**one.change.details, "fit": fitted[one.change.site].method},
        )
        if one.change.applied and one.change.site in fitted
        else one.change
        for one in planned
    ]
    return Outcome(model, changes, notes)


# -- a budget over all sites --------------------------------------------------------


def planned_for(
    model: ir.Model,
    shapes: Shapes,
    choice: Choice,
    macs: int | float,
    data: FitData | None,
) -> list[Planned]:
    """The plan of least loss within a budget for the whole model.

    A site's menu is the block at several values of its first number, and leaving it
    alone. Raises SqueezeError where the budget is out of reach.
    """
    candidates = sites.find(model, shapes)
    reason = selector(choice.only, choice.skip)
    scales = _scales(model, shapes, candidates, data)
    whole = sum(count([node], shapes)[0] for node in model.graph)
    fixed, menus = float(whole), dict[int, list[Option[Planned]]]()
    planned: list[Planned] = []
    for index, candidate in enumerate(candidates):
        tried = [
            _planned(candidate, shapes, one, reason(candidate.name))
            for one in _settings(choice)
        ]
        planned.append(tried[0])
        done = [t for t in tried if t.change.applied]
        if not done or done[0].change.before is None:
            continue
        before = done[0].change.before
        left = _refused(candidate.name, choice, "left as it is: within budget", before)
        fixed -= before.macs
        menus[index] = [Option(before.macs, 0.0, Planned(left))]
        for one in done:
            assert one.fragment is not None and one.site is not None
            loss = blocks_fit.loss(one.site, one.fragment, scales.get(candidate.name))
            menus[index].append(Option(one.fragment.cost.macs, loss, one))
    limit = macs * whole if isinstance(macs, float) else macs
    least = fixed + sum(min(o.cost for o in menu) for menu in menus.values())
    if least > limit:
        raise SqueezeError(
            f"--macs {limit:,.0f} is out of reach: {choice.rule.name} leaves at least "
            f"{least:,.0f} of {whole:,}; raise it, or squeeze shrink"
        )
    taken = allocate(menus, limit - fixed)
    return [taken[i].item if i in taken else one for i, one in enumerate(planned)]


def _scales(
    model: ir.Model,
    shapes: Shapes,
    candidates: Sequence[Candidate],
    data: FitData | None,
) -> dict[str, low_rank.Scale]:
    """What each site's inputs say about losses, where there is data."""
    if data is None or data.data is None:
        return {}
    found = [low_rank.layer(c.node, c, shapes)[0] for c in candidates if c.site]
    layers = [one for one in found if one is not None]
    calibration = data.calibration(model, shapes)
    stats = low_rank.statistics(model, shapes, layers, calibration)
    return {
        one.name: low_rank.Scale.of(one, stats.pop(one.name))
        for one in layers
        if one.name in stats
    }


def _settings(choice: Choice) -> Iterator[Choice]:
    """The choice at several values of the block's first number, its own first."""
    yield choice
    for param in choice.rule.params.values():
        if not param.numeric:
            continue
        for value in MENU:
            try:
                param.check(value, "")
            except RuleError:
                continue
            yield replace(choice, settings={**choice.settings, param.name: value})
        return


@dataclass(frozen=True)
class Refit:
    """How a site's weights were found, and their relative error on held-out rows."""

    method: str
    error: float | None = None


def _fitted(
    model: ir.Model, shapes: Shapes, taken: Sequence[Planned], data: FitData
) -> tuple[dict[str, Refit], list[str]]:
    calibration = data.calibration(model, shapes)
    original = model.clone()
    tasks = []
    for one in taken:
        assert one.site is not None and one.fragment is not None
        begun = blocks_fit.start(one.site, one.fragment)
        tasks.append(blocks_fit.BlockTask(one.site, one.fragment, begun, original))
    waves.run(original, model, tasks, calibration, shapes.inputs)
    found = {}
    for task in tasks:
        method = task.fitted.method if task.fitted else task.begun.method
        error = task.fitted.error if task.fitted else None
        found[task.name] = Refit(method or "not fitted", error)
    notes = [source.described(calibration)]
    if unmatched := [t.name for t in tasks if t.fitted is None]:
        notes.append(f"not fitted to data: {', '.join(unmatched)}")
    notes += waves.shortages({t.name: t.few for t in tasks})
    return found, notes


def _weights_note(fitted: Mapping[str, Refit]) -> str:
    if not fitted:
        return UNFITTED
    exact = sum(f.method == "closed form" for f in fitted.values())
    text = f"fitted to the old weights alone ({exact} of {len(fitted)} in closed form)"
    return f"{text}; --data fits to what the layers see"


def plan(model: ir.Model, shapes: Shapes, choice: Choice) -> list[Planned]:
    """One line per convolution of the model, done or refused."""
    reason = selector(choice.only, choice.skip)
    return [
        _planned(candidate, shapes, choice, reason(candidate.name))
        for candidate in sites.find(model, shapes)
    ]


def _planned(
    candidate: Candidate, shapes: Shapes, choice: Choice, left_alone: str | None
) -> Planned:
    site = candidate.site
    why = candidate.reason or left_alone
    kept = site is not None and site.first and choice.keeps_first
    if not why and kept and not named(choice.only, candidate.name):
        why = "first layer kept; --no-keep-first converts it"
    if why or site is None:
        return Planned(_refused(candidate.name, choice, why or ""))
    site = site.with_pool(choice.absorbs)
    before = Cost(*count(site.nodes, shapes))
    try:
        fragment = build(choice.rule, site, choice.settings, choice.seed)
        if fragment.cost.macs > before.macs and not choice.allow_costlier:
            raise Refused(_costlier(site, choice, before, fragment.cost))
    except Refused as refusal:
        return Planned(_refused(site.name, choice, str(refusal), before))
    details = {"block": choice.rule.name, "params": _plain(choice.settings)}
    change = Change(
        site.name, "convert", True, "", before, fragment.cost, details=details
    )
    return Planned(change, site, fragment)


def _refused(
    name: str, choice: Choice, reason: str, before: Cost | None = None
) -> Change:
    details = {"block": choice.rule.name, "params": _plain(choice.settings)}
    return Change(name, "convert", False, reason, before, None, details=details)


def _plain(settings: Mapping[str, Value]) -> dict[str, int | float | str | bool]:
    return {name: blocks.plain(value) for name, value in settings.items()}


# -- what would pay -----------------------------------------------------------------


def _costlier(site: Site, choice: Choice, before: Cost, after: Cost) -> str:
    text = f"costs {after.macs:,} MACs, more than the {before.macs:,} it replaces"
    hints = [
        hint
        for param in choice.rule.params.values()
        if (hint := _payable(site, choice, param, before)) is not None
    ]
    if hints:
        return f"{text}; it would pay with {' or '.join(hints)}"
    return f"{text}; no value of its parameters pays here"


def _payable(site: Site, choice: Choice, param: Param, before: Cost) -> str | None:
    """The value nearest to the present one that pays, as --set would take it."""
    present = choice.settings[param.name]
    if isinstance(present, (str, bool)):
        return None

    def pays(value: Fraction | int) -> bool:
        try:
            param.check(value, "")
            settings = {**choice.settings, param.name: value}
            return build(choice.rule, site, settings).cost.macs <= before.macs
        except (Refused, RuleError):
            return False

    for scale in (1, FINEST):
        down = _largest_below(int(present * scale), scale, pays)
        if down is not None:
            return f"{param.name}={blocks.number(down)}"
    up = next((v for v in _doublings(present) if pays(v)), None)
    return f"{param.name}={blocks.number(up)}" if up is not None else None


def _largest_below(
    present: int, scale: int, pays: Callable[[Fraction | int], bool]
) -> Fraction | None:
    """Largest k / scale under the present value that pays, where less costs less."""
    low, high = 0, present  # at `low` it pays or is out of bounds, at `high` it doesn't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays(Fraction(middle, scale)) else (low, middle)
    return Fraction(low, scale) if low and pays(Fraction(low, scale)) else None


def _doublings(present: Fraction | int) -> Iterator[Fraction | int]:
    """Larger values to try for a parameter that divides, as a reduction does."""
    for _ in range(6):
        present = present * 2
        yield present
