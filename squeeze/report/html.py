"""A report as one HTML page that needs nothing else: no network, no other file.

The tables are those of the terminal; bars and points are drawn by the page from the
JSON document in it, so that its figures are the document's.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import squeeze
from squeeze.errors import SqueezeError
from squeeze.model import check_output
from squeeze.report.table import Column, Table, milliseconds, ratio, si, size

BLOCKS = "█▉▊▋▌▍▎▏"  # eighths of a character, from full to least
BAR_WIDTH = 12 * 8  # of `table.bar`, in eighths
SHORT, WIDE = 14, 32  # characters: names that stay on a line, texts that need room

# totals that the page shows on top: key → (title, form)
SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "macs": ("MACs", si),
    "params": ("parameters", si),
    "file_bytes": ("file", size),
    "peak_activation_bytes": ("peak activations", size),
}


def write(
    path: Path, title: str, tables: Sequence[Table], document: Mapping[str, Any]
) -> None:
    """Write the page; it appears whole or not at all."""
    check_output(path)
    text = page(title, tables, document)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name}.", dir=path.absolute().parent, text=False
    )
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise SqueezeError(f"{path}: could not be written: {reason}") from error


def page(title: str, tables: Sequence[Table], document: Mapping[str, Any]) -> str:
    """The page's text. `document` is what the command prints with --json."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "subtitle": escape(_subtitle(document)),
        "summary": _summary(document),
        "tables": "\n".join(_table(table) for table in tables),
        "footer": escape(f"squeeze {squeeze.__version__}"),
        "document": _embedded({**document, **_points(document)}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _embedded(document: Mapping[str, Any]) -> str:
    """JSON that can't end the script element it stands in."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _subtitle(document: Mapping[str, Any]) -> str:
    if "input" in document:
        return f"{document['input']} → {document.get('output') or 'nothing written'}"
    if "base" in document:
        return f"{document['base']} against {document.get('new') or 'several models'}"
    if "models" in document:
        return ", ".join(str(model.get("model")) for model in document["models"])
    return str(document.get("model", ""))


# -- the figures on top -------------------------------------------------------------


def _summary(document: Mapping[str, Any]) -> str:
    before, after = document.get("before"), document.get("after")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        cards = [_change_card(key, before, after) for key in SHOWN if key in before]
    else:
        counts = [key for key in SHOWN if isinstance(document.get(key), int)]
        cards = [_card(key, document) for key in counts]
    cards += _extra_cards(document)
    if not cards:
        return ""
    return f'<section class="cards" id="summary">{"".join(cards)}</section>'


def _card(key: str, totals: Mapping[str, Any]) -> str:
    title, form = SHOWN[key]
    exact = f"{totals[key]:,}"
    return _card_html(key, form(totals[key]), title, exact, totals[key])


def _change_card(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    title, form = SHOWN[key]
    text = f"{form(before[key])} → {form(after[key])}"
    exact = f"{before[key]:,} → {after[key]:,}"
    return _card_html(
        key, ratio(after[key], before[key]), f"{title}, {text}", exact, after[key]
    )


def _extra_cards(document: Mapping[str, Any]) -> list[str]:
    cards = []
    if latency := document.get("latency"):
        before, after = (milliseconds(latency[f"{w}_ms"]) for w in ("before", "after"))
        text = f"latency, {before} → {after}"
        exact = f"{latency['ratio_low']:.3g} to {latency['ratio_high']:.3g}"
        value = latency["ratio"]
        cards.append(_card_html("latency", f"×{value:.3g}", text, exact, value))
    if accuracy := document.get("accuracy"):
        text = f"accuracy, {accuracy['base']:.2%} → {accuracy['new']:.2%}"
        exact = f"{100 * accuracy['low']:+.2f} to {100 * accuracy['high']:+.2f} pp"
        value = accuracy["difference"]
        shown = f"{100 * value:+.2f} pp"
        cards.append(_card_html("accuracy", shown, text, exact, value))
    if prediction := document.get("prediction"):
        value = prediction["total_s"]
        text = f"predicted on {prediction['device']['name']}"
        cards.append(
            _card_html("total_s", f"{1e3 * value:.3g} ms", text, str(value), value)
        )
    return cards


def _card_html(key: str, shown: str, text: str, exact: str, value: Any) -> str:
    return (
        f'<div class="card" data-key="{escape(key)}" data-value="{escape(str(value))}" '
        f'title="{escape(exact)}"><b>{escape(shown)}</b>'
        f"<span>{escape(text)}</span></div>"
    )


# -- tables -------------------------------------------------------------------------


def _table(table: Table) -> str:
    heading = f"<h2>{escape(table.title)}</h2>" if table.title else ""
    head = "".join(_head(column) for column in table.columns)
    kinds = [_kind(table, index) for index in range(len(table.columns))]
    rows = "".join(
        _row(kinds, row, table.styles[i] if i < len(table.styles) else "")
        for i, row in enumerate(table.rows)
    )
    notes = "".join(f'<p class="note">{_prose(note)}</p>' for note in table.notes)
    return (
        f'<section>{heading}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{notes}</section>"
    )


def _prose(note: str) -> str:
    """Escaped text in which what stands between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(note))


