"""Every real graph halved: MACs, proofs, speed, and onnxsim's pruning beside it.

    python tests/benchmarks/channels_coverage.py [--zoo ../shared/zoo] [--only GLOB]

Per graph: MACs left by `prune --by l2 --ratio 0.5 --no-refit` and by
`width --multiplier 0.5` (both pass the full checker and run in onnxruntime, or the
line says why not), families and barriers, the proof (the original with the same
channels silenced, lively weights, against the pruned model) with the change that shows
its power, seconds to trace, and what onnxsim's structured pruning reaches.
Target: at most 33 % on 25 of 26 graphs, none wrong. Baseline: a prototype reached 24.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from squeeze import model as models  # noqa: E402
from squeeze import profile  # noqa: E402
from squeeze import shapes as shaping  # noqa: E402
from squeeze.rewrite.channels import choose, prepare, trace  # noqa: E402
from squeeze.rewrite.prune import Limit, Plan, prune  # noqa: E402
from squeeze.rewrite.run import Options  # noqa: E402
from squeeze.rewrite.samples import Samples  # noqa: E402
from squeeze.rewrite.width import Width, width  # noqa: E402
from tests.benchmarks import graphs  # noqa: E402
from tests.rewrite import channels_proof as proof  # noqa: E402

HALF = Fraction(1, 2)


def proven(path: Path) -> tuple[float, float]:
    """Error of the proof, and the change that the removal makes."""
    model = proof.logits(proof.liven(models.simplify(models.load(path))[0]))
    shapes = shaping.infer(model, {})
    rng = np.random.default_rng(0)
    feeds = {k: rng.standard_normal(v, np.float32) for k, v in shapes.inputs.items()}

    def half(found: object) -> np.ndarray:
        scores = np.random.default_rng(1).random(len(found.root))
        return choose.thin(found, found.families, scores, choose.share(HALF))

    error, change, _, _ = proof.prove(model, feeds, half)
    return error, change


def at_zero(path: Path, folder: Path) -> tuple[int, float]:
    """`--threshold 0` on 64 random images: channels gone, largest difference."""
    shapes = shaping.infer(models.load(path), {})
    rng = np.random.default_rng(0)
    sizes = {k: (64, *v[1:]) for k, v in shapes.inputs.items()}
    data = {k: rng.standard_normal(v, np.float32) for k, v in sizes.items()}
    result = prune(
        path,
        Plan(threshold=Limit(Fraction(0), False)),
        Samples(data),
        Options(output=folder / "zero.onnx", bench=False),
    )
    gone = sum(a - b for a, b in (c.details["channels"] for c in result.changes))
    assert result.fidelity is not None
    return gone, result.fidelity.relative_error


def onnxsim_macs(path: Path) -> str:
    """MACs that onnxsim's structured pruning leaves, or why not."""
    import onnx
    import onnxsim

    try:
        pruned = onnxsim.apply_structured_pruning(onnx.load(path), HALF_FLOAT)
        pruned = pruned[0] if isinstance(pruned, tuple) else pruned
        with tempfile.TemporaryDirectory() as made:
            target = Path(made) / "pruned.onnx"
            onnx.save(pruned, target)
            return f"{profile(target).totals.macs / profile(path).totals.macs:.3f}"
    except Exception as error:
        return type(error).__name__


HALF_FLOAT = 0.5


def line(path: Path, folder: Path, zero: bool) -> tuple[str, bool]:
    out = Options(output=folder / "out.onnx", bench=False)
    start = time.perf_counter()
    pruned = prune(path, Plan(by="l2", ratio=HALF, refit=False), Samples(), out)
    seconds = time.perf_counter() - start
    thin = width(path, Width(HALF), Samples(), out)
    model = models.load(path)
    shapes = shaping.infer(model, {})
    start = time.perf_counter()
    found = trace(prepare(model, shapes))
    traced = time.perf_counter() - start
    error, change = proven(path)
    left = pruned.after.macs / pruned.before.macs
    verified = not any(n.startswith("not verified") for n in pruned.notes)
    zeroed = at_zero(path, folder) if zero else ("–", float("nan"))
    text = (
        f"{path.stem:28} {left:.3f} {thin.after.macs / thin.before.macs:.3f} "
        f"{'runs' if verified else 'NOT VERIFIED':5} {len(found.families):4} "
        f"{len(found.barriers):3} {error:8.1e} {change:5.2f} {traced:6.2f} "
        f"{seconds:6.1f} {onnxsim_macs(path):>12} {zeroed[0]!s:>5} {zeroed[1]:8.1e}"
    )
    return text, left <= 0.33 and error < 1e-4 < 0.1 < change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=ROOT.parent / "shared" / "zoo")
    parser.add_argument("--filled", type=Path, help="graphs that have weights")
    parser.add_argument("--only", default="*")
    parser.add_argument("--zero", action="store_true", help="also --threshold 0")
    options = parser.parse_args()
    print(
        f"{'graph':28} prune width       fam. bar.    proof change  trace  prune s "
        "     onnxsim  zero    error"
    )
    good = count = 0
    with tempfile.TemporaryDirectory() as made:
        if options.filled:
            paths = sorted(options.filled.glob(f"{options.only}.onnx"))
        else:
            paths = graphs.filled(options.zoo, Path(made), options.only)
        for path in paths:
            text, reached = line(path, Path(made), options.zero)
            good, count = good + reached, count + 1
            print(text, flush=True)
    print(f"{good} of {count} at or below 33 % and proven")


if __name__ == "__main__":
    main()
