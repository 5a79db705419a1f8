"""What happened to each layer: `Change`s of a rewrite that removes channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from squeeze.cost.layers import count
from squeeze.model import node_name
from squeeze.rewrite.channels.remove import axes_of, remove
from squeeze.rewrite.channels.trace import Array, Producer, Trace
from squeeze.rewrite.plan import Change, Cost
from squeeze.shapes import Shapes

# their channels lie on the second axis of the output; others' on the last
FIRST = ("Conv", "ConvTranspose", "GroupNormalization", "LRN")
Reason = Callable[[str], str | None]


@dataclass(frozen=True)
class LayerView:
    """A layer before removal: its output axis (None where nothing makes one)."""

    node: ir.Node
    producer: Producer | None
    channels: int
    kept: int
    why: str
    before: Cost


def apply(
    trace: Trace, keep: Array, action: str, reason: Reason = lambda name: None
) -> tuple[Shapes, list[Change], dict[str, Array]]:
    """Remove, in place, and report every layer.

    Also returns which output channels of each layer, and of each node that reads a
    statistic over channels, were kept, by its name. `reason` says why a layer was left
    out by the user, or None.
    """
    views = list(_views(trace, keep, reason))
    readers = [*(v.node for v in views), *(s.node for s in trace.statistics)]
    masks = {node_name(n): trace.mask(_outputs(trace, n, None), keep) for n in readers}
    shapes = remove(trace, keep)
    changes = [_change(view, action, shapes) for view in views]
    return shapes, changes, masks


def _views(trace: Trace, keep: Array, reason: Reason) -> Iterator[LayerView]:
    made = {p.node: p for p in trace.producers}
    for contraction in trace.contractions:
        node = contraction.node
        weights = [v for v in node.inputs[1:2] if v is not None and v.const_value]
        if not weights and node not in made:
            continue
        producer = made.get(node)
        labels = _outputs(trace, node, producer)
        kept = trace.size(labels, keep)
        why = "" if kept < len(labels) else _why(trace, labels, reason(node_name(node)))
        cost = Cost(*count([node], trace.shapes))
        yield LayerView(node, producer, len(labels), kept, why, cost)


def _outputs(trace: Trace, node: ir.Node, producer: Producer | None) -> Array:
    """Labels of the axis of a layer's output that holds its channels."""
    axes = trace.axes[node.outputs[0]]
    if node.op_type in FIRST:
        return axes[1]
    if node.op_type in ("Gemm", "MatMul") or producer is None:
        return axes[-1] if axes else np.zeros(1, np.int64)
    return axes_of(trace, node, producer.operand)[producer.axis]


def _why(trace: Trace, labels: Array, left_out: str | None) -> str:
    """Why a layer kept all of its channels."""
    if left_out:
        return left_out
    roots = trace.root[np.maximum(labels, 0)]
    reasons = Counter(trace.why[int(r)] for r in roots if int(r) in trace.why)
    if reasons:
        return reasons.most_common(1)[0][0]
    if not labels.any():
        return "its outputs are no channels"
    if len(np.unique(roots)) == 1:
        return "its channels are one unit: all or none"
    return "all of its channels matter"


def _change(view: LayerView, action: str, shapes: Shapes) -> Change:
    after = Cost(*count([view.node], shapes))
    return Change(
        site=node_name(view.node),
        action=action,
        applied=view.kept < view.channels,
        reason=view.why,
        before=view.before,
        after=after,
        details={"channels": [view.channels, view.kept]},
    )


def merged(before: list[Change], after: list[Change]) -> list[Change]:
    """Changes of two rounds as one: the first's start, the second's end."""
    later: Mapping[str, Change] = {c.site: c for c in after}
    result = []
    for change in before:
        end = later.get(change.site)
        if end is None:
            result.append(change)
            continue
        applied = change.applied or end.applied
        channels = [change.details["channels"][0], end.details["channels"][1]]
        result.append(
            Change(
                site=change.site,
                action=change.action,
                applied=applied,
                reason="" if applied else end.reason,
                before=change.before,
                after=end.after,
                fit_error=end.fit_error
                if end.fit_error is not None
                else change.fit_error,
                details={**change.details, "channels": channels},
            )
        )
    return result
