"""The gate: every limit of every check on every model; baselines kept up to date."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from squeeze.budget import advice, baseline, config, files, runs, verdict
from squeeze.budget.baseline import Entry, ModelChange
from squeeze.budget.config import Budget, Check, LayerLimit, Limit
from squeeze.budget.subject import LayerCosts, Subject
from squeeze.budget.units import show
from squeeze.budget.verdict import Report, Result
from squeeze.calibrate.data import Data
from squeeze.errors import RuleError, SqueezeError, UsageError

COLLECTED = 2**23  # bytes of weights from which a collection pays
RELATIVE = ("max_increase", "max_drop")


def check(
    model: str | os.PathLike[str] | ir.Model | Sequence[str | os.PathLike[str]],
    budget: str | os.PathLike[str] | Mapping[str, Any] | Budget,
) -> Report:
    """Hold models against a budget.

    `budget` is a squeeze.toml, or one check as a mapping shaped like its `[[check]]`:
    `{"macs": {"max": "600M"}}`. Raises UsageError for a wrong budget or a missing
    file. What can't be measured is a result of the report, whose `status` is the exit
    status of `squeeze check`: 0 within, 1 over, 3 not measurable.
    """
    if not isinstance(budget, (Mapping, Budget)):
        budget = config.load(Path(budget))
    if isinstance(budget, Mapping):
        budget = Budget((config.one(budget),))
    if isinstance(model, ir.Model):
        return _report([_case(c, model) for c in budget.checks], whole=False)
    given = [model] if isinstance(model, (str, os.PathLike)) else model
    return run(budget, [os.fspath(m) for m in given])


def run(budget: Budget, models: Sequence[str] = ()) -> Report:
    """Every check of a budget, on the models given or on those that it names."""
    return _report(cases(budget, models), whole=not models)


# -- what is to be checked ----------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A check and the models that it holds, with what they are compared to."""

    check: Check
    subjects: tuple[Subject, ...]
    baselines: Mapping[str, Entry] = field(default_factory=dict)

    @cached_property
    def base_model(self) -> Subject | None:
        """The baseline, where it is a model."""
        if self.check.baseline is None or self.check.json_baseline:
            return None
        return self.other(self.check.baseline)

    @cached_property
    def _others(self) -> dict[str, Subject]:
        return {}

    def other(self, path: str) -> Subject:
        """A reference model; loaded once for all models of the check."""
        if path not in self._others:
            file = self.check.folder / path
            self._others[path] = Subject(
                path, file, self.check.input_shapes, self.check.ignore_ops
            )
        return self._others[path]

    def entry(self, subject: Subject) -> Entry | None:
        """What the model is compared with: a line of the baseline, or a model."""
        if self.base_model is not None:
            return Entry(self.base_model.costs)
        return self.baselines.get(subject.name)


def cases(
    budget: Budget, models: Sequence[str] = (), fresh: bool = False
) -> list[Case]:
    """Find every model and baseline before anything is measured.

    `fresh` leaves baseline files unread. UsageError for what isn't there.
    """
    found: list[Case] = []
    unmatched = dict.fromkeys(models)
    for one in budget.checks:
        for limit in one.limits:
            if limit.device is not None:
                runs.device(limit.device, one.folder)
        names = config.models_of(one, models)
        paths = {(one.folder / name).resolve() for name in names}
        for given in list(unmatched):
            if Path(given).resolve() in paths:
                unmatched.pop(given)
        subjects = tuple(_subject(one, name) for name in names)
        found.append(Case(one, subjects, {} if fresh else _read_baseline(one)))
    for name in unmatched:
        raise UsageError(
            f"{name}: no check of {budget.file or 'the budget'} holds this model"
        )
    _same_shapes_per_baseline(found)
    return found


def _subject(one: Check, name: str) -> Subject:
    path = one.folder / name
    if not files.is_file(path):
        raise UsageError(f"{name}: {'not a file' if path.exists() else 'no such file'}")
    return Subject(name, path, one.input_shapes, one.ignore_ops)


