"""Results of `squeeze check`: JSON, tables, and Markdown for pull requests."""

from __future__ import annotations

import re
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from squeeze import __version__
from squeeze.budget.baseline import LayerChange, ModelChange
from squeeze.budget.metrics import COSTS, LAYER_METRICS, METRICS
from squeeze.budget.units import show
from squeeze.budget.verdict import Report, Result
from squeeze.report.table import Column, Table, markdown

SCHEMA = 1
MARKER = "<!-- squeeze-check -->"
WORDS = {"within": "ok", "over": "over", "unmeasured": "not measured"}
SHOWN = 12  # layers of a change, unless all are asked for
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Text from a model or configuration without control characters."""
    return _CONTROL.sub("�", text).replace("##[", "## [")


# -- JSON ---------------------------------------------------------------------------


def report_json(report: Report) -> dict[str, Any]:
    """`squeeze check --json`; its schema is schemas/check.schema.json."""
    return {
        "schema": SCHEMA,
        "tool": f"squeeze {__version__}",
        "passed": report.passed,
        "status": report.status,
        "results": [_result_json(r) for r in report.results],
        "changes": [_change_json(c) for c in report.changes],
        "notes": list(report.notes),
    }


def _result_json(result: Result) -> dict[str, Any]:
    row = asdict(result)
    row["passed"] = result.passed
    row["heaviest"] = [asdict(share) for share in result.heaviest]
    row["interval"] = list(result.interval) if result.interval else None
    return row


def _change_json(change: ModelChange) -> dict[str, Any]:
    return {
        "model": change.model,
        "kind": change.kind,
        "before": dict(change.before.totals) if change.before else None,
        "after": dict(change.after.totals) if change.after else None,
        "layers": [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "before": dict(layer.before.costs) if layer.before else None,
                "after": dict(layer.after.costs) if layer.after else None,
            }
            for layer in change.layers
        ],
    }


# -- text ---------------------------------------------------------------------------


def family(result: Result) -> str:
    return METRICS[result.metric].family


def value_text(result: Result) -> str:
    """The value, in the metric's unit; a ratio for latency."""
    if result.value is None:
        return "–"
    if result.metric == "latency":
        return f"×{result.value:.3g}"
    return show(Fraction(result.value), family(result))


def limit_text(result: Result) -> str:
    """The limit as written, and what it comes to where that isn't the same."""
    sign = {"max": "≤", "min": "≥", "max_increase": "≤ +", "max_drop": "≥ −"}[
        result.bound
    ]
    text = f"{sign} {result.wanted}".replace("+ ", "+").replace("− ", "−")
    relative = result.bound in ("max_increase", "max_drop") and result.limit is not None
    if relative and result.metric != "latency":
        text += f" = {show(Fraction(result.limit or 0), family(result))}"
    return text


def verdict_text(result: Result) -> str:
    word = WORDS[result.status]
    return word if result.passed or result.level == "error" else f"{word} (warning)"


def explanation(result: Result) -> str:
    """What failed and by how much, what weighs most, which command would help."""
    parts = [result.reason] if result.reason else []
    if result.heaviest:
        heavy = ", ".join(f"{s.layer} {100 * s.share:.3g} %" for s in result.heaviest)
        parts.append(f"heaviest: {heavy}")
    if result.remedy:
        parts.append(f"try: {result.remedy}")
    return clean("; ".join(parts))


def headline(result: Result) -> str:
    """One line: the model, the metric, its value and its limit."""
    title = METRICS[result.metric].title
    return clean(
        f"{result.subject}: {title} {value_text(result)}, {limit_text(result)}"
    )


# -- tables -------------------------------------------------------------------------

STYLES = {"within": "", "over": "red", "unmeasured": "magenta"}


def results_table(report: Report) -> Table:
    """One row per limit, the failures explained below."""
    columns = [
        Column("check", "left"),
        Column("model", "left"),
        Column("metric", "left"),
        Column("value"),
        Column("limit"),
        Column("baseline"),
        Column("", "left"),
    ]
    rows = [
        (
            clean(r.name),
            clean(r.subject),
            METRICS[r.metric].title,
            value_text(r),
            limit_text(r),
            _baseline_text(r),
            verdict_text(r),
        )
        for r in report.results
    ]
    styles = [_style(r) for r in report.results]
    return Table("", columns, rows, _notes(report), styles)


def _style(result: Result) -> str:
    if not result.passed and result.level == "warn":
        return "yellow"
    return STYLES[result.status]


def _baseline_text(result: Result) -> str:
    if result.baseline is None or result.metric == "latency":
        return ""
    return show(Fraction(result.baseline), family(result))


def _notes(report: Report) -> list[str]:
    notes = [
        f"{verdict_text(r)}: {headline(r)}: {explanation(r)}" for r in report.failures()
    ]
    notes += [clean(note) for note in report.notes]
    return [*notes, summary(report)]


