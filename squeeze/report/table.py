"""Tables as data: built once, rendered for a terminal, Markdown, CSV or HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1  # of every JSON document
Align = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    """A heading, and whether its cells are names (left) or figures (right)."""

    title: str
    align: Align = "right"


@dataclass(frozen=True)
class Table:
    """Rows of finished text. `styles` names a rich style per row, or is empty."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    styles: Sequence[str] = field(default=())


def console(stderr: bool = False) -> Console:
    """A rich console: as wide as the terminal, or as the table needs in a pipe."""
    from rich.console import Console

    plain = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not plain.is_terminal:
        plain = Console(stderr=stderr, highlight=False, width=200)
    return plain


def show(table: Table, to: Console | None = None) -> None:
    """Print on a terminal: names wrap, figures do not."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    to = to or console()
    if table.title:
        to.print(Text(table.title, style="bold"))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        names = column.align == "left"
        drawn.add_column(
            column.title,
            justify=column.align,
            overflow="fold" if names else "ellipsis",
            no_wrap=not names,
        )
    for index, row in enumerate(table.rows):
        style = table.styles[index] if index < len(table.styles) else ""
        drawn.add_row(*(Text(cell) for cell in row), style=style)
    to.print(drawn)
    for note in table.notes:
        to.print(Text(note))


def markdown(table: Table) -> str:
    """A GitHub table, with its title as a heading and its notes below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = ["---:" if c.align == "right" else "---" for c in table.columns]
    lines = [f"### {table.title}", ""] if table.title else []
    lines += [line([c.title for c in table.columns]), line(rule)]
    lines += [line(row) for row in table.rows]
    lines += [f"\n{note}" for note in table.notes]
    return "\n".join(lines) + "\n"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a heading line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


# -- figures as text ----------------------------------------------------------------


def si(value: float, digits: int = 3) -> str:
    """A count with its decimal prefix: 39.6 M, 1.81 G."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:#.{digits}g}".rstrip(".") + prefix
    return f"{value:.0f}" if value == int(value) else f"{value:.{digits}g}"


def size(nbytes: float) -> str:
    """Bytes with a decimal prefix: 1.65 MB."""
    text = si(nbytes)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def milliseconds(value: float) -> str:
    """A time with three digits: 850 µs, 12.3 ms, 1.20 s."""
    if abs(value) >= 1000:
        return f"{value / 1000:.3g} s"
    if abs(value) < 0.9995 and value:
        return f"{value * 1000:.3g} µs"
    return f"{value:.3g} ms"


def share(part: float, whole: float) -> str:
    """A percentage with one decimal."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def bar(part: float, whole: float, width: int = 12) -> str:
    """A bar in eighths of a character, full where part equals whole."""
    eighths = round(8 * width * part / whole) if whole else 0
    full, rest = divmod(max(0, min(eighths, 8 * width)), 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


def ratio(after: float, before: float) -> str:
    """What remains: ×0.143."""
    return f"×{after / before:.3g}" if before else "–"


def dims(shape: Sequence[int]) -> str:
    """A shape as 1×64×32×32."""
    return "×".join(str(n) for n in shape)