def _case(one: Check, model: ir.Model) -> Case:
    name = one.name if one.name != "check 1" else model.graph.name or "model"
    subject = Subject(name, model, one.input_shapes, one.ignore_ops)
    return Case(one, (subject,), _read_baseline(one))


def _read_baseline(one: Check) -> Mapping[str, Entry]:
    if one.json_baseline:
        return baseline.read(one.json_baseline)
    if one.baseline is not None and not files.is_file(one.folder / one.baseline):
        raise UsageError(f"{one.baseline}: no such baseline model")
    return {}


def _same_shapes_per_baseline(found: Iterable[Case]) -> None:
    """A baseline file has one line per model; it can't hold two input shapes."""
    shapes: dict[tuple[Path, str], Mapping[str, tuple[int, ...]]] = {}
    for case in found:
        for subject in case.subjects:
            if case.check.json_baseline:
                key = (case.check.json_baseline, subject.name)
                if shapes.setdefault(key, subject.input_shapes) != subject.input_shapes:
                    raise RuleError(
                        f"check {case.check.name!r}: another check holds "
                        f"{subject.name} at another input_shape in the same baseline; "
                        "name another file"
                    )


# -- results ------------------------------------------------------------------------


def _report(found: Sequence[Case], whole: bool) -> Report:
    results: list[Result] = []
    changes: dict[tuple[str, str], ModelChange] = {}
    for case in found:
        for subject in case.subjects:
            for limit in case.check.limits:
                results += _results(case, subject, limit)
            if case.check.baseline is not None:
                change = _change(case, subject)
                changes[case.check.baseline, change.model] = change
            results += _layer_results(case, subject)
            _forget(subject)
        results += _matchless(case)
    if whole:
        for key, change in _removed(found):
            changes.setdefault(key, change)
    return Report(tuple(results), tuple(changes.values()))


def _forget(subject: Subject) -> None:
    """Keep the figures, not the model: memory doesn't grow with their number."""
    if isinstance(subject.source, Path):
        weights = subject.costs.totals.get("weight_size", 0)
        for name in ("model", "shapes", "profile"):
            subject.__dict__.pop(name, None)
        if weights > COLLECTED:
            gc.collect()  # graphs are full of circles


def _change(case: Case, subject: Subject) -> ModelChange:
    entry = case.entry(subject)
    return baseline.compare(subject.name, entry.costs if entry else None, subject.costs)


def _removed(found: Sequence[Case]) -> Iterable[tuple[tuple[str, str], ModelChange]]:
    """Models of a baseline that no check holds any more."""
    held = {(c.check.json_baseline, s.name) for c in found for s in c.subjects}
    for case in found:
        for name, entry in case.baselines.items():
            if (case.check.json_baseline, name) not in held:
                key = (case.check.baseline or "", name)
                yield key, baseline.compare(name, entry.costs, None)


def _results(case: Case, subject: Subject, limit: Limit) -> list[Result]:
    """One result per bound of a limit; what can't be measured says why."""
    blank = [_blank(case, subject, limit, bound) for bound in limit.bounds]
    if limit.metric.source == "latency":
        return [_latency(case, subject, limit, blank[0])]
    try:
        value = _value(case, subject, limit)
    except SqueezeError as error:
        return [replace(r, reason=subject.plain(error)) for r in blank]
    return [_judged(case, subject, limit, result, value) for result in blank]


def _blank(case: Case, subject: Subject, limit: Limit, bound: str) -> Result:
    return Result(
        name=case.check.name,
        model=subject.name,
        metric=limit.metric.name,
        level=limit.level,
        bound=bound,
        wanted=limit.bounds[bound].text,
        status="unmeasured",
    )


