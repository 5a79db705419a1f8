"""An ONNX graph as torch.nn modules, for tools that only see those."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import nn

from squeeze.rewrite.channels.trace import constant


def _tensor(node: ir.Node, index: int) -> torch.Tensor | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return torch.tensor(value.const_value.numpy())


def _pads(node: ir.Node) -> list[int]:
    pads = list(node.attributes.get_ints("pads", ()) or ())
    half = len(pads) // 2
    if pads[:half] != pads[half:]:
        raise NotImplementedError(f"{node.op_type} with uneven pads")
    return pads[:half]


def _conv(node: ir.Node) -> nn.Module:
    weight, bias = _tensor(node, 1), _tensor(node, 2)
    assert weight is not None
    groups = node.attributes.get_int("group", 1) or 1
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(node.attributes.get_ints("strides", ()) or (1, 1)),
        tuple(_pads(node) or (0, 0)),
        tuple(node.attributes.get_ints("dilations", ()) or (1, 1)),
        groups,
        bias is not None,
    )
    return _filled(layer, weight, bias)


def _gemm(node: ir.Node) -> nn.Module:
    weight, bias = _tensor(node, 1), _tensor(node, 2)
    assert weight is not None
    if not node.attributes.get_int("transB", 0):
        weight = weight.T
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return _filled(layer, weight, bias)


def _filled(
    layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    layer.weight.data = weight.clone()
    if bias is not None and layer.bias is not None:
        layer.bias.data = bias.clone()
    return layer


def _pool(node: ir.Node) -> nn.Module:
    kernel = node.attributes.get_ints("kernel_shape", ())
    strides = node.attributes.get_ints("strides", ()) or (1, 1)
    ceil = bool(node.attributes.get_int("ceil_mode", 0))
    pads = _pads(node) or [0, 0]
    if node.op_type == "MaxPool":
        return nn.MaxPool2d(tuple(kernel), tuple(strides), tuple(pads), ceil_mode=ceil)
    counts = bool(node.attributes.get_int("count_include_pad", 0))
    return nn.AvgPool2d(tuple(kernel), tuple(strides), tuple(pads), ceil, counts)


def _clip(node: ir.Node) -> nn.Module:
    low, high = constant(node, 1), constant(node, 2)
    if low is None or high is None:
        raise NotImplementedError("Clip without bounds")
    return nn.Hardtanh(float(low), float(high))


class _Apply(nn.Module):
    """A function without weights."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)  # type: ignore[operator]


def _concat(node: ir.Node) -> nn.Module:
    axis = node.attributes.get_int("axis", 1)
    return _Apply(lambda *inputs: torch.cat(inputs, axis))


def _mean(node: ir.Node) -> nn.Module:
    axes = node.attributes.get_ints("axes", None)
    given = constant(node, 1) if len(node.inputs) > 1 else None
    axes = axes or (given.reshape(-1).tolist() if given is not None else None)
    keep = bool(node.attributes.get_int("keepdims", 1))
    return _Apply(lambda x: x.mean(dim=tuple(axes or ()), keepdim=keep))


MODULES = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Clip": _clip,
    "Concat": _concat,
    "ReduceMean": _mean,
    "Relu": lambda node: nn.ReLU(),
    "Identity": lambda node: nn.Identity(),
    "Dropout": lambda node: nn.Identity(),
    "Flatten": lambda node: nn.Flatten(),
    "GlobalAveragePool": lambda node: nn.AdaptiveAvgPool2d(1),
    "Softmax": lambda node: nn.Softmax(-1),
    "Add": lambda node: _Apply(torch.add),
}


class Twin(nn.Module):
    """Runs the graph's nodes in order. NotImplementedError names what has no twin."""

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.steps = []
        self.layers = nn.ModuleList()
        for node in model.graph:
            if node.op_type not in MODULES:
                raise NotImplementedError(f"no torch module for {node.op_type}")
            self.layers.append(MODULES[node.op_type](node))
            inputs = [v.name for v in node.inputs if v and v.const_value is None]
            self.steps.append((inputs, node.outputs[0].name))
        self.given = model.graph.inputs[0].name
        self.result = model.graph.outputs[0].name

    def last(self) -> list[nn.Module]:
        """The layers that make the output, which keep their channels."""
        weighted = [m for m in self.layers if isinstance(m, nn.Conv2d | nn.Linear)]
        return weighted[-1:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {self.given: x}
        for layer, (inputs, output) in zip(self.layers, self.steps, strict=True):
            values[output] = layer(*(values[name] for name in inputs))
        return values[self.result]
