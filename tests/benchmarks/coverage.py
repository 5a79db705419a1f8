"""Whether bench's interval keeps its promise: A/A benches, and one more convolution.

    python -m tests.benchmarks.coverage [--benches 100] [--seconds 3] [--threads N]
        [--clock wall|processor] [--results FILE] [MODEL]

Baseline: a 99 % interval should hold 1 in 99 of 100 benches of a model against
itself, and never in those against the same model with one more convolution. At least
95 and all of 100 are asked for. The summary is printed after every bench as well, and
--results keeps finished benches, so that an interrupted run can be read and gone on
with.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from squeeze.measure import cases, latency
from squeeze.measure.latency import CLOCKS, Candidate, Ratio, Settings
from tests.benchmarks.records import Records, argument

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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    argument(parser)
    parser.add_argument("--benches", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("model", nargs="?", type=Path, default=SAMPLE)
    given = parser.parse_args()
    how = Settings(given.seconds, threads=given.threads, clock=given.clock, level=0.99)
    keys = (given.model.name, how.clock, how.threads)
    benches = Records(given.results, ("model", "clock", "threads", "seed"))
    with tempfile.TemporaryDirectory() as folder:
        more = with_one_more(given.model, Path(folder) / "more.onnx")
        loaded = [cases.load(path) for path in (given.model, given.model, more)]
        base, again, other = cases.candidates(loaded)
        done = []
        for seed in range(given.benches):
            record = benches.get(*keys, seed)
            if record is None:
                same, told = (_ratio(base, one, how, seed) for one in (again, other))
                record = benches.add(_record(keys, seed, same, told))
            done.append(record)
            print(_summary(done), flush=True)
    print(_table(done))


def _ratio(base: Candidate, other: Candidate, how: Settings, seed: int) -> Ratio:
    return latency.bench([base, other], replace(how, seed=seed)).ratios[0]


def _record(
    keys: tuple[str, str, int], seed: int, same: Ratio, told: Ratio
) -> dict[str, Any]:
    return {
        **dict(zip(("model", "clock", "threads"), keys, strict=True)),
        "seed": seed,
        "low": same.low,
        "high": same.high,
        "slower": told.verdict == "slower",
        "slower_low": told.low,
    }


def _holds(record: dict[str, Any]) -> bool:
    return bool(record["low"] <= 1 <= record["high"])


def _summary(done: Sequence[dict[str, Any]]) -> str:
    last = done[-1]
    held, told = sum(map(_holds, done)), sum(r["slower"] for r in done)
    return (
        f"{len(done)}: {last['low']:.3f}–{last['high']:.3f}; "
        f"{held} hold 1, {told} told apart, load {last['load']}"
    )


def _table(done: Sequence[dict[str, Any]]) -> str:
    widths = [r["high"] / r["low"] - 1 for r in done]
    rows = [
        f"| 99 % intervals of {len(done)} benches | |",
        "|---|---:|",
        f"| the same model: holds 1 | {sum(map(_holds, done))} |",
        f"| the same model: width, median | {np.median(widths):.1%} |",
        f"| the same model: wider than 10 % | {sum(w > 0.1 for w in widths)} |",
        f"| one more convolution: told apart | {sum(r['slower'] for r in done)} |",
    ]
    return "\n" + "\n".join(rows)


if __name__ == "__main__":
    main()
