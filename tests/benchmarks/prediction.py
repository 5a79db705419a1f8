"""Predicted time against measured time on this machine, over the zoo.

    python -m tests.benchmarks.prediction [--device FILE] [--results FILE]
        [--clock wall|processor] [--zoo FOLDER] [MODEL …]

Without --device, this machine is calibrated first; no constant comes from the zoo.
Baseline: MACs alone, times the constant that fits the *other* models best (median of
their times per MAC; leave-one-out). Spearman's rank correlation and the median error
of both. The processor clock (one thread) is for machines that are busy with others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from squeeze.cost import device
from squeeze.measure import calibrate, cases, latency
from squeeze.measure.latency import CLOCKS, Settings
from tests.benchmarks import zoo
from tests.benchmarks.records import Records, argument


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, without ties."""
    ranks = [values.argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def from_others(macs: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Times from MACs alone, each with the constant of all models but itself."""
    speeds = measured / macs
    others = [np.median(np.delete(speeds, i)) for i in range(len(speeds))]
    return np.asarray(macs * others)


def main() -> None:
    parser = zoo.arguments(__doc__)
    argument(parser)
    parser.add_argument("--device", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    given = parser.parse_args()
    settings = Settings(given.seconds, threads=given.threads, clock=given.clock)
    constants = _device(given, settings)
    times = Records(given.results, ("model", "clock", "threads"))
    print("| model | MACs, M | predicted, ms | measured, ms | error |")
    print("|---|---:|---:|---:|---:|")
    rows = []
    for path in zoo.paths(given):
        macs, predicted, measured = _row(path, constants, settings, times)
        rows.append((macs, predicted, measured))
        print(
            f"| {path.stem} | {macs / 1e6:.0f} | {predicted:.2f} "
            f"| {measured:.2f} | {predicted / measured - 1:+.0%} |",
            flush=True,
        )
    macs, predicted, measured = np.array(rows, float).T
    print("\n| | rank correlation | median error | worst error |")
    print("|---|---:|---:|---:|")
    for name, values in (
        ("device model", predicted),
        ("MACs times a constant", from_others(macs, measured)),
    ):
        errors = np.abs(values / measured - 1)
        print(
            f"| {name} | {rank_correlation(values, measured):.3f} "
            f"| {np.median(errors):.0%} | {errors.max():.0%} |"
        )


def _row(
    path: Path, constants: device.Device, settings: Settings, times: Records
) -> tuple[int, float, float]:
    """(MACs, predicted ms, measured ms); a measured time is kept and not repeated."""
    case = cases.load(path)
    found = device.predict(case.model.graph, case.shapes, case.costs, constants)
    record = times.get(path.stem, settings.clock, settings.threads)
    if record is None:
        (timing,) = latency.bench(cases.candidates([case]), settings).timings
        record = times.add(
            {
                "model": path.stem,
                "clock": settings.clock,
                "threads": settings.threads,
                "median_ms": timing.median_ms,
            }
        )
    return case.costs.totals.macs, 1e3 * found.total_s, float(record["median_ms"])


def _device(given: argparse.Namespace, settings: Settings) -> device.Device:
    if given.device is not None:
        return device.load(str(given.device))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "this-machine.toml"
        text = calibrate.device_file(settings.threads, clock=settings.clock)
        made.write_text(text, encoding="utf-8")
        print(text)
        return device.load(str(made))


if __name__ == "__main__":
    main()