def _judged(
    case: Case, subject: Subject, limit: Limit, blank: Result, value: Fraction
) -> Result:
    base = None
    if blank.bound in RELATIVE:
        try:
            base = _base(case, subject, limit)
        except SqueezeError as error:
            return replace(blank, value=_number(value), reason=subject.plain(error))
    allowed = verdict.effective(blank.bound, limit.bounds[blank.bound], base)
    measured = replace(
        blank,
        limit=_number(allowed),
        value=_number(value),
        baseline=None if base is None else _number(base),
    )
    if verdict.within(blank.bound, value, allowed):
        return replace(measured, status="within")
    reason = verdict.excess(blank.metric, blank.bound, value, allowed)
    if base is not None:
        reason += f"; the baseline is {show(base, limit.metric.family)}"
    return _advised(
        case, subject, limit, replace(measured, status="over", reason=reason)
    )


def _advised(case: Case, subject: Subject, limit: Limit, result: Result) -> Result:
    """Add the layers that weigh most and the command that would help."""
    return replace(
        result,
        heaviest=advice.heaviest(result.metric, subject.costs),
        remedy=advice.remedy(result.metric, _troubled(case, subject, limit, result)),
    )


def _troubled(
    case: Case, subject: Subject, limit: Limit, result: Result
) -> advice.Case:
    keep = Fraction(0)
    if result.value and result.limit is not None:
        keep = max(Fraction(result.limit) / Fraction(result.value), Fraction(0))
    base = case.check.baseline if case.base_model else None
    return advice.Case(
        subject.name,
        subject.costs,
        keep,
        limit.data or "DATA",
        limit.reference or base or "ORIGINAL",
    )


