"""This machine's constants, measured through onnxruntime, as a device file.

Each constant is the throughput of small graphs that one resource bounds: dense and
depthwise convolutions and matrix products of common sizes, with channels that fill
registers and that don't; ops one by one, alone and behind a convolution; additions that
fit the caches, additions that don't, and a chain of tiny nodes.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from squeeze import session
from squeeze.cost import profile
from squeeze.measure.latency import CLOCKS, Clock

REPEATS = 7
DEPTH = 8  # nodes per graph: what one run takes besides is spread over them
SIZES = [2**n for n in range(16, 27)]  # bytes of a tensor, 64 KB to 64 MB
CHANNEL_BLOCK = 16  # onnxruntime lays channels out in blocks of 8 or 16 for registers
Made = tuple[onnx.ModelProto, tuple[int, ...]]


@dataclass(frozen=True)
class Convolution:
    """A convolution at `size` × `size` with as many channels out as in."""

    channels: int
    size: int
    kernel: int
    group: int = 1

    @property
    def flops(self) -> int:
        inside = self.channels // self.group * self.kernel**2
        return 2 * self.channels * self.size**2 * inside


# sizes at which common networks spend their time: k×k, then the kinds that differ
DENSE = (Convolution(64, 56, 3), Convolution(128, 28, 3), Convolution(256, 14, 3))
KINDS = {
    "1×1": (Convolution(64, 56, 1), Convolution(256, 14, 1), Convolution(512, 7, 1)),
    "depthwise": tuple(
        Convolution(c, size, 3, c) for c, size in ((96, 56), (192, 28), (384, 14))
    ),
    "grouped": (Convolution(128, 56, 3, 32), Convolution(512, 14, 3, 32)),
}
UNALIGNED = {  # the same with channels that are no multiple of CHANNEL_BLOCK
    "3×3": (Convolution(60, 56, 3), Convolution(124, 28, 3), Convolution(250, 14, 3)),
    "1×1": (Convolution(60, 56, 1), Convolution(250, 14, 1), Convolution(500, 7, 1)),
    "depthwise": tuple(
        Convolution(c, size, 3, c) for c, size in ((90, 56), (186, 28), (374, 14))
    ),
}
PRODUCTS = ((50, 768), (196, 384), (49, 768))  # rows and columns of FC layers
HEADS = ((12, 50, 64), (192, 49, 32), (6, 197, 64))  # attention: heads, length, width
OPERATIONS = (  # ops that take more than moving their data, at attention's sizes
    "Erf Exp Gelu HardSigmoid HardSwish LayerNormalization Sigmoid Softmax Tanh".split()
)
POOLS = ("AveragePool", "MaxPool")
BEHIND = "Add Clip HardSigmoid HardSwish LeakyRelu Relu Sigmoid Tanh".split()
TOKENS, PIXELS, SCORES = (1, 196, 768), (1, 64, 56, 56), (64, 3, 49, 49)
SHAPES = {"AveragePool": PIXELS, "MaxPool": PIXELS, "Softmax": SCORES}


def device_file(
    threads: int = 0,
    progress: Callable[[float], None] | None = None,
    repeats: int = REPEATS,
    clock: Clock = "wall",
) -> str:
    """Text of a device file for this machine with `threads` threads per operator."""
    convs = (
        len(DENSE) + sum(map(len, KINDS.values())) + sum(map(len, UNALIGNED.values()))
    )
    others = len(PRODUCTS) + len(HEADS) + len(OPERATIONS) + len(POOLS) + len(SIZES)
    ticking = _Clock(threads, progress, convs + others + 1, repeats, CLOCKS[clock])
    constants = {"layer_overhead": ticking.seconds(_chain((1, 8))) / DEPTH}
    constants["matrix"] = _convolving(ticking, DENSE)
    tables = {
        "kinds": _kinds(ticking),
        "unaligned": {k: _convolving(ticking, c) for k, c in UNALIGNED.items()},
        "operations": {op: _operating(ticking, op) for op in (*OPERATIONS, *POOLS)},
    }
    constants |= _memory(ticking)
    return _text(threads, clock, constants, _fused(), tables)


def _kinds(clock: _Clock) -> dict[str, float]:
    found = {kind: _convolving(clock, convs) for kind, convs in KINDS.items()}
    found["FC"] = geometric_mean(
        2 * rows * width**2 * DEPTH / clock.seconds(_products(rows, width))
        for rows, width in PRODUCTS
    )
    found["matmul"] = geometric_mean(
        2
        * heads
        * length**2
        * width
        * DEPTH
        / clock.seconds(_attending(heads, length, width))
        for heads, length, width in HEADS
    )
    return found


def _operating(clock: _Clock, op: str) -> float:
    """Operations per second of an op, as `profile` counts operations."""
    made = _operations([op] * DEPTH, SHAPES.get(op, TOKENS))
    layers = profile(ir.from_proto(made[0])).layers
    return sum(layer.flops for layer in layers) / clock.seconds(made)


def _fused() -> list[str]:
    """Ops that onnxruntime does within the convolution before them."""
    conv = Convolution(64, 28, 3)
    alone = _runs_nodes(_convolutions(conv))
    return ["BatchNormalization"] + [
        op for op in BEHIND if _runs_nodes(_convolutions(conv, op)) == alone
    ]


def _runs_nodes(made: Made) -> int:
    """Nodes of the graph that onnxruntime makes of a model."""
    with tempfile.TemporaryDirectory(prefix="squeeze-") as folder:
        path = Path(folder) / "optimised.onnx"
        session.create(made[0].SerializeToString(), optimised_to=path)
        return len(onnx.load(path).graph.node)


def _convolving(clock: _Clock, convs: Sequence[Convolution]) -> float:
    return geometric_mean(
        conv.flops * DEPTH / clock.seconds(_convolutions(conv)) for conv in convs
    )


def _memory(clock: _Clock) -> dict[str, float]:
    """Bandwidth outside the caches, within them, and their size.

    They end where an addition's bandwidth falls below the geometric mean of its best
    and its worst.
    """
    moved = {
        size: 3 * size * DEPTH / clock.seconds(_chain((1, size // 4))) for size in SIZES
    }
    outside, best = moved[SIZES[-1]], max(moved.values())
    fitting = [size for size in SIZES if moved[size] >= (best * outside) ** 0.5]
    return {
        "internal_memory": 3 * max(fitting),
        "bandwidth": outside,
        "internal_bandwidth": geometric_mean(moved[size] for size in fitting),
        "elementwise": best / 3 / 4,
        "channel_block": CHANNEL_BLOCK,
    }


def _text(
    threads: int,
    clock: Clock,
    constants: dict[str, float],
    fused: Sequence[str],
    tables: dict[str, dict[str, float]],
) -> str:
    import onnxruntime as ort

    machine = platform.processor() or platform.machine()
    how = f"{threads or 'default'} threads, 32-bit floats, {clock} time"
    lines = [
        f'description = "{machine}, {how}"',
        'source = """',
        f"Measured by squeeze bench --calibrate-device on {time.strftime('%Y-%m-%d')},",
        f'onnxruntime {ort.__version__}."""',
        "",
        *(f"{key} = {value:.4g}" for key, value in constants.items()),
        f"fused = [{', '.join(f'{chr(34)}{op}{chr(34)}' for op in fused)}]",
        'overlap = "full"',
    ]
    for title, table in tables.items():
        lines += ["", f"[{title}]"]
        lines += [f'"{name}" = {value:.4g}' for name, value in table.items()]
    return "\n".join(lines) + "\n"