def _kind(table: Table, index: int) -> str:
    """How a column's cells are set: names by the longest one, figures to the right."""
    column = table.columns[index]
    if column.align == "right":
        return column.align
    longest = max((len(row[index]) for row in table.rows), default=0)
    width = " short" if longest <= SHORT else " wide" if longest > WIDE else ""
    return column.align + width


def _head(column: Column) -> str:
    title = f"<button>{escape(column.title)}</button>" if column.title else ""
    return f'<th class="{column.align}" scope="col">{title}</th>'


def _row(kinds: Sequence[str], row: Sequence[str], style: str) -> str:
    cells = "".join(_cell(kind, text) for kind, text in zip(kinds, row, strict=True))
    return f'<tr class="{escape(style)}">{cells}</tr>'


def _cell(kind: str, text: str) -> str:
    if text and not text.strip(BLOCKS):
        eighths = sum(8 - BLOCKS.index(mark) for mark in text)
        width = 100 * eighths / BAR_WIDTH
        return (
            f'<td class="bars" data-bar="{eighths}">'
            f'<i class="bar" style="width:{width:.1f}%"></i></td>'
        )
    return f'<td class="{kind}">{escape(text)}</td>'


# -- points -------------------------------------------------------------------------


def _points(document: Mapping[str, Any]) -> dict[str, Any]:
    """Cost against what it gives up for several models, or a learning curve."""
    trained = document.get("distilled") or document
    if trained.get("history"):
        return _curve(trained["history"])
    models = document.get("models") or []
    if len(models) < 2:
        return {}
    if all("median_ms" in model for model in models):
        points = [
            {"name": m["model"], "x": m["macs"], "y": m["median_ms"], "base": not i}
            for i, m in enumerate(models)
        ]
        return {"points": points, "axes": {"x": "MACs", "y": "median, ms"}}
    if all("after" in model for model in models):
        return _fidelity_points(models)
    return {}


def _curve(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The held-out agreement after each epoch, or the output error without classes."""
    classes = all(epoch["score"]["agreement"] is not None for epoch in history)
    key = "agreement" if classes else "error"
    points = [
        {"name": f"{e['phase']} {e['epoch']}", "x": i, "y": e["score"][key]}
        for i, e in enumerate(history, 1)
    ]
    return {"points": points, "axes": {"x": "epoch", "y": key}, "line": True}


def _fidelity_points(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    labelled = all(model["accuracy"] for model in models)
    first = models[0]
    points = [
        {
            "name": first["base"],
            "x": first["before"]["macs"],
            "y": first["accuracy"]["base"] if labelled else 0.0,
            "base": True,
        }
    ]
    points += [
        {
            "name": model["new"],
            "x": model["after"]["macs"],
            "y": model["accuracy"]["new"] if labelled else model["relative_error"],
            "base": False,
        }
        for model in models
    ]
    axis = "accuracy" if labelled else "relative output error"
    return {"points": points, "axes": {"x": "MACs", "y": axis}}
