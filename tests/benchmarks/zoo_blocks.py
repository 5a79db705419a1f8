"""Which block pays on a CPU: every block on every graph of the zoo.

    python -m tests.benchmarks.zoo_blocks [--results FILE] [--clock wall|processor]
        [--block NAME …] [--zoo FOLDER] [MODEL …]

A ratio of latencies above that of MACs means that less work did not become as much
less time. The worst pairs are explained layer by layer: onnxruntime's profile of the
original's layer against those of the layers that replaced it. Baseline: the graph as
it is (×1). With --results, pairs that the file has are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir

from squeeze import rules
from squeeze.errors import SqueezeError
from squeeze.measure import cases, latency, layers
from squeeze.measure.cases import Case
from squeeze.measure.latency import CLOCKS, Settings
from squeeze.model import node_name
from squeeze.rewrite.convert import convert
from squeeze.rewrite.plan import Result
from squeeze.rewrite.run import Options
from tests.benchmarks import zoo
from tests.benchmarks.records import Records, argument

Record = Mapping[str, Any]
SITES = 3  # layers that are explained of each of the worst pairs


def main() -> None:
    given = _arguments()
    settings = Settings(
        given.seconds, runs=given.runs, threads=given.threads, clock=given.clock
    )
    pairs = Records(given.results, ("model", "block", "what"))
    for path in zoo.paths(given):
        for block in given.block or rules.names("blocks"):
            if pairs.get(path.stem, block, "ratio") is None and not given.show:
                _progress(pairs.add(_pair(path, block, settings)))
    measured = [r for r in pairs.found.values() if r.get("sites")]
    _print_pairs(measured)
    _print_matrix(measured)
    _print_blocks(measured)
    files = {path.stem: path for path in zoo.paths(given)}
    for record in _worst(measured, given.worst):
        key = (record["model"], record["block"], "layers")
        path = files.get(record["model"])
        if pairs.get(*key) is None and path is not None and not given.show:
            pairs.add(_explained(path, record["block"], settings))
        if (found := pairs.get(*key)) is not None:
            _print_explained(record, found)


def _arguments() -> argparse.Namespace:
    parser = zoo.arguments(__doc__)
    argument(parser)
    parser.add_argument("--block", action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="a pair")
    parser.add_argument("--runs", type=int, help="timed runs of each model, instead")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--worst", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="print --results only")
    return parser.parse_args()


def _worst(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` worst pairs, then the worst of others up to `count` models."""
    ordered = sorted(records, key=_price, reverse=True)
    found = ordered[:count]
    for record in ordered[count:]:
        models = {r["model"] for r in found}
        if len(models) < count and record["model"] not in models:
            found.append(record)
    return found


# -- measuring ----------------------------------------------------------------------


