"""Convolutions, matrix products, pooling and normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from squeeze.recover.ops._op import Function, Op

_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_DECONV: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_MAX: tuple[Callable[..., Tensor], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE: tuple[Callable[..., Tensor], ...] = (
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
)


# -- windows ------------------------------------------------------------------------


def window_pads(
    op: Op,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """Explicit (begin, end) pads per spatial axis, auto_pad resolved."""
    auto, n = op.get("auto_pad", "NOTSET"), len(sizes)
    if auto == "VALID":
        return [(0, 0)] * n
    if auto in ("", "NOTSET"):
        pads = op.get("pads", [0] * 2 * n)
        return [(pads[i], pads[n + i]) for i in range(n)]
    pairs = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return pairs


def pad_sides(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def symmetric(pads: Sequence[tuple[int, int]]) -> bool:
    return all(a == b for a, b in pads)


def conv(op: Op, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    n = x.dim() - 2
    strides = op.get("strides", [1] * n)
    dilations = op.get("dilations", [1] * n)
    pads = window_pads(op, x.shape[2:], w.shape[2:], strides, dilations)
    inside = [a for a, _ in pads] if symmetric(pads) else [0] * n
    if not symmetric(pads):
        x = pad_sides(x, pads)
    group = op.get("group", 1)
    if x.device.type == "cpu" and group == x.shape[1] > 1 and n == 2:
        return _depthwise(x, w, bias, strides, inside, dilations)
    return _CONV[n - 1](x, w, bias, strides, inside, dilations, group)


def _depthwise(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> Tensor:
    """In the forms that oneDNN has kernels for: 10 to 30 times as fast as the others.

    A multiplier becomes parallel convolutions; bfloat16 stays for plain 3×3 alone,
    strides, dilations and larger kernels are computed in float32.
    """
    many, kind = len(w) // x.shape[1], x.dtype
    plain = max(strides) == max(dilations) == 1 and max(w.shape[2:]) <= 3
    if not plain:
        x = x.to(torch.promote_types(kind, w.dtype))
    with torch.autocast("cpu", enabled=plain and torch.is_autocast_enabled("cpu")):
        parts = [
            F.conv2d(
                x,
                w[i::many],
                None if bias is None else bias[i::many],
                strides,
                pads,
                dilations,
                x.shape[1],
            )
            for i in range(many)
        ]
    y = parts[0]
    if many > 1:  # channel by channel; channels last, as the parts are
        y = torch.stack([p.permute(0, 2, 3, 1) for p in parts], -1).flatten(-2)
        y = y.permute(0, 3, 1, 2)
    return y if plain else y.to(kind)


def conv_transpose(op: Op, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pads cut the output: the begin side by slicing where the sides differ."""
    n = x.dim() - 2
    strides = op.get("strides", [1] * n)
    dilations = op.get("dilations", [1] * n)
    extra = op.get("output_padding", [0] * n)
    span = [
        s * (size - 1) + e + (k - 1) * d + 1
        for s, size, e, k, d in zip(
            strides, x.shape[2:], extra, w.shape[2:], dilations, strict=True
        )
    ]
    pads = _deconv_pads(op, span, x.shape[2:], strides)
    group = op.get("group", 1)
    if symmetric(pads) and min(a for a, _ in pads) >= 0:
        inside = [a for a, _ in pads]
        return _DECONV[n - 1](x, w, bias, strides, inside, extra, group, dilations)
    y = _DECONV[n - 1](x, w, bias, strides, [0] * n, extra, group, dilations)
    return pad_sides(y, [(-a, -b) for a, b in pads])


def _deconv_pads(
    op: Op, span: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    auto, n = op.get("auto_pad", "NOTSET"), len(span)
    wanted = op.get("output_shape")
    if wanted is not None:
        wanted = wanted[-n:]
    elif auto.startswith("SAME"):
        wanted = [size * s for size, s in zip(sizes, strides, strict=True)]
    if wanted is None:
        pads = op.get("pads", [0] * 2 * n) if auto != "VALID" else [0] * 2 * n
        return [(pads[i], pads[n + i]) for i in range(n)]
    pairs = []
    for full, size in zip(span, wanted, strict=True):
        total = full - size
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if auto == "SAME_UPPER" else (large, small))
    return pairs


# -- pooling ------------------------------------------------------------------------


def _pooling(op: Op, x: Tensor) -> tuple[list[int], list[int], list[int], Any, Any]:
    """Kernel, strides, dilations, pads, and pads completed for ceil_mode."""
    n = x.dim() - 2
    kernel = [int(k) for k in op.get("kernel_shape")]
    strides = op.get("strides", [1] * n)
    dilations = op.get("dilations", [1] * n)
    pads = window_pads(op, x.shape[2:], kernel, strides, dilations)
    if not op.get("ceil_mode", 0):
        return kernel, strides, dilations, pads, pads
    full = []
    for i, (a, b) in enumerate(pads):
        room = x.shape[2 + i] + a + b - ((kernel[i] - 1) * dilations[i] + 1)
        windows = math.ceil(room / strides[i]) + 1
        if (windows - 1) * strides[i] >= x.shape[2 + i] + a:
            windows -= 1  # it would lie in the padding alone
        full.append((a, b + max((windows - 1) * strides[i] - room, 0)))
    return kernel, strides, dilations, pads, full


