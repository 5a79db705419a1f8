"""Time per layer, from onnxruntime's own profile.

onnxruntime fuses and renames what it runs. Its optimised graph, saved while the
profile is taken, tells what became of each layer: most kernels still write a value
of the model as given, or carry the name of one; a kernel then stands for the nodes
between that value and the values of other kernels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from squeeze import session
from squeeze.cost.layers import Profile
from squeeze.errors import SqueezeError
from squeeze.measure.latency import Candidate, Progress, Settings, placement
from squeeze.model import node_name

KERNEL = "_kernel_time"
SUFFIXES = ("_nchwc", "_quant", "_nhwc")  # what onnxruntime appends to renamed nodes
LEAST_RUNS, MOST_RUNS = 5, 300

Kind = Literal["layer", "runtime", "rest"]


@dataclass(frozen=True)
class Line:
    """Time of one layer: of one or several kernels, and the layers fused into it.

    `kind` is `runtime` for kernels that onnxruntime added (reordering, casts) and
    `rest` for the time between kernels. `gflops` is 2 × MACs per nanosecond.
    """

    name: str
    op: str
    kind: Kind
    fused: tuple[str, ...]
    time_ms: float
    share: float
    macs: int
    gflops: float | None


@dataclass(frozen=True)
class Timeline:
    """Lines that sum to `run_ms`, each the median over runs with the profiler on.

    Medians, so that a hiccup of the machine is not taken for a slow layer.
    """

    run_ms: float
    runs: int
    lines: tuple[Line, ...]


def timeline(
    candidate: Candidate,
    model: ir.Model,
    costs: Profile,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Timeline:
    """Run a model under onnxruntime's profiler and map its kernels to layers."""
    settings = settings or Settings()
    placement(candidate, settings.provider)
    with tempfile.TemporaryDirectory(prefix="squeeze-") as folder:
        events = _profile(candidate, settings, Path(folder), progress)
        optimised = _optimised_nodes(Path(folder) / OPTIMISED)
    runs = _runs(events)
    if not runs:
        raise SqueezeError(f"{candidate.path}: onnxruntime's profile holds no runs")
    kernels = {
        key: 1e3 * median(run.kernels.get(key, 0.0) for run in runs)
        for key in dict.fromkeys(key for run in runs for key in run.kernels)
    }
    rest = 1e3 * median(run.seconds - sum(run.kernels.values()) for run in runs)
    run_ms = sum(kernels.values()) + rest
    _name(optimised, runs[0].order)
    mapping = Cover.between(model.graph, optimised)
    lines = _lines(kernels, mapping, costs, run_ms)
    return Timeline(run_ms, len(runs), tuple(lines))


OPTIMISED = "optimised.onnx"


def _profile(
    candidate: Candidate, settings: Settings, folder: Path, progress: Progress | None
) -> list[dict[str, Any]]:
    """Events of onnxruntime's profile of many runs."""
    runner = session.open_model(
        candidate.path,
        threads=settings.threads,
        provider_name=settings.provider,
        profile_to=folder,
        optimised_to=folder / OPTIMISED,
    )
    for _ in range(2):
        session.run(runner, candidate.feeds, candidate.path)
    start, done = time.perf_counter(), 0
    most = min(MOST_RUNS, settings.runs or MOST_RUNS)
    while done < most:
        session.run(runner, candidate.feeds, candidate.path)
        done += 1
        spent = time.perf_counter() - start
        if progress is not None:
            progress(min(1.0, spent / settings.seconds))
        if spent > settings.seconds and done >= LEAST_RUNS:
            break
    return session.profiled(runner)


def _optimised_nodes(path: Path) -> list[onnx.NodeProto]:
    """Nodes of the graph that ran; none where onnxruntime couldn't save it."""
    if not path.is_file():
        return []
    return list(onnx.load(str(path), load_external_data=False).graph.node)


# -- the profile's events -----------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    seconds: float
    kernels: dict[tuple[str, str], float]  # (node's name, op) → seconds
    order: tuple[tuple[str, str], ...]  # as they ran


def _runs(events: Sequence[Mapping[str, Any]]) -> list[_Run]:
    """One entry per run but the first two, which warm up."""
    spans = [e for e in events if e.get("name") == "model_run"]
    nodes = [
        e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith(KERNEL)
    ]
    nodes.sort(key=lambda e: (e["ts"], -e["dur"]))
    starts = np.array([e["ts"] for e in nodes])
    found = []
    for span in spans[2:]:
        low, high = np.searchsorted(starts, [span["ts"], span["ts"] + span["dur"] + 1])
        kernels: dict[tuple[str, str], float] = {}
        order = []
        for event in _outermost(nodes[low:high]):
            key = (str(event["name"]).removesuffix(KERNEL), event["args"]["op_name"])
            kernels[key] = kernels.get(key, 0.0) + event["dur"] * 1e-6
            order.append(key)
        found.append(_Run(span["dur"] * 1e-6, kernels, tuple(order)))
    return found


