"""What could be pruned, and widths side by side, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from squeeze.report.costs import totals_json
from squeeze.report.table import SCHEMA, Column, Table, ratio, share, si

if TYPE_CHECKING:
    from squeeze.cost import Totals
    from squeeze.rewrite.channels.explain import Explanation

SHOWN = 3  # names in a cell before the rest is counted


def explanation_json(found: Explanation) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": found.model,
        "macs": found.macs,
        "reachable_macs": found.reachable,
        "families": [asdict(f) for f in found.families],
        "protected": [{"reason": r, "channels": n} for r, n in found.protected],
        "barriers": [asdict(b) for b in found.barriers],
    }


def tables(found: Explanation) -> list[Table]:
    """Families; then what protects the rest; then the nodes that block."""
    columns = [
        Column("family", "left"),
        Column("layers", "left"),
        Column("units"),
        Column("channels each"),
        Column("sinks", "left"),
        Column("exact", "left"),
        Column("MACs"),
    ]
    rows = [
        (
            f.name,
            _names(f.layers),
            str(f.units),
            ", ".join(map(str, f.sizes)),
            _names(f.sinks),
            "yes" if f.exact else "statistics shift",
            share(f.macs, found.macs),
        )
        for f in found.families
    ]
    note = (
        f"{sum(f.units for f in found.families)} units in {len(rows)} families; "
        f"at one unit each {si(found.reachable)} of {si(found.macs)} MACs would remain"
    )
    result = [Table(found.model, columns, rows, [note])]
    if found.protected:
        kept = [Column("protected because", "left"), Column("channels")]
        result.append(Table("", kept, [(r, str(n)) for r, n in found.protected]))
    if found.barriers:
        names = [Column("node", "left"), Column("op", "left"), Column("reason", "left")]
        blocked = [(b.name, b.op, b.reason) for b in found.barriers]
        result.append(Table("nothing passes these", names, blocked))
    return result


def _names(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def widths_json(model: str, rows: Sequence[tuple[float, Totals]]) -> dict[str, Any]:
    widths = [{"multiplier": m, **totals_json(t)} for m, t in rows]
    return {"schema": SCHEMA, "model": model, "widths": widths}


def widths_table(model: str, rows: Sequence[tuple[float, Totals]]) -> Table:
    """One line per multiplier, as MobileNets' Table 6."""
    columns = [Column("width"), Column("MACs"), Column("exactly"), Column("parameters")]
    columns += [Column("of the first")]
    first = rows[0][1].macs
    lines = [
        (f"{m:g}", si(t.macs), f"{t.macs:,}", si(t.params), ratio(t.macs, first))
        for m, t in rows
    ]
    return Table(model, columns, lines, ["nothing written: pass one --multiplier"])
