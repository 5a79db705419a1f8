"""Ops that work element by element, and reductions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from squeeze.recover.ops._op import Function, Op, axes_of, together

# onnx's TensorProto types that are no floats; floats are one type here
_TYPES = {
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
}
_FLOATS = (1, 10, 11, 16)
CASTS = (*_TYPES, *_FLOATS)


def unary(function: Callable[[Tensor], Tensor]) -> Function:
    return lambda op, x: function(x)


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda op, a, b: function(*together(a, b))


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda op, *xs: functools.reduce(function, together(*xs))


def mean(op: Op, *xs: Tensor) -> Tensor:
    return functools.reduce(operator.add, together(*xs)) / len(xs)


def cast(op: Op, x: Tensor, like: Tensor | None = None) -> Tensor:
    """Floats keep the module's own precision, whatever float they are cast to."""
    wanted = like.dtype if like is not None else _TYPES.get(op.get("to"))
    if wanted is not None and not wanted.is_floating_point:
        return x.to(wanted)
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def clip(
    op: Op, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    lowest = op.get("min") if low is None else low.to(x.device)
    highest = op.get("max") if high is None else high.to(x.device)
    if lowest is not None:
        x = x.clamp(min=lowest)
    return x if highest is None else x.clamp(max=highest)


def divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or b.is_floating_point():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def mod(op: Op, a: Tensor, b: Tensor) -> Tensor:
    a, b = together(a, b)
    return torch.fmod(a, b) if op.get("fmod", 0) else torch.remainder(a, b)


def prelu(op: Op, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def gelu(op: Op, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=op.get("approximate", "none"))


def hard_sigmoid(op: Op, x: Tensor) -> Tensor:
    alpha: float = op.get("alpha", 0.2)
    beta: float = op.get("beta", 0.5)
    return (x * alpha + beta).clamp(0, 1)


def celu(op: Op, x: Tensor) -> Tensor:
    return F.celu(x, op.get("alpha", 1.0))


def selu(op: Op, x: Tensor) -> Tensor:
    alpha: float = op.get("alpha", 1.67326319217681884765625)
    gamma: float = op.get("gamma", 1.05070102214813232421875)
    return gamma * F.elu(x, alpha)


def shrink(op: Op, x: Tensor) -> Tensor:
    bias, edge = op.get("bias", 0.0), op.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, zero))


def thresholded_relu(op: Op, x: Tensor) -> Tensor:
    return torch.where(x > op.get("alpha", 1.0), x, torch.zeros_like(x))


def where(op: Op, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    condition, a, b = together(condition, a, b)
    return torch.where(condition, a, b)


def dropout(op: Op, x: Tensor, *rest: Tensor | None) -> Any:
    """What inference does: nothing."""
    return (x, torch.ones_like(x, dtype=torch.bool))[: op.outputs]


def softmax(op: Op, x: Tensor) -> Tensor:
    return _over_axis(op, x, torch.softmax)


def log_softmax(op: Op, x: Tensor) -> Tensor:
    return _over_axis(op, x, torch.log_softmax)


def _over_axis(op: Op, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Before opset 13 the op flattens to two dimensions at `axis`."""
    if op.opset >= 13:
        return function(x, op.get("axis", -1))
    axis = op.get("axis", 1) % max(x.dim(), 1)
    return function(x.flatten(axis), -1).reshape(x.shape)


# -- reductions ---------------------------------------------------------------------


def reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Function:
    def reduce(op: Op, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = axes_of(op, axes)
        if not dims:
            if op.get("noop_with_empty_axes", 0):
                return x
            dims = list(range(x.dim()))
        return function(x, dims, bool(op.get("keepdims", 1)))

    return reduce


def product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def arg(function: Callable[..., Tensor]) -> Function:
    def extreme(op: Op, x: Tensor) -> Tensor:
        axis, keep = op.get("axis", 0), bool(op.get("keepdims", 1))
        return function(x, axis, keepdim=keep)

    return extreme


def cumulative_sum(op: Op, x: Tensor, axis: Tensor) -> Tensor:
    dim = int(axis)
    if op.get("reverse", 0):
        x = x.flip(dim)
    total = x.cumsum(dim)
    if op.get("exclusive", 0):
        total = total - x
    return total.flip(dim) if op.get("reverse", 0) else total


TABLE: dict[str, Function] = {
    # one input
    "Abs": unary(torch.abs),
    "Acos": unary(torch.acos),
    "Asin": unary(torch.asin),
    "Atan": unary(torch.atan),
    "Ceil": unary(torch.ceil),
    "Cos": unary(torch.cos),
    "Cosh": unary(torch.cosh),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Identity": unary(lambda x: x),
    "IsNaN": unary(torch.isnan),
    "Log": unary(torch.log),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Reciprocal": unary(torch.reciprocal),
    "Round": unary(torch.round),
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Sinh": unary(torch.sinh),
    "Sqrt": unary(torch.sqrt),
    "Tan": unary(torch.tan),
    "Tanh": unary(torch.tanh),
    # activations
    "Celu": celu,
    "Clip": clip,
    "Elu": lambda op, x: F.elu(x, op.get("alpha", 1.0)),
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "LeakyRelu": lambda op, x: F.leaky_relu(x, op.get("alpha", 0.01)),
    "LogSoftmax": log_softmax,
    "Mish": unary(F.mish),
    "PRelu": prelu,
    "Relu": unary(F.relu),
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": unary(torch.sigmoid),
    "Softmax": softmax,
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Swish": lambda op, x: x * torch.sigmoid(op.get("alpha", 1.0) * x),
    "ThresholdedRelu": thresholded_relu,
    # two and more
    "Add": binary(operator.add),
    "And": binary(torch.logical_and),
    "Div": binary(divide),
    "Equal": binary(torch.eq),
    "Greater": binary(torch.gt),
    "GreaterOrEqual": binary(torch.ge),
    "Less": binary(torch.lt),
    "LessOrEqual": binary(torch.le),
    "Max": variadic(torch.maximum),
    "Mean": mean,
    "Min": variadic(torch.minimum),
    "Mod": mod,
    "Mul": binary(operator.mul),
    "Or": binary(torch.logical_or),
    "Pow": binary(torch.pow),
    "Sub": binary(operator.sub),
    "Sum": variadic(operator.add),
    "Where": where,
    "Xor": binary(torch.logical_xor),
    # types
    "Cast": cast,
    "CastLike": cast,
    "Dropout": dropout,
    # reductions
    "ArgMax": arg(torch.argmax),
    "ArgMin": arg(torch.argmin),
    "CumSum": cumulative_sum,
    "ReduceL1": reduction(lambda x, d, k: x.abs().sum(d, k)),
    "ReduceL2": reduction(lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k)),
    "ReduceLogSum": reduction(lambda x, d, k: x.sum(d, k).log()),
    "ReduceLogSumExp": reduction(torch.logsumexp),
    "ReduceMax": reduction(torch.amax),
    "ReduceMean": reduction(lambda x, d, k: x.mean(d, k)),
    "ReduceMin": reduction(torch.amin),
    "ReduceProd": reduction(product),
    "ReduceSum": reduction(lambda x, d, k: x.sum(d, k)),
    "ReduceSumSquare": reduction(lambda x, d, k: x.square().sum(d, k)),
}
