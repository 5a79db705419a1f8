"""Blocks as tables: the list, and one on an example convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from squeeze import rules
from squeeze.report.table import SCHEMA, Column, Table, dims, ratio
from squeeze.rewrite import blocks
from squeeze.rewrite.blocks import Rule
from squeeze.rewrite.build import Refused
from squeeze.rewrite.explain import PROBES, Explained, explain
from squeeze.rewrite.expressions import Value


@dataclass(frozen=True)
class Shown:
    """A rule with the settings asked for, and what it builds on an example."""

    rule: Rule
    settings: Mapping[str, Value]
    explained: Explained | None


def listing() -> list[Rule]:
    """Every block that squeeze ships."""
    return [blocks.load(name) for name in rules.names("blocks")]


def listing_json(listed: Sequence[Rule]) -> dict[str, Any]:
    """Name, summary, source and defaults of every block."""
    return {"schema": SCHEMA, "blocks": [_head(rule) for rule in listed]}


def _head(rule: Rule) -> dict[str, Any]:
    params = [
        {
            "name": p.name,
            "default": blocks.plain(p.default),
            "help": p.help,
            "choices": list(p.choices),
        }
        for p in rule.params.values()
    ]
    return {
        "name": rule.name,
        "summary": rule.summary,
        "source": rule.source,
        "pool": rule.pool,
        "keep_first": rule.keep_first,
        "params": params,
    }


def listing_table(listed: Sequence[Rule]) -> Table:
    """One line per block."""
    columns = [Column(t, "left") for t in ("block", "structure", "parameters", "pool")]
    columns += [Column("first layer", "left"), Column("source", "left")]
    rows = [
        [
            rule.name,
            rule.summary,
            ", ".join(
                f"{p.name}={blocks.number(p.default)}" for p in rule.params.values()
            ),
            rule.pool,
            "kept" if rule.keep_first else "converted",
            rule.source,
        ]
        for rule in listed
    ]
    return Table("", columns, rows, ["`squeeze rules BLOCK` shows one in full"])


def shown(rule: Rule, settings: Mapping[str, Value]) -> Shown:
    """The rule on the first example that it accepts."""
    for example in PROBES:
        try:
            return Shown(rule, settings, explain(rule, settings, example))
        except Refused:
            continue
    return Shown(rule, settings, None)


def shown_json(shown: Shown) -> dict[str, Any]:
    """The rule, and its example node by node."""
    example = asdict(shown.explained) if shown.explained else None
    settings = {k: blocks.plain(v) for k, v in shown.settings.items()}
    return {
        "schema": SCHEMA,
        **_head(shown.rule),
        "settings": settings,
        "example": example,
    }


def shown_tables(shown: Shown) -> list[Table]:
    """Structure with the cost formula on an example, then parameters and conditions."""
    return [_structure(shown), _parameters(shown), _conditions(shown.rule)]


def _structure(shown: Shown) -> Table:
    rule, found = shown.rule, shown.explained
    columns = [Column("layer", "left"), Column("output"), Column("MACs"), Column("")]
    columns += [Column("params")]
    notes = [f"source: {rule.source}"]
    if found is None:
        return Table(rule.summary, columns, [], [*notes, "no example accepts it"])
    rows = [
        [
            step.text,
            dims(step.output),
            step.formula,
            f"{step.macs:,}",
            f"{step.params:,}",
        ]
        for step in found.steps
    ]
    rows.append(["in all", "", "", f"{found.macs:,}", f"{found.params:,}"])
    rows.append(
        ["replaces", "", "", f"{found.replaced_macs:,}", f"{found.replaced_params:,}"]
    )
    macs, params = (
        ratio(found.macs, found.replaced_macs),
        ratio(found.params, found.replaced_params),
    )
    rows.append(["remains", "", "", macs, params])
    return Table(
        f"{rule.name}: {rule.summary}\nat {found.example.text}", columns, rows, notes
    )


def _parameters(shown: Shown) -> Table:
    columns = [
        Column(t, "left") for t in ("parameter", "value", "allowed", "what it is")
    ]
    rows = [
        [p.name, blocks.number(shown.settings[p.name]), _allowed(p), p.help]
        for p in shown.rule.params.values()
    ]
    return Table("", columns, rows)


def _allowed(param: blocks.Param) -> str:
    if param.choices:
        return ", ".join(param.choices)
    bounds = [
        f"{sign} {blocks.number(bound)}"
        for sign, bound in (
            (">", param.above),
            ("≥", param.minimum),
            ("≤", param.maximum),
        )
        if bound is not None
    ]
    return ", ".join(bounds)


def _conditions(rule: Rule) -> Table:
    columns = [Column("goes where", "left"), Column("else", "left")]
    rows = [[accept.when.text, accept.because] for accept in rule.accepts]
    kept = "kept" if rule.keep_first else "converted too"
    notes = [f"max-pool behind it: {rule.pool}; first layer: {kept}"]
    return Table("", columns, rows, notes)
