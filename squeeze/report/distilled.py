"""What distillation did: JSON, tables, and the learning curve as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from squeeze.report.costs import SCHEMA
from squeeze.report.table import Column, Table

if TYPE_CHECKING:
    from squeeze.recover.options import Epoch, Score
    from squeeze.recover.run import Distilled


def distilled_json(done: Distilled, files: dict[str, str]) -> dict[str, Any]:
    """`squeeze distill --json`; `files` are the student, the teacher and the output."""
    return {
        "schema": SCHEMA,
        **files,
        "before": asdict(done.before),
        "after": asdict(done.after),
        "history": [asdict(epoch) for epoch in done.history],
        "sites": list(done.sites),
        "normalised": done.normalised,
        "samples": done.samples,
        "held_out": done.held_out,
        "device": done.device,
        "precision": done.precision,
        "seconds": done.seconds,
        "stopped": done.stopped,
        "notes": list(done.notes),
    }


def summary_table(done: Distilled, output: str) -> Table:
    """The held-out score before and after."""
    before, after = done.before, done.after
    rows = [
        ["same top class as the teacher", *_shares(before.agreement, after.agreement)],
        ["accuracy", *_shares(before.accuracy, after.accuracy)],
        ["output error", f"{before.error:.3g}", f"{after.error:.3g}"],
        ["loss", f"{before.loss:.4g}", f"{after.loss:.4g}"],
    ]
    if after.teacher_accuracy is not None:
        rows[1][0] = f"accuracy (teacher {after.teacher_accuracy:.2%})"
    notes = [
        f"{len(done.history)} epochs over {done.samples} samples in "
        f"{done.seconds:.0f} s on {done.device} ({done.precision}); "
        f"{done.held_out} samples held out"
    ]
    notes += [f"stopped: {done.stopped}"] if done.stopped else []
    columns = [Column("", "left"), Column("before"), Column("after")]
    return Table(output, columns, [r for r in rows if r[1]], [*notes, *done.notes])


def _shares(*values: float | None) -> list[str]:
    return ["" if v is None else f"{v:.2%}" for v in values]


def epoch_line(epoch: Epoch) -> str:
    """One line of progress: `whole 3/27: loss 0.412, agreement 71.2 %, …`."""
    count = f"/{epoch.epochs}" if epoch.epochs else ""
    parts = [f"{epoch.phase} {epoch.epoch}{count}: loss {epoch.loss:.4f}"]
    return ", ".join([*parts, *score_words(epoch.score)])


def score_words(score: Score) -> list[str]:
    words = []
    if score.agreement is not None:
        words.append(f"agreement {score.agreement:.1%}")
    else:
        words.append(f"error {score.error:.3f}")
    if score.accuracy is not None:
        words.append(f"accuracy {score.accuracy:.1%}")
    return words


# -- the learning curve -------------------------------------------------------------

WIDTH, HEIGHT, MARGIN = 640, 280, 44
_COLOURS = {"agreement": "#0a7d4f", "accuracy": "#1f5fbf", "error": "#b3541e"}


def learning_curve(history: Sequence[Epoch]) -> str:
    """An SVG of the held-out figures by epoch; empty without a finished epoch."""
    lines = {
        name: [getattr(epoch.score, name) for epoch in history] for name in _COLOURS
    }
    lines = {k: v for k, v in lines.items() if v and all(y is not None for y in v)}
    if lines.get("agreement"):
        lines.pop("error", None)
    if not lines:
        return ""
    top = max(1.0, *(max(v) for v in lines.values()))
    parts = [_grid(top, len(history))]
    for row, (name, values) in enumerate(lines.items()):
        points = " ".join(
            f"{_x(i, len(values)):.1f},{_y(v / top):.1f}" for i, v in enumerate(values)
        )
        colour, at = _COLOURS[name], MARGIN + 16 * row
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" '
            f'stroke-width="2"/><text x="{WIDTH - 100}" y="{HEIGHT - at - 12}" '
            f'fill="{colour}">{name}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="learning curve" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _x(index: int, count: int) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * index / max(count - 1, 1)


def _y(share: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share


def _grid(top: float, epochs: int) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        parts.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" '
            'stroke="#ddd"/>'
            f'<text x="4" y="{y + 4}" fill="#555">{share * top:.0%}</text>'
        )
    parts.append(
        f'<text x="{MARGIN}" y="{HEIGHT - 12}" fill="#555">epoch 1</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end" '
        f'fill="#555">{epochs}</text>'
    )
    return "".join(parts)


def page(done: Distilled, output: str) -> str:
    """One self-contained HTML page: the curve, the summary, every epoch."""
    table = summary_table(done, output)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    epochs = "".join(f"<li>{html.escape(epoch_line(e))}</li>" for e in done.history)
    title = html.escape(output)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font-family:sans-serif;max-width:48rem;margin:2rem auto}"
        "td{padding:.2rem 1rem .2rem 0}</style>"
        f"<h1>{title}</h1>{learning_curve(done.history)}<table><tr><th></th>"
        f"<th>before</th><th>after</th></tr>{rows}</table>{notes}<ol>{epochs}</ol></html>\n"
    )
