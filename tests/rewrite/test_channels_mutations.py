"""Bugs planted in the tracing, each of which the proofs must catch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from squeeze.rewrite.channels import regrid, table
from squeeze.rewrite.channels.labels import Labels
from squeeze.rewrite.channels.table import TABLE, Row
from squeeze.rewrite.channels.trace import Tracer, constant
from tests.builders import Net
from tests.rewrite import test_channels as suite

Patch = pytest.MonkeyPatch
prepare = import_module("squeeze.rewrite.channels.prepare")
trace = import_module("squeeze.rewrite.channels.trace")


def unjoined(patch: Patch) -> None:
    """Elementwise operands are not joined."""

    def broadcast(self: Tracer, operands: Any) -> Any:
        return list(max(operands, key=len))

    patch.setattr(Tracer, "broadcast", broadcast)


def flattened_across(patch: Patch) -> None:
    """Flatten repeats channels position by position instead of channel by channel."""
    real = regrid._regroup

    def regroup(labels: Any, axes: Any, sizes: Any, attention: Any) -> Any:
        if len(axes) > 1 and tuple(sizes[:-1]) == (1,):
            channel = next(a for a in axes if a.any())
            return [labels.plain(1), np.tile(channel, sizes[-1] // len(channel))]
        return real(labels, axes, sizes, attention)

    patch.setattr(regrid, "_regroup", regroup)


def concatenated_backwards(patch: Patch) -> None:
    """Concat puts its parts in reverse order."""

    def concat(t: Tracer, node: ir.Node) -> None:
        parts = [t.read(node, i) for i in range(len(node.inputs))]
        axes = list(parts[0])
        axes[1] = np.concatenate([p[1] for p in parts[::-1]])
        t.write(node, axes)

    patch.setitem(TABLE, "Concat", Row(concat))


def split_from_the_start(patch: Patch) -> None:
    """Every part of a Split starts at the first channel."""

    def split(t: Tracer, node: ir.Node) -> None:
        axes = list(t.read(node, 0))
        axis = (node.attributes.get_int("axis", 0) or 0) % len(axes)
        for index, value in enumerate(node.outputs):
            part = list(axes)
            part[axis] = axes[axis][: t.shape(value)[axis]]
            t.write(node, part, index)

    patch.setitem(TABLE, "Split", Row(split, TABLE["Split"].rewrite))


def shuffled_the_other_way(patch: Patch) -> None:
    """A channel shuffle is read as its inverse by the tracing."""
    real = table._gather

    def gather(t: Tracer, node: ir.Node) -> None:
        real(t, node)
        order = constant(node, 1)
        axes = t.read(node, 0)
        if order is not None and order.ndim == 1 and len(order) == len(axes[1]):
            out = list(axes)
            out[1] = axes[1][np.argsort(order)]
            t.write(node, out)

    patch.setitem(TABLE, "Gather", Row(gather, TABLE["Gather"].rewrite))


def groups_unequal(patch: Patch) -> None:
    """Grouped convolutions are taken for plain ones on their outputs."""
    real = Labels.collapse

    def collapse(self: Any, grid: Any, axis: int) -> Any:
        return grid.take(0, axis) if grid.shape[0] > 1 < grid.shape[1] else real(self, grid, axis)

    patch.setattr(Labels, "collapse", collapse)


def softmax_elementwise(patch: Patch) -> None:
    """Softmax is followed as if its channels did not compete."""
    patch.setitem(TABLE, "Softmax", Row(table._elementwise))


def shapes_unfolded(patch: Patch) -> None:
    """Constants computed from shapes are left to change with them."""
    patch.setattr(prepare, "_fold", lambda *args: False)
    patch.setattr(trace, "_protect_shape_readers", lambda *args: None)


def unknown_as_elementwise(patch: Patch) -> None:
    """An unknown op is followed as if it were elementwise."""
    patch.setitem(TABLE, "ReverseSequence", Row(lambda t, n: t.write(n, t.read(n, 0))))


def nothing_protected(patch: Patch) -> None:
    """Choices over channels and outputs protect nothing."""
    patch.setattr(Labels, "protect", lambda self, labels, reason: None)


def softmax_net() -> ir.Model:
    net = Net(["N", 3, 8, 8])
    a = net.node("Softmax", net.conv(3, 8), axis=1)
    return suite.finish(net, net.conv(8, 4, source=a))


def reversed_net() -> ir.Model:
    net = Net([2, 3, 8, 8])
    a = net.node("Relu", net.conv(3, 8))
    b = net.node("ReverseSequence", a, net.weight(np.array([5, 8])), batch_axis=0, time_axis=1)
    return suite.finish(net, net.conv(8, 4, source=b))


def built(build: suite.Build) -> Callable[[], ir.Model]:
    def make() -> ir.Model:
        net = Net(["N", 3, 8, 8])
        return suite.finish(net, build(net))

    return make


# each bug, with the graphs of the suite that have what it breaks
BUGS: dict[Callable[[Patch], None], list[Callable[[], ir.Model]]] = {
    unjoined: [built(suite.residual)],
    flattened_across: [built(suite.flatten)],
    concatenated_backwards: [built(suite.inception), built(suite.dense)],
    split_from_the_start: [built(suite.shuffle)],
    shuffled_the_other_way: [built(suite.shuffle)],
    groups_unequal: [built(suite.grouped)],
    softmax_elementwise: [softmax_net],
    unknown_as_elementwise: [reversed_net],
    nothing_protected: [softmax_net],
}


def wrong(model: ir.Model) -> bool:
    """Whether removal fails, or its outputs differ from the silenced original's."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)
    try:
        error, _, _, _ = suite.proof.prove(model, {"x": x}, suite.halve())
    except Exception:  # a model that no runtime loads is caught as well
        return True
    return error > suite.EXACT


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bugs_are_caught(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """With the bug in, at least one graph of the suite is found wrong."""
    assert not any(wrong(make()) for make in BUGS[bug])
    bug(monkeypatch)
    assert any(wrong(make()) for make in BUGS[bug])


def test_unfolded_shapes_are_caught(monkeypatch: Patch) -> None:
    """Without folding, attention's scale would follow the pruned width."""
    shapes_unfolded(monkeypatch)
    with pytest.raises(AssertionError):
        suite.test_scale_from_a_shape_does_not_change()
