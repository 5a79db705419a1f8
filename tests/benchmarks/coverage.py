"""Whether bench's interval keeps its promise: A/A benches, and one more convolution.

    python -m tests.benchmarks.coverage [--benches 100] [--seconds 3] [MODEL]

Baseline: a 99 % interval should hold 1 in 99 of 100 benches of a model against
itself, and never in those against the same model with one more convolution.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from squeeze.measure import cases, latency
from squeeze.measure.latency import Bench, Candidate, Settings

SAMPLE = Path(__file__).parents[2] / "sample_models" / "cifar10_cnn.onnx"


def with_one_more(path: Path, out: Path) -> Path:
    """The model with a 3×3 convolution behind its second Conv (of as many channels)."""
    model = onnx.load(path)
    graph = model.graph
    place, conv = [(i, n) for i, n in enumerate(graph.node) if n.op_type == "Conv"][1]
    weight = next(t for t in graph.initializer if t.name == conv.input[1])
    channels = weight.dims[0]
    values = np.random.default_rng(0).standard_normal((channels, channels, 3, 3))
    array = (values * 0.01).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(array, "one_more.weight"))
    old = conv.output[0]
    conv.output[0] = "one_more.input"
    made = helper.make_node(
        "Conv", ["one_more.input", "one_more.weight"], [old], pads=[1] * 4
    )
    graph.node.insert(place + 1, made)
    onnx.save(model, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benches", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("model", nargs="?", type=Path, default=SAMPLE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        more = with_one_more(given.model, Path(folder) / "more.onnx")
        loaded = [cases.load(path) for path in (given.model, given.model, more)]
        base, again, other = cases.candidates(loaded)
        held = wide = told = 0
        for index in range(given.benches):
            same = _bench(base, again, given, index).ratios[0]
            held += same.low <= 1 <= same.high
            wide += same.high / same.low - 1 > 0.1
            told += _bench(base, other, given, index).ratios[0].verdict == "slower"
            print(f"{index + 1}: {same.low:.3f}–{same.high:.3f}", flush=True)
    print(f"\n| 99 % intervals of {given.benches} benches | |")
    print("|---|---:|")
    print(f"| the same model: holds 1 | {held} |")
    print(f"| the same model: wider than 10 % | {wide} |")
    print(f"| one more convolution: told apart | {told} |")


def _bench(
    base: Candidate, other: Candidate, given: argparse.Namespace, seed: int
) -> Bench:
    settings = Settings(given.seconds, threads=given.threads, seed=seed, level=0.99)
    return latency.bench([base, other], settings)


if __name__ == "__main__":
    main()