def summary(report: Report) -> str:
    """One line on the whole."""
    failing = [r for r in report.results if r.fails]
    warnings = sum(1 for r in report.results if not r.passed and not r.fails)
    over = sum(r.status == "over" for r in failing)
    blind = len(failing) - over
    told = [f"{over} over" if over else "", f"{blind} not measured" if blind else ""]
    told += [
        f"{warnings} {'warning' if warnings == 1 else 'warnings'}" if warnings else ""
    ]
    total = len(report.results)
    verdict = "passed" if report.passed else "failed"
    detail = ", ".join(t for t in told if t)
    limits = f"{total} {'limit' if total == 1 else 'limits'}"
    return f"{verdict}: {limits}{', ' + detail if detail else ''}"


# -- against the baseline -----------------------------------------------------------


def changes_table(report: Report) -> Table | None:
    """Totals of every model that changed, came or went; None where none did."""
    changed = [c for c in report.changes if c.kind != "unchanged"]
    if not changed:
        return None
    shown = [m for m in COSTS.values() if m.name != "flops"]
    columns = [Column("model", "left"), Column("", "left"), Column("layers")]
    columns += [Column(m.title) for m in shown]
    rows = [
        (
            clean(c.model),
            c.kind,
            str(len(c.layers)) if c.layers else "",
            *(_delta(c, m.name, m.family) for m in shown),
        )
        for c in changed
    ]
    return Table("against the baseline", columns, rows)


def _delta(change: ModelChange, metric: str, kind: str) -> str:
    before = change.before.totals.get(metric) if change.before else None
    after = change.after.totals.get(metric) if change.after else None
    if before is None or after is None:
        only = after if before is None else before
        return "–" if only is None else show(Fraction(only), kind)
    if before == after:
        return "="
    return f"{_signed(after - before, kind)}{_relative(after - before, before)}"


def _signed(amount: int, kind: str) -> str:
    return f"{'+' if amount > 0 else '−'}{show(Fraction(abs(amount)), kind)}"


def _relative(delta: int, before: int) -> str:
    return f" ({100 * delta / before:+.3g} %)".replace("-", "−") if before else ""


def why_tables(report: Report, every: bool = False) -> list[Table]:
    """For each changed model the layers that caused it, the largest change first."""
    return [
        _why_table(change, change.layers if every else change.layers[:SHOWN])
        for change in report.changes
        if change.layers
    ]


def _why_table(change: ModelChange, layers: tuple[LayerChange, ...]) -> Table:
    shown = [LAYER_METRICS[name] for name in ("macs", "params", "weight_size")]
    columns = [Column("layer", "left"), Column("op", "left"), Column("", "left")]
    columns += [Column(m.title) for m in shown]
    rows = [
        (
            clean(layer.name),
            clean(_op(layer)),
            layer.kind,
            *(_layer_delta(layer, m.name, m.family) for m in shown),
        )
        for layer in layers
    ]
    hidden = len(change.layers) - len(layers)
    notes = [f"{hidden} more layers: --why shows all"] if hidden else []
    return Table(f"{clean(change.model)}: layers that changed", columns, rows, notes)


def _op(layer: LayerChange) -> str:
    known = layer.after or layer.before
    return known.op if known else ""


def _layer_delta(layer: LayerChange, metric: str, kind: str) -> str:
    delta = layer.delta(metric)
    before = layer.before.costs.get(metric, 0) if layer.before else 0
    return f"{_signed(delta, kind)}{_relative(delta, before)}" if delta else "="


# -- Markdown -----------------------------------------------------------------------


def report_markdown(report: Report, why: bool = False) -> str:
    """For a pull request; the hidden marker lets a bot find and replace its comment."""
    title = "passed" if report.passed else "failed"
    parts = [MARKER, f"### squeeze check: {title}", "", markdown(_bare(report))]
    failures = report.failures()
    if failures:
        parts += ["", *(f"- {_failure(r)}" for r in failures)]
    if (table := changes_table(report)) is not None:
        parts += ["", markdown(table)]
    tables = why_tables(report, every=why)
    if tables:
        body = "\n".join(markdown(t) for t in tables)
        parts += ["", f"<details><summary>Layers</summary>\n\n{body}\n</details>"]
    parts += ["", f"{summary(report)} · squeeze {__version__}"]
    return "\n".join(parts) + "\n"


def _bare(report: Report) -> Table:
    full = results_table(report)
    rows = [[_escaped(cell) for cell in row] for row in full.rows]
    return Table("", full.columns, rows)


def _failure(result: Result) -> str:
    text = _escaped(explanation(result))
    if result.remedy:
        text = text.replace(_escaped(clean(result.remedy)), _code(clean(result.remedy)))
    return f"**{verdict_text(result)}**: {_escaped(headline(result))}: {text}"


def _code(text: str) -> str:
    return f"`{text.replace('`', 'ˋ')}`"


def _escaped(text: str) -> str:
    """No HTML, links, mentions or emphasis from names."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]~])", r"\\\1", text)
    return text.replace("@", "@\u200b")
