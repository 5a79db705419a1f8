"""Accuracy without training: prune `cifar10_cnn.onnx` to a share of its MACs.

    python -m tests.benchmarks.accuracy_cifar10 [--data ../shared/data/cifar10]

2,000 unlabelled training images to calibrate, the validation split to evaluate.
Baseline (an 80-line experiment, energy): with refit −0.6 points at 76 % of the MACs,
−2.6 at 51 %, −8.9 at 26 %; without refit −2.0, −10.2, −30.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from tests.benchmarks import cifar10
from tests.benchmarks.cifar10 import MODEL

BASELINE = {76: (-0.6, -2.0), 51: (-2.6, -10.2), 26: (-8.9, -30.0)}


def archives(source: Path, folder: Path, samples: int) -> tuple[str, str]:
    """Calibration images without labels, and the labelled validation split."""
    x, _ = cifar10.split(source / "train.npz")
    picked = np.random.default_rng(0).permutation(len(x))[: samples * 5 // 4]
    np.savez(folder / "calibration.npz", x=x[picked])
    x, labels = cifar10.split(source / "validation.npz")
    np.savez(folder / "validation.npz", x=x, labels=labels)
    return str(folder / "calibration.npz"), str(folder / "validation.npz")


def main() -> None:
    from squeeze.rewrite.plan import Limit
    from squeeze.rewrite.prune import Plan, prune
    from squeeze.rewrite.run import Options
    from squeeze.rewrite.samples import Samples

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=cifar10.FOLDER)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--by", nargs="*", default=["energy", "reconstruction"])
    parser.add_argument("--percent", nargs="*", type=int, default=[76, 51, 26])
    options = parser.parse_args()
    print("criterion, MACs left: points with refit, without (baseline) | channels | s")
    with tempfile.TemporaryDirectory() as made:
        data, held = archives(options.data, Path(made), options.samples)
        samples = Samples(data, held, options.samples)
        for by in options.by:
            for percent in options.percent:
                points, start = [], time.perf_counter()
                for repair in (True, False):
                    limit = Limit(Fraction(percent, 100), True)
                    plan = Plan(by=by, macs=limit, refit=repair)
                    output = Options(output=Path(made) / "pruned.onnx", bench=False)
                    result = prune(MODEL, plan, samples, output)
                    found = result.fidelity
                    assert found is not None
                    assert found.accuracy_after is not None
                    points.append(100 * (found.accuracy_after - found.accuracy_before))
                share = result.after.macs / result.before.macs
                channels = [c.details["channels"][1] for c in result.changes]
                with_it, without = BASELINE.get(percent, (float("nan"),) * 2)
                print(
                    f"{by} {share:.1%}: {points[0]:+.2f} ({with_it:+.1f}), "
                    f"{points[1]:+.2f} ({without:+.1f}) | {channels} | "
                    f"{time.perf_counter() - start:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
