"""What a rewrite did: changes and costs, as JSON and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from squeeze.report.costs import before_after, totals_json
from squeeze.report.distilled import summary_table, training_json
from squeeze.report.table import SCHEMA, Column, Table, milliseconds, ratio, si
from squeeze.rewrite.plan import Change, Result


def result_json(result: Result) -> dict[str, Any]:
    """Every rewrite's `--json`."""
    return {
        "schema": SCHEMA,
        "input": result.input,
        "output": result.output,
        "before": totals_json(result.before),
        "after": totals_json(result.after),
        "changes": [change.json() for change in result.changes],
        "latency": asdict(result.latency) if result.latency else None,
        "fidelity": asdict(result.fidelity) if result.fidelity else None,
        "distilled": training_json(result.trained) if result.trained else None,
        "notes": list(result.notes),
    }


def tables(result: Result) -> list[Table]:
    """The changes, how training went, then the whole model before and after."""
    trained = [summary_table(result.trained, "Training")] if result.trained else []
    return [changes_table(result.changes), *trained, totals_table(result)]


def changes_table(changes: Sequence[Change]) -> Table:
    """One line per site: taken with its costs, or refused with the reason."""
    fitted = any(change.fit_error is not None for change in changes)
    columns = [
        Column("site", "left"),
        Column("", "left"),
        Column("MACs"),
        Column("after"),
        Column(""),
        Column("params"),
        Column("after"),
        *([Column("error")] if fitted else []),
        Column("what, or why not", "left"),
    ]
    rows = []
    for change in changes:
        row = [change.site, "✓" if change.applied else "–", *_costs(change)]
        if fitted:
            row.append("" if change.fit_error is None else f"{change.fit_error:.3f}")
        rows.append([*row, change.reason if not change.applied else _what(change)])
    styles = ["" if change.applied else "dim" for change in changes]
    return Table("", columns, rows, styles=styles)


def _costs(change: Change) -> list[str]:
    before, after = change.before, change.after
    return [
        si(before.macs) if before else "",
        si(after.macs) if after else "",
        ratio(after.macs, before.macs) if before and after else "",
        si(before.params) if before else "",
        si(after.params) if after else "",
    ]


def _what(change: Change) -> str:
    words = [str(change.details[k]) for k in ("block", "method") if k in change.details]
    settings = change.details.get("params")
    shown = settings if isinstance(settings, dict) else {}
    for key in ("size", "grid"):  # (before, after), as `resolution` gives them
        if key in change.details:
            before, after = ("×".join(map(str, n)) for n in change.details[key])
            words.append(f"{key} {before} → {after}")
    for key in ("rank", "channels", "shape"):
        if key in change.details:
            shown = {**shown, key: change.details[key]}
    words += [f"{name}={_short(value)}" for name, value in shown.items()]
    return " ".join([*words, f"({change.reason})"] if change.reason else words)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def totals_table(result: Result) -> Table:
    """Costs before and after, and latency where it was measured."""
    rows = [list(row) for row in before_after(result.before, result.after)]
    if latency := result.latency:
        rows.append(
            [
                "latency",
                milliseconds(latency.before_ms),
                milliseconds(latency.after_ms),
                f"×{latency.ratio:.3g} "
                f"({latency.ratio_low:.3g}–{latency.ratio_high:.3g})",
            ]
        )
    if found := result.fidelity:
        rows += _fidelity_rows(found)
    columns = [Column("", "left"), Column("before"), Column("after"), Column("remains")]
    where = f" → {result.output}" if result.output else ", nothing written"
    notes = list(result.notes)
    if found:
        notes.append(f"outputs compared on {found.samples} samples: {found.split}")
    return Table(f"{result.input}{where}", columns, rows, notes)


def _fidelity_rows(found: Any) -> list[list[str]]:
    rows = []
    if found.accuracy_before is not None:
        before, after = found.accuracy_before, found.accuracy_after
        points = f"{100 * (after - before):+.2f} pp"
        rows.append(["accuracy", f"{before:.2%}", f"{after:.2%}", points])
    if found.agreement is not None:
        rows.append(["same top class", "", "", f"{found.agreement:.2%}"])
    rows.append(["output error", "", "", f"{found.relative_error:.3g}"])
    return rows


def warnings(result: Result) -> list[str]:
    """What a user should not miss: on stderr as well when stdout holds a document."""
    found = list(result.notes)
    if not result.applied:
        reasons = Counter(c.reason for c in result.changes if c.reason)
        why = f": {reasons.most_common(1)[0][0]}" if reasons else ""
        found.append(f"{Path(result.input).name}: nothing could be applied{why}")
    return found