def _number(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


# -- values -------------------------------------------------------------------------


def _value(case: Case, subject: Subject, limit: Limit) -> Fraction:
    """The metric of a model, in its base unit; SqueezeError where it can't be told."""
    return _VALUES[limit.metric.source](case, subject, limit)


def _cost(case: Case, subject: Subject, limit: Limit) -> Fraction:
    name = limit.metric.name
    if name not in subject.costs.totals:
        raise SqueezeError(subject.costs.missing[name])
    return Fraction(subject.costs.totals[name])


def _outputs(case: Case, subject: Subject, limit: Limit) -> Fraction:
    data = _data(case, subject, limit)
    if limit.metric.name == "accuracy":
        return _exact(runs.accuracy(subject, data))
    reference = case.other(limit.reference) if limit.reference else case.base_model
    if reference is None:
        raise SqueezeError('with which model? name it: reference = "float.onnx"')
    return _exact(runs.agreement(subject, reference, data))


def _data(case: Case, subject: Subject, limit: Limit) -> Data:
    if limit.data is None:
        raise SqueezeError(f'{limit.metric.name} needs data = "val.npz"')
    return runs.open_for(subject, limit.data, case.check.folder, case.check.images)


def _predicted(case: Case, subject: Subject, limit: Limit) -> Fraction:
    if limit.device is None:
        raise SqueezeError('on which machine? name it: device = "cortex-m7"')
    machine = runs.device(limit.device, case.check.folder)
    unknown = subject.costs.missing.get("macs")
    if unknown:
        raise SqueezeError(unknown)
    return _exact(runs.predicted_ms(subject, machine))


def _exact(share: float) -> Fraction:
    return Fraction(share).limit_denominator(10**9)


_VALUES: dict[str, Callable[[Case, Subject, Limit], Fraction]] = {
    "profile": _cost,
    "outputs": _outputs,
    "device": _predicted,
}


def _base(case: Case, subject: Subject, limit: Limit) -> Fraction:
    """What the metric is compared with: of a reference model, or of the baseline."""
    reference = case.other(limit.reference) if limit.reference else case.base_model
    if reference is not None:
        try:
            return _value(case, reference, limit)
        except SqueezeError as error:
            raise SqueezeError(f"{reference.name}: {reference.plain(error)}") from error
    entry = case.entry(subject)
    if entry is None:
        raise SqueezeError(
            f"a new model, not in {case.check.baseline}; if it is wanted: "
            "squeeze check --update-baseline"
        )
    value = entry.value(limit.metric.name)
    if value is None:
        raise SqueezeError(
            f"{case.check.baseline} has no {limit.metric.name} of it; "
            "squeeze check --update-baseline"
        )
    return Fraction(value) if isinstance(value, int) else _exact(value)


def _latency(case: Case, subject: Subject, limit: Limit, blank: Result) -> Result:
    allowed = 1 + limit.bounds["max_increase"].amount
    try:
        reference = case.other(limit.reference) if limit.reference else case.base_model
        assert reference is not None  # configuration asks for one
        found = runs.latency(subject, reference, float(allowed), limit.seconds)
    except SqueezeError as error:
        return replace(blank, limit=_number(allowed), reason=subject.plain(error))
    span = f"×{found.low:.3g} to ×{found.high:.3g} of {reference.name}"
    measured = replace(
        blank,
        limit=_number(allowed),
        value=found.value,
        baseline=1.0,
        interval=(found.low, found.high),
        reason=span,
    )
    outcome = found.verdict(float(allowed))
    if outcome == "unclear":
        return replace(measured, reason=f"the machine is too noisy to tell: {span}")
    if outcome == "within":
        return replace(measured, status="within")
    over = verdict.excess(
        "latency", "max_increase", _exact(found.value - 1), allowed - 1
    )
    result = replace(measured, status="over", reason=f"{over} ({span})")
    return _advised(case, subject, limit, result)


# -- layers -------------------------------------------------------------------------


def _layer_results(case: Case, subject: Subject) -> list[Result]:
    results: list[Result] = []
    for rule in case.check.layers:
        for limit in rule.limits:
            for bound in limit.bounds:
                blank = replace(_blank(case, subject, limit, bound), layer=rule.label)
                results += _layer_rule(case, subject, rule, limit, blank)
    return results


def _layer_rule(
    case: Case, subject: Subject, rule: LayerLimit, limit: Limit, blank: Result
) -> list[Result]:
    """Every layer that is over, or else the one nearest to its limit."""
    costs = subject.costs
    if not costs.layers and limit.metric.name in costs.missing:
        return [replace(blank, reason=costs.missing[limit.metric.name])]
    unknown = [n for n, op in costs.uncounted.items() if _matches(rule, n, op)]
    if unknown:
        return [replace(blank, layer=unknown[0], reason=costs.missing["macs"])]
    entry = case.entry(subject) if blank.bound in RELATIVE else None
    if blank.bound in RELATIVE and entry is None:
        return [replace(blank, reason=f"a new model, not in {case.check.baseline}")]
    judged = [
        _layer(limit, replace(blank, layer=name), layer, entry)
        for name, layer in costs.layers.items()
        if _matches(rule, name, layer.op)
    ]
    over = [
        _advised_layer(case, subject, limit, result)
        for result in judged
        if not result.passed
    ]
    return over or sorted(judged, key=_tightness)[-1:]


def _matches(rule: LayerLimit, name: str, op: str) -> bool:
    named = name == rule.match or fnmatchcase(name, rule.match)
    return named and fnmatchcase(op, rule.op)


def _layer(
    limit: Limit, blank: Result, layer: LayerCosts, entry: Entry | None
) -> Result:
    """A layer that is new in a known model did cost nothing before."""
    metric = limit.metric.name
    value, base = Fraction(layer.costs[metric]), None
    if entry is not None:
        before = entry.costs.layers.get(blank.layer or "")
        base = Fraction(before.costs[metric] if before else 0)
    allowed = verdict.effective(blank.bound, limit.bounds[blank.bound], base)
    reason, status = "", verdict.within(blank.bound, value, allowed)
    if not status:
        reason = verdict.excess(metric, blank.bound, value, allowed)
    return replace(
        blank,
        status="within" if status else "over",
        limit=_number(allowed),
        value=_number(value),
        baseline=None if base is None else _number(base),
        reason=reason,
    )


def _advised_layer(
    case: Case, subject: Subject, limit: Limit, result: Result
) -> Result:
    """What the layer weighs of the model, and the command for it alone."""
    metric, layer = limit.metric.name, result.layer or ""
    amount = subject.costs.layers[layer].costs[metric]
    total = sum(one.costs[metric] for one in subject.costs.layers.values())
    troubled = _troubled(case, subject, limit, result)
    return replace(
        result,
        heaviest=(verdict.Share(layer, amount, amount / total),) if total else (),
        remedy=advice.layer_remedy(metric, layer, troubled),
    )


def _tightness(result: Result) -> float:
    return (result.value or 0) / result.limit if result.limit else 0.0


def _matchless(case: Case) -> list[Result]:
    """A rule that matches no layer of any model holds nothing: that is no pass."""
    known = [
        (name, layer.op)
        for subject in case.subjects
        for name, layer in [
            *subject.costs.layers.items(),
            *((n, LayerCosts(op, {})) for n, op in subject.costs.uncounted.items()),
        ]
    ]
    if not known:
        return []  # no layers at all: each limit said why
    return [
        replace(
            _blank(case, case.subjects[0], limit, bound),
            layer=rule.label,
            reason="no layer of this name or op; squeeze profile lists them",
        )
        for rule in case.check.layers
        if not any(_matches(rule, name, op) for name, op in known)
        for limit in rule.limits
        for bound in limit.bounds
    ]


# -- baselines ----------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """A baseline file as it will be, and what that changes."""

    path: Path
    content: Mapping[str, Entry]
    changes: tuple[ModelChange, ...]


def updates(budget: Budget, models: Sequence[str] = ()) -> list[Update]:
    """The baseline files of a budget, measured anew; nothing is written here.

    Models that no check holds any more leave the file, unless `models` were given.
    SqueezeError where a limit could not be compared with what would be written.
    """
    found = [c for c in cases(budget, models, fresh=True) if c.check.json_baseline]
    if not found:
        raise UsageError(
            'no check has a baseline file; add baseline = "squeeze-baseline.json"'
        )
    entries: dict[Path, dict[str, Entry]] = {}
    for case in found:
        path = case.check.json_baseline
        assert path is not None
        for subject in case.subjects:
            known = entries.setdefault(path, {})
            entry = _entry(case, subject)
            earlier = known.get(subject.name)
            measured = {**(earlier.measured if earlier else {}), **entry.measured}
            known[subject.name] = replace(entry, measured=measured)
            _forget(subject)
    return [_update(path, content, bool(models)) for path, content in entries.items()]


def _entry(case: Case, subject: Subject) -> Entry:
    measured: dict[str, float] = {}
    for limit in case.check.limits:
        relative = any(bound in RELATIVE for bound in limit.bounds)
        stored = (
            relative and limit.reference is None and limit.metric.source != "latency"
        )
        if not stored:
            continue
        try:
            value = _value(case, subject, limit)
        except SqueezeError as error:
            if limit.level == "error":
                where = f"{subject.name}: {limit.metric.name}"
                raise SqueezeError(f"{where}: {subject.plain(error)}") from error
            continue
        if limit.metric.name in baseline.EXTRAS:
            measured[limit.metric.name] = float(value)
    return Entry(subject.costs, subject.digest(), measured)


def _update(path: Path, content: dict[str, Entry], partial: bool) -> Update:
    old: Mapping[str, Entry] = {}
    if path.exists():
        try:
            old = baseline.read(path)
        except RuleError:  # a merge conflict, say: that is what is being repaired
            if partial:
                raise
    if partial:
        content = {**old, **content}
    changes = [
        baseline.compare(
            name,
            old[name].costs if name in old else None,
            content[name].costs if name in content else None,
        )
        for name in sorted({*old, *content})
    ]
    return Update(path, content, tuple(changes))