@contextmanager
def _converted(path: Path, block: str) -> Iterator[tuple[Result, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "new.onnx"
        yield convert(path, block, options=Options(output=out, bench=False)), out


def _pair(path: Path, block: str, settings: Settings) -> dict[str, Any]:
    """One record: the ratio, or no sites and why."""
    record = {"what": "ratio", "model": path.stem, "block": block, "sites": 0}
    try:
        with _converted(path, block) as (done, out):
            if not done.applied:
                return record
            pair = [cases.load(p) for p in (path, out)]
            found = latency.bench(cases.candidates(pair), settings)
    except SqueezeError as error:
        return {**record, "error": str(error).splitlines()[0]}
    before, after = (timing.median_ms for timing in found.timings)
    (ratio,) = found.ratios
    return record | {
        "sites": done.applied,
        "macs": done.after.macs / done.before.macs,
        "before_ms": before,
        "after_ms": after,
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "clock": settings.clock,
        "threads": settings.threads,
        "runs": found.timings[1].runs,
    }


def _progress(record: Record) -> None:
    text = f"×{record['ratio']:.3f}" if record["sites"] else "not applicable"
    print(f"{record['model']} {record['block']}: {text}", flush=True)


@dataclass(frozen=True)
class Part:
    """What one line of a profile took, and what kind of layer it is."""

    name: str
    kind: str
    time_ms: float
    macs: int

    @property
    def gflops(self) -> float:
        return 2e-6 * self.macs / self.time_ms if self.time_ms else 0.0


def _explained(path: Path, block: str, settings: Settings) -> dict[str, Any]:
    """Profiles of both models, as parts per site: before and after."""
    with _converted(path, block) as (done, out):
        base, new = (cases.load(p) for p in (path, out))
        before, after = (_parts(case, settings) for case in (base, new))
        replaced = _replaced(base, new, done)
        sites = []
        for change in done.changes:
            if change.applied:
                old = [p for p in before if replaced.get(p.name) == change.site]
                made = f"{change.site}/{change.details['block']}/"
                parts = [p for p in after if p.name.startswith(made)]
                after = [p for p in after if p not in parts]
                sites.append(
                    {
                        "site": change.site,
                        "before": [asdict(p) for p in old],
                        "after": [asdict(p) for p in parts],
                    }
                )
        kept = [p for p in before if p.name not in replaced]
    return {
        "what": "layers",
        "model": path.stem,
        "block": block,
        "sites_ms": sites,
        "kept": [_sums(parts) for parts in (kept, after)],
        "runtime_ms": [_runtime_ms(parts) for parts in (kept, after)],
    }


def _sums(parts: list[Part]) -> dict[str, float]:
    return {
        "time_ms": sum(p.time_ms for p in parts),
        "macs": sum(p.macs for p in parts),
    }


def _parts(case: Case, settings: Settings) -> list[Part]:
    (candidate,) = cases.candidates([case])
    found = layers.timeline(candidate, case.model, case.costs, settings)
    kinds = {layer.name: layer.kind for layer in case.costs.layers if layer.macs}
    return [
        Part(line.name, kinds.get(line.name, line.op), line.time_ms, line.macs)
        for line in found.lines
    ]


def _runtime_ms(parts: list[Part]) -> float:
    """What onnxruntime adds: reordering between layouts, casts."""
    return sum(p.time_ms for p in parts if p.name.startswith("onnxruntime's "))


def _replaced(base: Case, new: Case, done: Result) -> dict[str, str]:
    """Layers that are gone from the new model → the site that replaced them."""
    nodes = {node_name(node): node for node in base.model.graph}
    left = {node_name(node) for node in new.model.graph}
    found = {}
    for change in done.changes:
        node: ir.Node | None = nodes.get(change.site) if change.applied else None
        while node is not None:
            found[node_name(node)] = change.site
            users = [user for v in node.outputs for user, _ in v.uses()]
            gone = len(users) == 1 and node_name(users[0]) not in left
            node = users[0] if gone and users[0].op_type != "Conv" else None
    return found


# -- printing -----------------------------------------------------------------------


def _price(record: Record) -> float:
    """Latency ratio ÷ MAC ratio: 1 where time follows the work."""
    return float(record["ratio"] / record["macs"])


def _print_pairs(records: list[dict[str, Any]]) -> None:
    print("\n| model | block | sites | MACs | latency | 95 % | latency ÷ MACs |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for r in sorted(records, key=lambda r: (r["model"], r["block"])):
        print(
            f"| {r['model']} | {r['block']} | {r['sites']} | ×{r['macs']:.3f} "
            f"| ×{r['ratio']:.3f} | {r['low']:.3f}–{r['high']:.3f} "
            f"| {_price(r):.2f} |"
        )


def _print_matrix(records: list[dict[str, Any]]) -> None:
    """MACs → latency that remain: a row per model, a column per block."""
    blocks = sorted({r["block"] for r in records})
    print(f"\n| model | {' | '.join(blocks)} |")
    print(f"|---|{'---:|' * len(blocks)}")
    cells = {
        (r["model"], r["block"]): f"{r['macs']:.2f} → {r['ratio']:.2f}" for r in records
    }
    for model in sorted({r["model"] for r in records}):
        row = [cells.get((model, block), "") for block in blocks]
        print(f"| {model.partition('.')[0]} | {' | '.join(row)} |")


def _print_blocks(records: list[dict[str, Any]]) -> None:
    """One line per block, over the graphs that all of the blocks apply to."""
    blocks = {record["block"] for record in records}
    by_model: dict[str, set[str]] = {}
    for record in records:
        by_model.setdefault(record["model"], set()).add(record["block"])
    everywhere = {model for model, found in by_model.items() if found == blocks}
    records = [record for record in records if record["model"] in everywhere]
    print("\n| block | graphs | MACs | latency | latency ÷ MACs | faster | slower |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    by_block: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_block.setdefault(record["block"], []).append(record)

    def middle(found: list[dict[str, Any]], figure: Callable[[Record], float]) -> float:
        return median(figure(r) for r in found)

    for block, found in sorted(
        by_block.items(), key=lambda item: middle(item[1], lambda r: r["ratio"])
    ):
        print(
            f"| {block} | {len(found)} | ×{middle(found, lambda r: r['macs']):.2f} "
            f"| ×{middle(found, lambda r: r['ratio']):.2f} "
            f"| {middle(found, _price):.2f} | {sum(r['high'] < 1 for r in found)} "
            f"| {sum(r['low'] > 1 for r in found)} |"
        )


def _print_explained(record: Record, found: Record) -> None:
    """The layers whose time fell least behind their MACs, and why."""
    print(
        f"\n**{record['model']}, {record['block']}**: MACs ×{record['macs']:.3f}, "
        f"latency ×{record['ratio']:.3f}, latency ÷ MACs {_price(record):.2f}\n"
    )
    sites = [
        Site(
            entry["site"],
            tuple(Part(**p) for p in entry["before"]),
            tuple(Part(**p) for p in entry["after"]),
        )
        for entry in found["sites_ms"]
    ]
    print("| layer | | time | MACs | GFLOP/s |")
    print("|---|---|---:|---:|---:|")
    worst = sorted(sites, key=lambda site: -site.excess_ms)[:SITES]
    for site in worst:
        for title, parts in (("before", site.before), ("after", site.after)):
            for part in parts:
                print(_part_line(site.name if part is parts[0] else "", title, part))
    print()
    for site in worst:
        print(f"- `{site.name}`: {site.reason()}")
    lost = sum(max(site.excess_ms, 0.0) for site in sites)
    taken = sum(max(site.excess_ms, 0.0) for site in worst)
    print(
        f"- these {len(worst)} of {len(sites)} layers lose {taken:.3g} of the "
        f"{lost:.3g} ms that layers lose against their MACs"
    )
    print(f"- {_rest(sites, found)}")


def _rest(sites: list[Site], found: Record) -> str:
    """What the block left alone, and what onnxruntime reorders."""
    old, new = found["kept"]
    macs = old["macs"] + sum(p.macs for site in sites for p in site.before)
    whole = [
        part["time_ms"] + sum(p.time_ms for site in sites for p in getattr(site, when))
        for part, when in ((old, "before"), (new, "after"))
    ]
    before, after = found["runtime_ms"]
    return (
        f"what it left alone has {old['macs'] / macs:.0%} of the MACs and took "
        f"{old['time_ms']:.3g} of {whole[0]:.3g} ms before, {new['time_ms']:.3g} of "
        f"{whole[1]:.3g} after, {before:.3g} and {after:.3g} of them for reordering "
        "between layouts"
    )


def _part_line(site: str, title: str, part: Part) -> str:
    speed = f"{part.gflops:.1f}" if part.macs else ""
    macs = f"{part.macs / 1e6:.2f} M" if part.macs else ""
    return (
        f"| {site} | {title}: {part.kind} | {part.time_ms:.3f} ms | {macs} | {speed} |"
    )


@dataclass(frozen=True)
class Site:
    """A replaced layer's parts, in milliseconds, before and after."""

    name: str
    before: tuple[Part, ...]
    after: tuple[Part, ...]

    @property
    def before_ms(self) -> float:
        return sum(p.time_ms for p in self.before)

    @property
    def speed(self) -> float:
        """MACs per millisecond of what was replaced."""
        return sum(p.macs for p in self.before) / self.before_ms

    def excess(self, part: Part) -> float:
        """Time beyond what its MACs would take at the replaced layer's speed."""
        return part.time_ms - part.macs / self.speed

    @property
    def excess_ms(self) -> float:
        return sum(self.excess(p) for p in self.after) if self.before_ms else 0.0

    def _kinds(self) -> list[Part]:
        """The parts after, summed over those of a kind."""
        found: dict[str, Part] = {}
        for p in self.after:
            sums = found.get(p.kind, Part("", p.kind, 0.0, 0))
            found[p.kind] = Part(
                "", p.kind, sums.time_ms + p.time_ms, sums.macs + p.macs
            )
        return list(found.values())

    def reason(self) -> str:
        """In a sentence: which parts are behind the replaced layer's speed, by what."""
        after_ms = sum(p.time_ms for p in self.after)
        macs = [sum(p.macs for p in parts) for parts in (self.before, self.after)]
        text = (
            f"×{macs[1] / macs[0]:.3f} of the MACs took "
            f"×{after_ms / self.before_ms:.3f} of the time; it ran at "
            f"{2e-6 * self.speed:.1f} GFLOP/s"
        )
        slow = sorted(self._kinds(), key=lambda p: -self.excess(p))
        clauses = [
            f"its {p.kind} at {p.gflops:.1f} (+{self.excess(p):.2g} ms)"
            for p in slow
            if p.macs and self.excess(p) > 0.1 * self.excess_ms
        ]
        free = [p for p in self.after if not p.macs]
        if sum(p.time_ms for p in free) > 0.1 * self.excess_ms:
            kinds = ", ".join(dict.fromkeys(p.kind for p in free))
            spent = sum(p.time_ms for p in free)
            clauses.append(f"nodes without MACs ({kinds}) take {spent:.2g} ms")
        return "; ".join([text, *clauses])


if __name__ == "__main__":
    main()
