"""What distillation did, as JSON and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from squeeze.report.table import SCHEMA, Column, Table

if TYPE_CHECKING:
    from squeeze.recover.options import Score
    from squeeze.recover.run import Distilled


def distilled_json(done: Distilled, files: dict[str, str]) -> dict[str, Any]:
    """`squeeze distill --json`; `files` names the input, the teacher and the output."""
    return {"schema": SCHEMA, **files, **training_json(done)}


def training_json(done: Distilled) -> dict[str, Any]:
    """How training went, epoch by epoch."""
    return {
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


def epochs_table(done: Distilled) -> Table:
    """One line per epoch: the training loss and the held-out figures."""
    columns = [Column("phase", "left"), Column("epoch"), Column("loss")]
    columns += [Column("held-out loss"), Column("agreement"), Column("accuracy")]
    columns += [Column("output error"), Column("seconds")]
    rows = [
        [
            epoch.phase,
            str(epoch.epoch),
            f"{epoch.loss:.4f}",
            f"{epoch.score.loss:.4f}",
            *_shares(epoch.score.agreement, epoch.score.accuracy),
            f"{epoch.score.error:.3g}",
            f"{epoch.seconds:.0f}",
        ]
        for epoch in done.history
    ]
    return Table("Epochs", columns, rows)


def _shares(*values: float | None) -> list[str]:
    return ["" if v is None else f"{v:.2%}" for v in values]


def score_words(score: Score) -> list[str]:
    words = []
    if score.agreement is not None:
        words.append(f"agreement {score.agreement:.1%}")
    else:
        words.append(f"error {score.error:.3f}")
    if score.accuracy is not None:
        words.append(f"accuracy {score.accuracy:.1%}")
    return words
