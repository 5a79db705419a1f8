"""Which block pays on a CPU: every block on every graph of the zoo.

    python -m tests.benchmarks.zoo_blocks [--block NAME …] [--zoo FOLDER] [MODEL …]

A ratio of latencies above that of MACs means that less work did not become as much
less time. The worst five are explained by the layers that onnxruntime's profile
shows slowest per MAC. Baseline: the graph as it is (×1).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from squeeze import rules
from squeeze.errors import SqueezeError
from squeeze.measure import cases, latency, layers
from squeeze.measure.latency import Settings
from squeeze.rewrite.convert import convert
from squeeze.rewrite.run import Options
from tests.benchmarks import zoo


@dataclass(frozen=True)
class Row:
    model: Path
    block: str
    sites: int
    macs: float
    ratio: latency.Ratio

    @property
    def price(self) -> float:
        """Latency ratio ÷ MAC ratio: 1 where time follows the work."""
        return self.ratio.ratio / self.macs


def main() -> None:
    parser = zoo.arguments(__doc__)
    parser.add_argument("--block", action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--worst", type=int, default=5)
    given = parser.parse_args()
    print("| model | block | sites | MACs | latency | 95 % | latency ÷ MACs |")
    print("|---|---|---:|---:|---:|---:|---:|")
    rows = []
    for path in zoo.paths(given):
        for block in given.block or rules.names("blocks"):
            row = _row(path, block, given.seconds)
            if row is not None:
                rows.append(row)
                print(_line(row), flush=True)
    for row in sorted(rows, key=lambda row: -row.price)[: given.worst]:
        _explain(row, given.seconds)


def _line(row: Row) -> str:
    found = row.ratio
    return (
        f"| {row.model.stem} | {row.block} | {row.sites} | ×{row.macs:.3f} "
        f"| ×{found.ratio:.3f} | {found.low:.3f}–{found.high:.3f} | {row.price:.2f} |"
    )


def _converted(path: Path, block: str, out: Path) -> int:
    """Sites that the block took."""
    try:
        found = convert(path, block, options=Options(output=out, bench=False))
    except SqueezeError as error:
        print(f"| {path.stem} | {block} | {error} | | | | |")
        return 0
    return found.applied


def _row(path: Path, block: str, seconds: float) -> Row | None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "new.onnx"
        sites = _converted(path, block, out)
        if not sites:
            return None
        pair = [cases.load(p) for p in (path, out)]
        before, after = (case.costs.totals.macs for case in pair)
        found = latency.bench(cases.candidates(pair), Settings(seconds))
        return Row(path, block, sites, after / before, found.ratios[0])


def _explain(row: Row, seconds: float) -> None:
    """The layers of the new model that take most time for their MACs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "new.onnx"
        _converted(row.model, row.block, out)
        case = cases.load(out)
        (candidate,) = cases.candidates([case])
        found = layers.timeline(candidate, case.model, case.costs, Settings(seconds))
    kinds = {layer.name: layer.kind for layer in case.costs.layers}
    spent: dict[str, list[float]] = {}
    for line in found.lines:
        sums = spent.setdefault(kinds.get(line.name, line.kind), [0.0, 0.0])
        sums[0] += line.time_ms
        sums[1] += line.macs
    print(f"\n{row.model.stem}, {row.block}: latency ÷ MACs = {row.price:.2f}\n")
    print("| kind of layer | time | share | MACs | GFLOP/s |")
    print("|---|---:|---:|---:|---:|")
    for kind, (time, macs) in sorted(spent.items(), key=lambda item: -item[1][0])[:6]:
        speed = f"{2e-6 * macs / time:.1f}" if macs and time else ""
        share = time / found.run_ms
        print(
            f"| {kind} | {time:.2f} ms | {share:.0%} | {macs / 1e6:.1f} M | {speed} |"
        )


if __name__ == "__main__":
    main()
