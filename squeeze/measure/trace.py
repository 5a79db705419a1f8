"""Where two models begin to differ: values of the same name, compared."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from squeeze import session
from squeeze.calibrate.data import Data
from squeeze.errors import SqueezeError
from squeeze.measure.cases import Case
from squeeze.measure.inputs import Feeds, random_feeds
from squeeze.model import node_name

SAMPLES = 8  # every shared value of this many samples is held at once


@dataclass(frozen=True)
class Difference:
    """A value that both models compute: ‖new − base‖ / ‖base‖, None if not finite.

    `added` is what the layer adds to the largest error among the shared values before
    it that it depends on.
    """

    value: str
    layer: str
    op: str
    relative: float | None
    added: float | None


def differences(
    base: Case, new: Case, data: Data | None = None, seed: int = 0
) -> list[Difference]:
    """Every float value with the same name and shape in both, in the base's order."""
    shared = _shared(base, new)
    if not shared:
        raise SqueezeError(
            f"{base.path} and {new.path} share no value names; leave --layers out"
        )
    feeds = _feeds(base, data, seed)
    ours, theirs = (_values(case, list(shared), feeds) for case in (base, new))
    found: dict[str, Difference] = {}
    origin = _nearest_shared(base.model.graph, set(shared))
    for name, node in shared.items():
        error = _relative(ours[name], theirs[name])
        before = [found[v].relative for v in origin[name] if v in found]
        known = [b for b in before if b is not None]
        added = None if error is None else error - max(known, default=0.0)
        found[name] = Difference(name, node_name(node), node.op_type, error, added)
    return list(found.values())


def _shared(base: Case, new: Case) -> dict[str, ir.Node]:
    theirs = {v.name for node in new.model.graph for v in node.outputs if v.name}
    return {
        v.name: node
        for node in base.model.graph
        for v in node.outputs
        if v.name in theirs
        and v.name not in base.shapes.constants
        and base.shapes.of(v) == new.shapes.shapes.get(v.name or "")
        and (kind := base.shapes.dtype(v)) is not None
        and kind.is_floating_point()
    }


def _feeds(base: Case, data: Data | None, seed: int) -> Feeds:
    if data is None:
        runner = session.open_model(base.path, optimize=False)
        return random_feeds(runner, base.shapes.inputs, seed)
    count = min(len(data), SAMPLES, data.batch_size)
    if count < data.batch_size and len(data) >= data.batch_size:
        count = data.batch_size if _is_fixed(base.model) else count
    picked = replace(data, indices=data.indices[:count], batch_size=count)
    return next(iter(picked)).inputs


def _is_fixed(model: ir.Model) -> bool:
    return any(
        v.shape is not None and len(v.shape) > 0 and isinstance(v.shape[0], int)
        for v in model.graph.inputs
    )


def _values(case: Case, names: list[str], feeds: Feeds) -> dict[str, np.ndarray]:
    """The named values of one run, of a copy that has them as outputs."""
    by_name = {v.name: v for node in case.model.graph for v in node.outputs}
    graph = case.model.graph
    outputs = list(graph.outputs)
    extra = [v for n in names if (v := by_name[n]) not in outputs]
    kinds = [(v, v.type) for v in extra]
    try:
        for value in extra:
            value.type = value.type or ir.TensorType(
                case.shapes.dtype(value) or ir.DataType.FLOAT
            )
        graph.outputs.extend(extra)
        with tempfile.TemporaryDirectory(prefix="squeeze-") as folder:
            path = Path(folder) / "traced.onnx"
            ir.save(case.model, path, external_data="traced.data")
            runner = session.open_model(path, optimize=False)
            names_in = [i.name for i in runner.get_inputs()]
            theirs = dict(zip(names_in, feeds.values(), strict=True))
            return dict(zip(names, runner.run(names, theirs), strict=True))
    except SqueezeError:
        raise
    except Exception as error:  # onnxruntime raises many kinds
        raise SqueezeError(
            f"{case.path}: its values can't be read: {session.first_line(error)}; "
            "leave --layers out"
        ) from error
    finally:
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        for value, kind in kinds:
            value.type = kind


def _nearest_shared(graph: ir.Graph, shared: set[str]) -> dict[str, set[str]]:
    """For each value the shared values that it is computed from directly."""
    before: dict[str, set[str]] = {}
    for node in graph:
        sources: set[str] = set()
        for value in node.inputs:
            if value is None or not value.name:
                continue
            sources |= (
                {value.name} if value.name in shared else before.get(value.name, set())
            )
        for value in node.outputs:
            before[value.name or ""] = sources
    return before


def _relative(base: np.ndarray, new: np.ndarray) -> float | None:
    a, b = base.astype(np.float64).ravel(), new.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    error, norm = float(np.linalg.norm(b - a)), float(np.linalg.norm(a))
    return error / norm if norm else (0.0 if not error else float("inf"))