def _name(kernels: Sequence[onnx.NodeProto], ran: Sequence[tuple[str, str]]) -> None:
    """Give nodes without a name the one that the profile made up for them.

    The saved graph has its nodes in the order in which they run.
    """
    if [kernel.op_type for kernel in kernels] == [op for _, op in ran]:
        for kernel, (name, _) in zip(kernels, ran, strict=True):
            kernel.name = kernel.name or name


def _outermost(events: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Without the kernels of bodies, whose time is in their If or Loop already."""
    end = -1
    for event in events:
        if event["ts"] + event["dur"] > end or event["dur"] == 0:
            yield event
            end = max(end, event["ts"] + event["dur"])


# -- kernels and layers -------------------------------------------------------------


@dataclass(frozen=True)
class Cover:
    """Which nodes of the model as given each kernel stands for."""

    covered: dict[str, tuple[ir.Node, ...]]  # kernel's node name → nodes

    @classmethod
    def between(cls, graph: ir.Graph, kernels: Sequence[onnx.NodeProto]) -> Cover:
        """Anchor kernels at the values that they write, then share out the rest."""
        values = {v.name: v for node in graph for v in node.outputs if v.name}
        names = {node_name(node): node for node in graph}
        anchors: dict[str, list[ir.Node]] = {}
        for kernel in kernels:
            found = _anchors(kernel, values, names)
            if found:
                anchors[kernel.name] = found
        taken = {node for nodes in anchors.values() for node in nodes}
        kept = {v for kernel in kernels for v in kernel.output if v in values}
        covered = {}
        for name, nodes in anchors.items():
            covered[name] = tuple(_with_fused(nodes, taken, kept))
            taken.update(covered[name])
        return cls(covered)


def _anchors(
    kernel: onnx.NodeProto, values: Mapping[str, ir.Value], names: Mapping[str, ir.Node]
) -> list[ir.Node]:
    producers = [values[v].producer() for v in kernel.output if v in values]
    found = [node for node in producers if node is not None]
    if kernel.name in names and names[kernel.name].op_type == kernel.op_type:
        found.append(names[kernel.name])
    if not found:
        for name in _spellings(kernel.name):
            node = names.get(name)
            if node is None and name in values:
                node = values[name].producer()
            if node is not None:
                found.append(node)
                break
    return list(dict.fromkeys(found))


def _spellings(name: str) -> Iterable[str]:
    """A renamed node's name, and what it may have been: x_nchwc, x/MatMulAddFusion."""
    yield name
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            yield name.removesuffix(suffix)
    while "/" in name.strip("/"):
        name = name.rpartition("/")[0]
        yield name


def _with_fused(
    nodes: Sequence[ir.Node], taken: set[ir.Node], kept: set[str]
) -> Iterable[ir.Node]:
    """The nodes and what was fused into them: upstream, up to what others write."""
    seen = set(nodes)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        for value in node.inputs:
            source = value.producer() if value is not None else None
            if source is None or source in seen or source in taken:
                continue
            if value is not None and value.name not in kept:
                seen.add(source)
                stack.append(source)


def _lines(
    kernels: Mapping[tuple[str, str], float],
    mapping: Cover,
    costs: Profile,
    run_ms: float,
) -> list[Line]:
    macs = {layer.name: layer.macs for layer in costs.layers}
    position = {layer.name: index for index, layer in enumerate(costs.layers)}
    grouped: dict[tuple[str, Kind], list[tuple[str, float, tuple[ir.Node, ...]]]] = {}
    for (name, op), spent in kernels.items():
        nodes = mapping.covered.get(name, ())
        if nodes:
            main = max(nodes, key=lambda n: macs.get(node_name(n), 0))
            key: tuple[str, Kind] = (node_name(main), "layer")
        else:
            key = (op, "runtime")
        grouped.setdefault(key, []).append((op, spent, nodes))
    lines = [_line(*key, parts, macs, run_ms) for key, parts in grouped.items()]
    lines.sort(key=lambda x: (x.kind != "layer", position.get(x.name, len(position))))
    rest = run_ms - sum(line.time_ms for line in lines)
    lines.append(Line("between kernels", "", "rest", (), rest, rest / run_ms, 0, None))
    return lines


def _line(
    name: str,
    kind: Kind,
    parts: Sequence[tuple[str, float, tuple[ir.Node, ...]]],
    macs: Mapping[str, int],
    run_ms: float,
) -> Line:
    spent = sum(part[1] for part in parts)
    nodes = dict.fromkeys(node for part in parts for node in part[2])
    total = sum(macs.get(node_name(node), 0) for node in nodes)
    fused = tuple(node_name(n) for n in nodes if node_name(n) != name)
    op = next((n.op_type for n in nodes if node_name(n) == name), parts[0][0])
    return Line(
        name=name if kind == "layer" else f"onnxruntime's {name}",
        op=op,
        kind=kind,
        fused=fused,
        time_ms=spent,
        share=spent / run_ms,
        macs=total,
        gflops=2e-6 * total / spent if total and spent else None,
    )
