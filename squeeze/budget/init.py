"""Proposed limits for the models there are: what they cost today, plus a margin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from squeeze.budget import files
from squeeze.budget.metrics import METRICS
from squeeze.budget.subject import Subject
from squeeze.budget.units import show, written
from squeeze.errors import UsageError

MARGIN = Fraction(5, 100)
PROPOSED = ("macs", "params", "file_size", "peak_memory")
HEAD = """\
# Budgets of `squeeze check`. Its status: 0 within, 1 over, 2 wrong configuration or
# missing file, 3 not measurable. Each limit is what the model costs today, plus 5 %:
# lower them as the models shrink. Also: latency, accuracy, agreement,
# predicted_latency, [[check.layer]]; see the README of squeeze.
"""


def models_in(folder: Path, given: Sequence[str] = ()) -> list[str]:
    """The models to propose limits for: those given, else all below the folder."""
    if given:
        found = [p for pattern in given for p in files.expand(pattern, folder)]
    else:
        found = files.expand("**/*.onnx", folder)
    return list(dict.fromkeys(p.as_posix() for p in found))


def proposal(models: Sequence[str], folder: Path) -> str:
    """The text of the checks, one per model, with today's figures as comments."""
    if not models:
        raise UsageError("no models to propose limits for; name some")
    names: Counter[str] = Counter()
    blocks = []
    for model in models:
        stem = Path(model).stem
        names[stem] += 1
        name = stem if names[stem] == 1 else f"{stem}-{names[stem]}"
        blocks.append(_block(name, Subject(model, folder / model)))
    return HEAD + "".join(blocks)


def _block(name: str, subject: Subject) -> str:
    lines = [
        "",
        "[[check]]",
        f"name = {_quoted(name)}",
        f"model = {_quoted(subject.name)}",
    ]
    reasons = subject.costs.missing
    for key in PROPOSED:
        metric, value = METRICS[key], subject.costs.totals.get(key)
        if value is None:
            reason = " ".join(reasons.get(key, "").split())
            lines.append(f"# {key}: {reason}")
            continue
        limit = written(Fraction(value) * (1 + MARGIN), metric.family)
        today = f"  # today {show(Fraction(value), metric.family)}"
        lines.append(f'{key} = {{ max = "{limit}" }}{today}')
    if len(subject.costs.totals.keys() & {*PROPOSED}) == 0:
        return "\n".join(f"# {line}" if line else "" for line in lines) + "\n"
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    out = "".join(
        f"\\u{ord(c):04x}"
        if c < " " or c == "\x7f"
        else {'"': '\\"', "\\": "\\\\"}.get(c, c)
        for c in text
    )
    return f'"{out}"'
