"""Peak memory as `profile` predicts it, against onnxruntime's own arena.

    python -m tests.benchmarks.peak_memory [--zoo FOLDER] [MODEL …]

Baseline: bytes requested from the arena at each node, as onnxruntime's profiler
reports them, less what was held before the first node (weights). Graph optimisation
and memory patterns are off, so that the graph is the one that was counted.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort

from squeeze.measure import cases
from tests.benchmarks import zoo


def arena_peak(path: Path, feeds: dict[str, Any]) -> int:
    """Most bytes of activations that onnxruntime had requested at once."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        runner = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        runner.run(None, feeds)
        events = json.loads(Path(runner.end_profiling()).read_text(encoding="utf-8"))
    nodes = [e["args"] for e in events if e["name"].endswith("_kernel_time")]
    held = [int(n.get("mem_bytes_requested_in_use", 0)) for n in nodes]
    first = held[0] - int(nodes[0].get("mem_requested_in_use_delta", 0))
    return max(held) - first


def main() -> None:
    found = zoo.paths(zoo.arguments(__doc__).parse_args())
    print("| model | predicted | arena | error | without reuse |")
    print("|---|---:|---:|---:|---:|")
    errors = []
    for path in found:
        case = cases.load(path)
        (candidate,) = cases.candidates([case])
        arena = arena_peak(path, candidate.feeds)
        predicted = case.costs.runtime_peak.bytes
        errors.append(abs(predicted / arena - 1))
        plain = case.costs.totals.peak_activation_bytes
        print(
            f"| {path.stem} | {predicted:,} | {arena:,} | {predicted / arena - 1:+.1%} "
            f"| {plain / arena - 1:+.1%} |"
        )
    print(f"\nmedian error {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
