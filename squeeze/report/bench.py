"""Measured latency as JSON and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from squeeze.measure.cases import Case
from squeeze.measure.latency import Bench, Ratio, Settings
from squeeze.measure.layers import Timeline
from squeeze.report.costs import totals_json
from squeeze.report.table import (
    SCHEMA,
    Column,
    Table,
    bar,
    dims,
    milliseconds,
    share,
    si,
)
from squeeze.session import short


@dataclass(frozen=True)
class Report:
    """What was timed, how, and what came out. `layers` go with `cases`, or are none."""

    cases: Sequence[Case]
    settings: Settings
    inputs: str
    bench: Bench | None
    timelines: Sequence[Timeline] = ()


def bench_json(report: Report) -> dict[str, Any]:
    """`squeeze bench --json`. Times in milliseconds, ratios to the baseline."""
    settings, found = report.settings, report.bench
    return {
        "schema": SCHEMA,
        "baseline": str(report.cases[0].path) if len(report.cases) > 1 else None,
        "provider": settings.provider,
        "threads": settings.threads,
        "clock": settings.clock,
        "inputs": report.inputs,
        "level": settings.level,
        "rounds": found.rounds if found else None,
        "models": [_model_json(report, index) for index in range(len(report.cases))],
    }


def _model_json(report: Report, index: int) -> dict[str, Any]:
    case, found = report.cases[index], report.bench
    document: dict[str, Any] = {
        "model": str(case.path),
        "input_shapes": {k: list(v) for k, v in case.shapes.inputs.items()},
        **totals_json(case.costs.totals),
    }
    if found:
        timing = asdict(found.timings[index])
        document |= {**timing, "noisy": found.timings[index].noisy}
        document["ran_on"] = found.placements[index] or None
        ratio = found.ratios[index - 1] if index else None
        document |= {
            "ratio": ratio.ratio if ratio else None,
            "ratio_low": ratio.low if ratio else None,
            "ratio_high": ratio.high if ratio else None,
            "verdict": ratio.verdict if ratio else None,
        }
    if report.timelines:
        timeline = report.timelines[index]
        document |= {
            "profiled_ms": timeline.run_ms,
            "profiled_runs": timeline.runs,
            "layers": [
                {**asdict(line), "fused": list(line.fused)} for line in timeline.lines
            ],
        }
    return document


def tables(report: Report, top: int | None = None) -> list[Table]:
    """The layers of each model, then one line per model."""
    found = [
        _layers_table(case, timeline, top)
        for case, timeline in zip(report.cases, report.timelines, strict=False)
    ]
    if report.bench:
        found.append(_models_table(report, report.bench))
    return found


def _models_table(report: Report, found: Bench) -> Table:
    several = len(report.cases) > 1
    columns = [
        Column("model", "left"),
        Column("MACs"),
        Column("median"),
        Column("fastest"),
        Column("5–95 %"),
        Column("runs"),
    ]
    if several:
        columns += [Column("ratio"), Column("", "left")]
    rows, notes = [], []
    for index, timing in enumerate(found.timings):
        row = [
            timing.model,
            si(report.cases[index].costs.totals.macs),
            milliseconds(timing.median_ms),
            milliseconds(timing.min_ms),
            f"{milliseconds(timing.p5_ms)}–{milliseconds(timing.p95_ms)}",
            str(timing.runs),
        ]
        if several:
            row += _ratio_cells(found.ratios[index - 1] if index else None)
        rows.append(row)
        if timing.noisy:
            times = timing.p95_ms / timing.median_ms
            notes.append(
                f"noisy: 5 % of the runs of {timing.model} took over {times:.1f} times "
                "its median; close other programs and run again"
            )
        notes += _elsewhere(timing.model, found.placements[index], report.settings)
    how = f"{short(report.settings.provider)}, {_clock(report.settings)}, "
    how += report.inputs
    shapes = "; ".join(
        dict.fromkeys(
            ", ".join(f"{k} {dims(v)}" for k, v in case.shapes.inputs.items())
            for case in report.cases
        )
    )
    return Table(f"Latency in onnxruntime ({how}) at {shapes}", columns, rows, notes)


def _clock(settings: Settings) -> str:
    """How time was taken: default threads, 1 thread, processor time of 1 thread."""
    if settings.clock == "processor":
        return "processor time of 1 thread"
    plural = "" if settings.threads == 1 else "s"
    return f"{settings.threads or 'default'} thread{plural}"


def _elsewhere(model: str, ran: Mapping[str, int], settings: Settings) -> list[str]:
    """Says so where some nodes were left to other providers than the one asked for."""
    others = {p: n for p, n in ran.items() if p != settings.provider}
    if not others:
        return []
    parts = ", ".join(f"{n} on {short(p)}" for p, n in others.items())
    return [f"{model}: {ran[settings.provider]} nodes ran as asked, {parts}"]


def _ratio_cells(ratio: Ratio | None) -> list[str]:
    if ratio is None:
        return ["×1", "baseline"]
    return [f"×{ratio.ratio:.3g}", ratio_text(ratio)]


def ratio_text(ratio: Ratio) -> str:
    """What the interval allows to claim: 0.93–1.21: no difference shown."""
    interval = f"{ratio.low:.3g}–{ratio.high:.3g}"
    return f"{interval} ({100 * ratio.level:g} %): {ratio.verdict}"


def _layers_table(case: Case, timeline: Timeline, top: int | None) -> Table:
    columns = [
        Column("layer", "left"),
        Column("op", "left"),
        Column("time"),
        Column("share"),
        Column("", "left"),
        Column("MACs"),
        Column("GFLOP/s"),
        Column("with", "left"),
    ]
    lines = list(timeline.lines)
    if top is not None:
        lines = sorted(lines, key=lambda line: -line.time_ms)[:top]
    longest = max((line.time_ms for line in lines), default=0.0)
    rows = [
        [
            line.name,
            line.op,
            milliseconds(line.time_ms),
            share(line.time_ms, timeline.run_ms),
            bar(line.time_ms, longest),
            si(line.macs) if line.macs else "",
            f"{line.gflops:.3g}" if line.gflops else "",
            ", ".join(line.fused),
        ]
        for line in lines
    ]
    if top is None:
        whole = [case.path.name, "all", milliseconds(timeline.run_ms), "100.0 %", ""]
        macs = sum(line.macs for line in timeline.lines)
        speed = f"{2e-6 * macs / timeline.run_ms:.3g}" if macs else ""
        rows.append([*whole, si(macs), speed, ""])
    notes = [f"medians of {timeline.runs} runs with onnxruntime's profiler on"]
    if len(lines) < len(timeline.lines):
        notes.append(f"{len(timeline.lines) - len(lines)} more lines: raise --top")
    styles = ["dim" if line.kind != "layer" else "" for line in lines]
    return Table(str(case.path), columns, rows, notes, styles)
