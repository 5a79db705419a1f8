"""Peak memory as `profile` predicts it, against onnxruntime's own arena.

    python -m tests.benchmarks.peak_memory [--zoo FOLDER] [MODEL …]

Baseline: bytes requested from the arena at each node, as onnxruntime's profiler
reports them, less what was held before the first node (weights). Graph optimisation
and memory patterns are off, so that the graph is the one that was counted.

The rule was found by looking at the zoo's 17 graphs. The second table is of graphs
that nobody looked at: onnx's own light models, the samples, and rewrites of both. The
light models make their weights by nodes (ConstantOfShape), which onnxruntime folds
when it optimises, but not here: they are folded by onnxsim first.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort

from squeeze import model as models
from squeeze.cli import run
from squeeze.measure import cases
from tests.benchmarks import zoo

SAMPLES = Path(__file__).parents[2] / "sample_models"


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


REWRITES = (  # (model, command): graphs that exist nowhere else
    ("light_resnet50", ["convert", "--to", "effnet"]),
    ("light_squeezenet", ["convert", "--to", "shufflenet"]),
    ("light_vgg19", ["convert", "--to", "inverted-residual"]),
    ("light_shufflenet", ["width", "--multiplier", "0.5"]),
    ("light_densenet121", ["width", "--multiplier", "0.75"]),
    ("cifar10_cnn", ["convert", "--to", "effnet-v2", "--allow-costlier"]),
    ("cifar10_cnn", ["convert", "--to", "mobile-improved"]),
)


def main() -> None:
    given = zoo.arguments(__doc__).parse_args()
    _report("graphs that the rule was found on", zoo.paths(given))
    if not given.models:
        with tempfile.TemporaryDirectory() as folder:
            folded = [_folded(path, Path(folder)) for path in zoo.light()]
            unseen = [*sorted(folded), *sorted(SAMPLES.glob("*.onnx"))]
            made = _rewritten({p.stem: p for p in unseen}, Path(folder))
            _report("graphs not looked at", [*unseen, *made])


def _folded(path: Path, folder: Path) -> Path:
    """A copy without nodes that compute weights."""
    simplified, _ = models.simplify(models.load(path))
    models.save(simplified, folder / path.name)
    return folder / path.name


def _rewritten(files: dict[str, Path], folder: Path) -> list[Path]:
    """Rewrites of the models, weights left as they come."""
    made = []
    for index, (name, command) in enumerate(REWRITES):
        out = folder / f"{name}.{command[0]}{index}.onnx"
        fit = ["--fit", "none"] if command[0] == "convert" else []
        given = [command[0], str(files[name]), *command[1:], *fit]
        with contextlib.redirect_stdout(io.StringIO()):
            status = run([*given, "-o", str(out), "--no-bench"])
        made += [out] if status == 0 else []
    return made


def _report(title: str, files: list[Path]) -> None:
    print(f"\n| {title} | predicted | arena | error | without reuse |")
    print("|---|---:|---:|---:|---:|")
    errors = []
    for path in files:
        case = cases.load(path)
        (candidate,) = cases.candidates([case])
        arena = arena_peak(path, candidate.feeds)
        predicted = case.costs.runtime_peak.bytes
        errors.append(abs(predicted / arena - 1))
        plain = case.costs.totals.peak_activation_bytes
        print(
            f"| {path.stem} | {predicted:,} | {arena:,} | {predicted / arena - 1:+.1%} "
            f"| {plain / arena - 1:+.1%} |",
            flush=True,
        )
    print(f"\nmedian error {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
