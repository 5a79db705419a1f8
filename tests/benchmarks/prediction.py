"""Predicted time against measured time on this machine, over the zoo.

    python -m tests.benchmarks.prediction [--device FILE] [--zoo FOLDER] [MODEL …]

Without --device, this machine is calibrated first. Baseline: MACs alone, scaled to
fit best; Spearman's rank correlation and the median error of both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from squeeze.cost import device
from squeeze.measure import calibrate, cases, latency
from squeeze.measure.latency import Settings
from tests.benchmarks import zoo


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, without ties."""
    ranks = [values.argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = zoo.arguments(__doc__)
    parser.add_argument("--device", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    constants = _device(given.device, given.threads)
    print("| model | MACs, M | predicted, ms | measured, ms | error |")
    print("|---|---:|---:|---:|---:|")
    rows = []
    for path in zoo.paths(given):
        case = cases.load(path)
        found = device.predict(case.model.graph, case.shapes, case.costs, constants)
        settings = Settings(given.seconds, threads=given.threads)
        (timing,) = latency.bench(cases.candidates([case]), settings).timings
        macs, predicted = case.costs.totals.macs, 1e3 * found.total_s
        rows.append((macs, predicted, timing.median_ms))
        print(
            f"| {path.stem} | {macs / 1e6:.0f} | {predicted:.2f} "
            f"| {timing.median_ms:.2f} | {predicted / timing.median_ms - 1:+.0%} |",
            flush=True,
        )
    macs, predicted, measured = np.array(rows, float).T
    scaled = macs * np.median(measured / macs)
    print("\n| | rank correlation | median error |")
    print("|---|---:|---:|")
    for name, values in (("device model", predicted), ("MACs, scaled", scaled)):
        error = np.median(np.abs(values / measured - 1))
        print(f"| {name} | {rank_correlation(values, measured):.3f} | {error:.0%} |")


def _device(file: Path | None, threads: int) -> device.Device:
    if file is not None:
        return device.load(str(file))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "this-machine.toml"
        made.write_text(calibrate.device_file(threads), encoding="utf-8")
        print(made.read_text(encoding="utf-8"))
        return device.load(str(made))


if __name__ == "__main__":
    main()