class _Clock:
    """Times graphs, and reports how many of them are done."""

    def __init__(
        self,
        threads: int,
        progress: Callable[[float], None] | None,
        count: int,
        repeats: int,
        now: Callable[[], float],
    ) -> None:
        self.threads, self.progress = threads, progress
        self.count, self.repeats, self.done = count, repeats, 0
        self.now = now

    def seconds(self, made: Made) -> float:
        """Fastest of several medians: what the machine can do, not its neighbours."""
        model, shape = made
        runner = session.create(model.SerializeToString(), threads=self.threads)
        feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        runner.run(None, feeds)
        times = []
        for _ in range(self.repeats):
            runs = [self._once(runner, feeds) for _ in range(3)]
            while len(runs) < 50 and sum(runs) < 0.02:
                runs.append(self._once(runner, feeds))
            times.append(median(runs))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done / self.count)
        return min(times)

    def _once(self, runner: session.Session, feeds: dict[str, np.ndarray]) -> float:
        start = self.now()
        runner.run(None, feeds)
        return self.now() - start


def _model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    shape: tuple[int, ...],
    output: str,
) -> Made:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("x", shape), (output, None))
    ]
    graph = helper.make_graph(nodes, "probe", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), shape


def _convolutions(conv: Convolution, behind: str | None = None) -> Made:
    """DEPTH convolutions in a chain, each with the op `behind` it if one is named."""
    shape = (conv.channels, conv.channels // conv.group, conv.kernel, conv.kernel)
    pads = [conv.kernel // 2] * 4
    nodes, value = [], "x"
    for i in range(DEPTH):
        made = helper.make_node(
            "Conv", [value, f"w{i}"], [f"c{i}"], pads=pads, group=conv.group
        )
        nodes.append(made)
        if behind:
            nodes.append(_node(behind, f"c{i}", f"y{i}", other=value))
        value = nodes[-1].output[0]
    return _model(
        nodes, _weights(shape), (1, conv.channels, conv.size, conv.size), value
    )


def _products(rows: int, width: int) -> Made:
    """DEPTH matrix products in a chain."""
    nodes = [
        helper.make_node("MatMul", [f"y{i}" if i else "x", f"w{i}"], [f"y{i + 1}"])
        for i in range(DEPTH)
    ]
    return _model(nodes, _weights((width, width)), (1, rows, width), f"y{DEPTH}")


def _attending(heads: int, length: int, width: int) -> Made:
    """DEPTH products of activations, Q·Kᵀ and ·V in turn; scaled to stay finite."""
    nodes = [
        helper.make_node("Mul", ["x", "w0"], ["v"]),
        helper.make_node("Transpose", ["v"], ["k"], perm=[0, 1, 3, 2]),
    ]
    nodes += [
        helper.make_node(
            "MatMul", [f"y{i}" if i else "v", "v" if i % 2 else "k"], [f"y{i + 1}"]
        )
        for i in range(DEPTH)
    ]
    return _model(nodes, _weights((1,)), (1, heads, length, width), f"y{DEPTH}")


def _chain(shape: tuple[int, ...]) -> Made:
    """DEPTH additions of the input: two reads and a write each."""
    return _operations(["Add"] * DEPTH, shape)


def _operations(ops: Sequence[str], shape: tuple[int, ...]) -> Made:
    """Ops in a chain that keep the shape."""
    nodes = [
        _node(op, f"y{i}" if i else "x", f"y{i + 1}", other="x")
        for i, op in enumerate(ops)
    ]
    scale = numpy_helper.from_array(np.ones(shape[-1], np.float32), "scale")
    weights = [scale] if "LayerNormalization" in ops else []
    return _model(nodes, weights, shape, f"y{len(ops)}")


def _node(op: str, source: str, out: str, other: str) -> onnx.NodeProto:
    """One op; `other` is the second operand of those that take two."""
    inputs = {"Add": [source, other], "LayerNormalization": [source, "scale"]}
    window: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}
    return helper.make_node(
        op, inputs.get(op, [source]), [out], **(window if op in POOLS else {})
    )


def _weights(shape: tuple[int, ...]) -> list[onnx.TensorProto]:
    """Weights for DEPTH nodes: each its own, as layers have, so none stays cached."""
    rng = np.random.default_rng(1)
    return [
        numpy_helper.from_array(
            rng.standard_normal(shape, dtype=np.float32) * np.float32(0.01), f"w{i}"
        )
        for i in range(DEPTH)
    ]
