"""What a rule is, shown on an example site, and whether it holds what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from squeeze.cost.layers import count
from squeeze.cost.ops import cost
from squeeze.errors import RuleError
from squeeze.rewrite import sites
from squeeze.rewrite.blocks import Rule
from squeeze.rewrite.build import Fragment, Refused, build
from squeeze.rewrite.expressions import Value
from squeeze.rewrite.sites import Site
from squeeze.shapes import infer


@dataclass(frozen=True)
class Example:
    """One convolution to try a rule on: the defaults are EffNet Table 1's second."""

    cin: int = 64
    cout: int = 128
    size: tuple[int, ...] = (16, 16)
    kernel: int = 3
    stride: int = 1
    pool: int = 2
    relu: bool = True

    @property
    def text(self) -> str:
        kernel = "×".join([str(self.kernel)] * len(self.size))
        size = "×".join(str(n) for n in self.size)
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        pool = f", max-pool {self.pool}" if self.pool > 1 else ""
        act = ", ReLU" if self.relu else ", linear"
        return f"{kernel} {self.cin} → {self.cout} on {size}{stride}{act}{pool}"


PROBES = (
    Example(),
    Example(pool=1),
    Example(cin=64, cout=64, pool=1),
    Example(cin=64, cout=64, pool=1, relu=False),
    Example(stride=2, pool=1, size=(15, 16)),
    Example(kernel=5, pool=1),
    Example(size=(33,), pool=1),
)


@dataclass(frozen=True)
class Step:
    """One node of a built block: what it is, and its MACs as a formula."""

    op: str
    text: str
    output: tuple[int, ...]
    formula: str
    macs: int
    params: int


@dataclass(frozen=True)
class Explained:
    """A rule on an example: its steps, and the cost it has and replaces."""

    example: Example
    steps: tuple[Step, ...]
    macs: int
    params: int
    replaced_macs: int
    replaced_params: int


def example_model(example: Example) -> ir.Model:
    """A model of one convolution, with what the example puts behind it."""
    rank = len(example.size)
    x = ir.val("x", ir.DataType.FLOAT, [1, example.cin, *example.size])
    shape = (example.cout, example.cin, *[example.kernel] * rank)
    weights: list[ir.TensorProtocol] = [
        ir.Tensor(np.zeros(shape, np.float32), name="weight"),
        ir.Tensor(np.zeros(example.cout, np.float32), name="bias"),
    ]
    values = [ir.val(t.name or "", const_value=t) for t in weights]
    pads = [example.kernel // 2] * (2 * rank)
    attributes = {"pads": pads, "strides": [example.stride] * rank}
    nodes = [ir.node("Conv", [x, *values], attributes, name="example")]
    if example.relu:
        nodes.append(ir.node("Relu", [nodes[-1].outputs[0]]))
    if example.pool > 1:
        kernel = [example.pool] * rank
        pooling = {"kernel_shape": kernel, "strides": kernel}
        nodes.append(ir.node("MaxPool", [nodes[-1].outputs[0]], pooling))
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"value{index}"
    end = nodes[-1].outputs[0]
    end.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [end],
        nodes=nodes,
        initializers=values,
        opset_imports={"": 17},
        name="example",
    )
    return ir.Model(graph, ir_version=8)


def _site(rule: Rule, example: Example) -> tuple[Site, tuple[int, int]]:
    model = example_model(example)
    shapes = infer(model)
    site = sites.find(model, shapes)[0].site
    assert site is not None
    site = replace(site.with_pool(rule.pool == "absorb"))
    macs, _, params = count(site.nodes, shapes)
    return site, (macs, params)


def explain(
    rule: Rule, settings: Mapping[str, Value], example: Example | None = None
) -> Explained:
    """The block at an example convolution, node by node. Raises Refused."""
    example = example or Example()
    site, (macs, params) = _site(rule, example)
    fragment = build(rule, site, settings)
    steps = tuple(_step(node, fragment) for node in fragment.nodes)
    return Explained(
        example, steps, fragment.cost.macs, fragment.cost.params, macs, params
    )


def _step(node: ir.Node, fragment: Fragment) -> Step:
    shapes = fragment.shapes
    output = shapes.need(node.outputs[0], node)
    macs = (cost(node, shapes) or (0, 0))[0]
    formula, text = "", node.op_type
    kernel = list(node.attributes.get_ints("kernel_shape", ()) or ())
    if kernel:
        text += " " + "×".join(str(k) for k in kernel)
    strides = list(node.attributes.get_ints("strides", ()) or ())
    if any(s > 1 for s in strides):
        text += f", stride {'×'.join(str(s) for s in strides)}"
    if node.op_type == "Conv":
        weight = shapes.need(node.inputs[1], node)
        group = node.attributes.get_int("group", 1) or 1
        if group > 1:
            text += ", depthwise" if weight[1] == 1 else f", {group} groups"
        formula = " · ".join(str(n) for n in (*output[1:], *weight[1:]) if n > 1)
    _, _, params = count([node], shapes)
    return Step(node.op_type, text, output[1:], formula, macs, params)


def check(rule: Rule) -> str:
    """Try the rule on ordinary convolutions and say where it goes.

    Raises RuleError if it accepts none, or accepts one that it doesn't fit.
    """
    built: list[Example] = []
    refused: dict[Example, str] = {}
    wrong: dict[Example, str] = {}
    settings = rule.settings({})
    for example in PROBES:
        site, _ = _site(rule, example)
        try:
            accepted = not rule.refusal(rule.names(site, settings))
            build(rule, site, settings)
            built.append(example)
        except Refused as refusal:
            (wrong if accepted else refused)[example] = str(refusal)
    if wrong or not built:
        example, reason = next(iter((wrong or refused).items()))
        raise RuleError(
            f"{rule.path}: at {example.text}: {reason}; let a layer take the site's "
            "window and stride, or refuse such sites in an [[accept]]"
        )
    text = (
        f"{rule.path}: valid; fits {len(built)} of {len(PROBES)} example convolutions"
    )
    for example, reason in refused.items():
        text += f"\n  not {example.text}: {reason}"
    return text
