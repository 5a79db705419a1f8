"""Real graphs: MACs against torchvision's, and what convert does to each.

`python -m tests.benchmarks.zoo_convert [--zoo FOLDER] [--only PATTERN]`. Baseline:
torchvision's published GMACs (3 decimals, so half a unit of the last is allowed on top
of 0.5 %). Each converted model has passed the checker and run in onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import squeeze
from tests.benchmarks import zoo


def row(path: Path, published: dict[str, dict], out: Path) -> str:
    macs = squeeze.profile(path).totals.macs
    known = published.get(path.name.split(".")[0])
    off = f"{macs / 1e9 / known['gmacs'] - 1:+.2%}" if known else ""
    fits = known is None or abs(macs / 1e9 - known["gmacs"]) <= max(
        0.005 * known["gmacs"], 0.0005
    )
    cells = [f"{path.stem:29} {macs / 1e9:7.3f} {off:>7} {'ok' if fits else 'OFF':3}"]
    for block in ("depthwise-separable", "effnet"):
        start = time.perf_counter()
        options = squeeze.Options(bench=False)
        result = squeeze.convert(path, block, out, options=options)
        seconds = time.perf_counter() - start
        done = f"{result.applied}/{len(result.changes)}"
        share = result.after.macs / result.before.macs
        cells.append(f"{done:>8} {share:6.3f} {seconds:5.1f} s")
        if not result.applied:
            reasons = Counter(c.reason.split(";")[0] for c in result.changes)
            cells[-1] += f" ({reasons.most_common(1)[0][0][:38]})"
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO)
    parser.add_argument("--only", default="*")
    options = parser.parse_args()
    published = zoo.published(options.zoo)
    print("graph: GMACs, against published | depthwise-separable | effnet")
    found = zoo.filled(options.zoo, options.only) + zoo.light(options.only)
    with tempfile.TemporaryDirectory() as made:
        for path in found:
            print(row(path, published, Path(made) / "out.onnx"), flush=True)


if __name__ == "__main__":
    main()
