"""Two models side by side, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from squeeze.measure.cases import Case
from squeeze.measure.fidelity import Accuracy, Comparison, Output
from squeeze.measure.latency import Bench
from squeeze.measure.trace import Difference
from squeeze.report.bench import ratio_text
from squeeze.report.costs import before_after, totals_json
from squeeze.report.table import SCHEMA, Column, Table, bar, milliseconds


@dataclass(frozen=True)
class Report:
    """Costs, outputs, and where asked for: values by layer, times."""

    base: Case
    new: Case
    found: Comparison
    differences: Sequence[Difference] = ()
    bench: Bench | None = None


def compare_json(report: Report) -> dict[str, Any]:
    """`squeeze compare --json`."""
    found, bench = report.found, report.bench
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "base": str(report.base.path),
        "new": str(report.new.path),
        "before": totals_json(report.base.costs.totals),
        "after": totals_json(report.new.costs.totals),
        "source": found.source,
        "samples": found.samples,
        "relative_error": found.relative_error,
        "finite": all(output.finite for output in found.outputs),
        "outputs": [asdict(output) for output in found.outputs],
        "accuracy": asdict(found.accuracy) if found.accuracy else None,
        "latency": None,
        "notes": list(found.notes),
        "layers": [asdict(difference) for difference in report.differences],
    }
    if bench:
        (ratio,) = bench.ratios
        document["latency"] = {
            "before_ms": bench.timings[0].median_ms,
            "after_ms": bench.timings[1].median_ms,
            "ratio": ratio.ratio,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }
    return document


def documents(reports: Sequence[Report]) -> dict[str, Any]:
    """One comparison as it is; several as `models`, each like one of its own."""
    found = [compare_json(report) for report in reports]
    if len(found) == 1:
        return found[0]
    return {"schema": SCHEMA, "base": found[0]["base"], "models": found}


def tables(report: Report, top: int | None = None) -> list[Table]:
    """Layers where asked for, then outputs, then costs."""
    found = []
    if report.differences:
        found.append(_layers_table(report.differences, top))
    found.append(_outputs_table(report.found))
    found.append(_costs_table(report))
    return found


def _outputs_table(found: Comparison) -> Table:
    columns = [
        Column("output", "left"),
        Column("max |Δ|"),
        Column("mean |Δ|"),
        Column("relative"),
        Column("cosine"),
        Column("SNR"),
        Column("top-1 same"),
        Column("in top-5"),
    ]
    rows = [_output_row(output) for output in found.outputs]
    notes = [note for output in found.outputs for note in _output_notes(output)]
    if found.source.startswith("random"):
        notes.append("random inputs: pass --data for how much it matters in practice")
    return Table(
        f"Outputs on {found.samples} samples of {found.source}",
        columns,
        rows,
        [*notes, *found.notes],
    )


def _output_row(output: Output) -> list[str]:
    if not output.finite:
        return [output.name, "NaN or Inf", *["–"] * 6]
    snr = "equal" if output.equal else _number(output.snr_db, "{:.1f} dB")
    return [
        output.name,
        _number(output.max_abs, "{:.3g}"),
        _number(output.mean_abs, "{:.3g}"),
        _number(output.relative, "{:.3g}"),
        _number(output.cosine, "{:.6f}"),
        snr,
        _number(output.top1, "{:.2%}"),
        _number(output.top5, "{:.2%}"),
    ]


def _output_notes(output: Output) -> list[str]:
    if output.finite:
        return []
    return [
        f"{output.name}: not comparable: {output.nonfinite_base:,} NaN or Inf in the "
        f"base, {output.nonfinite_new:,} in the new model, of {output.elements:,}"
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _costs_table(report: Report) -> Table:
    totals = (report.base.costs.totals, report.new.costs.totals)
    rows = [list(row) for row in before_after(*totals)]
    if report.bench:
        (ratio,) = report.bench.ratios
        before, after = (t.median_ms for t in report.bench.timings)
        text = f"×{ratio.ratio:.3g}, {ratio_text(ratio)}"
        rows.append(["latency", milliseconds(before), milliseconds(after), text])
    if report.found.accuracy:
        rows.append(_accuracy_row(report.found.accuracy))
    columns = [Column("", "left"), Column("base"), Column("new"), Column("new ÷ base")]
    return Table(f"{report.base.path} → {report.new.path}", columns, rows)


def _accuracy_row(found: Accuracy) -> list[str]:
    interval = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
    difference = f"{100 * found.difference:+.2f} pp ({interval})"
    return ["accuracy", f"{found.base:.2%}", f"{found.new:.2%}", difference]


def _layers_table(differences: Sequence[Difference], top: int | None) -> Table:
    columns = [
        Column("value", "left"),
        Column("layer", "left"),
        Column("op", "left"),
        Column("relative error"),
        Column("added here"),
        Column("", "left"),
    ]
    shown = list(differences)
    if top is not None:
        shown = sorted(shown, key=lambda d: -(d.added or 0.0))[:top]
    worst = max((d.relative or 0.0 for d in differences), default=0.0)
    rows = [
        [
            d.value,
            d.layer,
            d.op,
            "NaN or Inf" if d.relative is None else f"{d.relative:.3g}",
            "" if d.added is None else f"{d.added:+.2g}",
            bar(d.relative or 0.0, worst),
        ]
        for d in shown
    ]
    hidden = len(differences) - len(shown)
    notes = [f"{hidden} more values: raise --top"] if hidden else []
    return Table("Values that both models compute", columns, rows, notes)