def max_pool(op: Op, x: Tensor) -> Tensor:
    n = x.dim() - 2
    kernel, strides, dilations, _, pads = _pooling(op, x)
    inside = [0] * n
    if symmetric(pads) and all(
        2 * a <= k for (a, _), k in zip(pads, kernel, strict=True)
    ):
        inside = [a for a, _ in pads]
    else:
        x = pad_sides(x, pads, -math.inf)
    return _MAX[n - 1](x, kernel, strides, inside, dilations)


def average_pool(op: Op, x: Tensor) -> Tensor:
    """Where the last window is completed, only what lies inside counts."""
    n = x.dim() - 2
    kernel, strides, _, pads, full = _pooling(op, x)
    include = bool(op.get("count_include_pad", 0))
    fits = all(2 * a <= k for (a, _), k in zip(pads, kernel, strict=True))
    if symmetric(full) and pads == full and fits:
        inside = [a for a, _ in pads]
        return _AVERAGE[n - 1](x, kernel, strides, inside, False, include)
    ones = torch.ones_like(x[:1, :1])
    counted = pad_sides(ones, pads, 1.0 if include else 0.0)
    rest = [(0, b - d) for (_, b), (_, d) in zip(full, pads, strict=True)]
    counted = pad_sides(counted, rest)
    total = _AVERAGE[n - 1](pad_sides(x, full), kernel, strides)
    return total / _AVERAGE[n - 1](counted, kernel, strides)


def global_pool(function: Callable[..., Tensor]) -> Function:
    return lambda op, x: function(x, list(range(2, x.dim())), True)


# -- products -----------------------------------------------------------------------


def gemm(op: Op, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha: float = op.get("alpha", 1.0)
    beta: float = op.get("beta", 1.0)
    if op.get("transA", 0):
        a = a.T
    weight = b if op.get("transB", 0) else b.T
    if alpha == beta == 1.0 and (c is None or c.dim() == 1):
        if c is not None and c.shape[0] != weight.shape[0]:
            c = c.expand(weight.shape[0])
        return F.linear(a, weight, c)
    y = F.linear(a, weight) * alpha
    return y if c is None else y + c * beta


def einsum(op: Op, *xs: Tensor) -> Tensor:
    equation: str = op.get("equation")
    return torch.einsum(equation.replace(" ", ""), *xs)


# -- normalisation ------------------------------------------------------------------


def batch_normalization(
    op: Op, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """While training: the batch's statistics, the running ones following by a tenth."""
    epsilon = op.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, var, scale, bias, op.training, 0.1, epsilon)


def instance_normalization(op: Op, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=op.get("epsilon", 1e-5))


def layer_normalization(
    op: Op, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    axis = op.get("axis", -1) % x.dim()
    shape, epsilon = x.shape[axis:], op.get("epsilon", 1e-5)
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    y: Tensor = F.layer_norm(x, shape, eps=epsilon) * scale
    return y if bias is None else y + bias


def rms_normalization(op: Op, x: Tensor, scale: Tensor) -> Tensor:
    dims = list(range(op.get("axis", -1) % x.dim(), x.dim()))
    mean = x.square().mean(dims, keepdim=True)
    return x * torch.rsqrt(mean + op.get("epsilon", 1e-5)) * scale


def group_normalization(op: Op, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias are per group until opset 20, per channel from 21 on."""
    groups = op.get("num_groups")
    if op.opset < 21:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, op.get("epsilon", 1e-5))


def local_response(op: Op, x: Tensor) -> Tensor:
    size: int = op.get("size")
    alpha: float = op.get("alpha", 1e-4)
    bias: float = op.get("bias", 1.0)
    sides = ((size - 1) // 2, size - 1 - (size - 1) // 2)
    squares = pad_sides(x.square().unsqueeze(1).flatten(3), [sides, (0, 0)])
    mean = F.avg_pool2d(squares, (size, 1), 1).squeeze(1).reshape(x.shape)
    return x / (bias + alpha * mean).pow(op.get("beta", 0.75))


def lp_normalization(op: Op, x: Tensor) -> Tensor:
    return F.normalize(x, float(op.get("p", 2)), op.get("axis", -1), 0.0)


TABLE: dict[str, Function] = {
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Einsum": einsum,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool(torch.mean),
    "GlobalMaxPool": global_pool(torch.amax),
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MatMul": lambda op, a, b: torch.matmul(a, b),
    "MaxPool": max_pool,
    "RMSNormalization": rms_normalization,
}
