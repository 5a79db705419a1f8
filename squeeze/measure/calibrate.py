"""This machine's constants, measured through onnxruntime, as a device file.

Each constant is the throughput of small graphs that one resource bounds: dense and
depthwise convolutions and matrix products of common sizes, additions that fit the
caches, additions that don't, and a chain of tiny nodes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from squeeze import session

REPEATS = 7
DEPTH = 8  # nodes per graph: what one run takes besides is spread over them
SIZES = [2**n for n in range(16, 27)]  # bytes of a tensor, 64 KB to 64 MB
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
PRODUCTS = ((50, 768), (196, 384), (49, 768))  # rows and columns of FC layers


def device_file(
    threads: int = 0,
    progress: Callable[[float], None] | None = None,
    repeats: int = REPEATS,
) -> str:
    """Text of a device file for this machine with `threads` threads per operator."""
    probes = len(DENSE) + sum(map(len, KINDS.values())) + len(PRODUCTS) + len(SIZES) + 1
    clock = _Clock(threads, progress, probes, repeats)
    constants = {"layer_overhead": clock.seconds(_chain((1, 8))) / DEPTH}
    constants["matrix"] = _convolving(clock, DENSE)
    kinds = {kind: _convolving(clock, convs) for kind, convs in KINDS.items()}
    kinds["FC"] = geometric_mean(
        2 * rows * width**2 * DEPTH / clock.seconds(_products(rows, width))
        for rows, width in PRODUCTS
    )
    return _text(threads, {**constants, **_memory(clock)}, kinds)


def _convolving(clock: _Clock, convs: Sequence[Convolution]) -> float:
    return geometric_mean(
        conv.flops * DEPTH / clock.seconds(_convolutions(conv)) for conv in convs
    )


def _memory(clock: _Clock) -> dict[str, float]:
    """Bandwidth of what fits no cache, and the size from which nothing does.

    That is where an addition's bandwidth falls below the geometric mean of its best
    and its worst.
    """
    moved = {
        size: 3 * size * DEPTH / clock.seconds(_chain((1, size // 4))) for size in SIZES
    }
    outside, best = moved[SIZES[-1]], max(moved.values())
    inside = max(size for size in SIZES if moved[size] >= (best * outside) ** 0.5)
    return {
        "internal_memory": 3 * inside,
        "bandwidth": outside,
        "elementwise": best / 3 / 4,
    }


def _text(threads: int, constants: dict[str, float], kinds: dict[str, float]) -> str:
    import onnxruntime as ort

    machine = platform.processor() or platform.machine()
    lines = [
        f'description = "{machine}, {threads or "default"} threads, 32-bit floats"',
        'source = """',
        f"Measured by squeeze bench --calibrate-device on {time.strftime('%Y-%m-%d')},",
        f'onnxruntime {ort.__version__}."""',
        "",
        *(f"{key} = {value:.4g}" for key, value in constants.items()),
        'overlap = "full"',
        "",
        "[kinds]",
        *(f'"{kind}" = {value:.4g}' for kind, value in kinds.items()),
    ]
    return "\n".join(lines) + "\n"


class _Clock:
    """Times graphs, and reports how many of them are done."""

    def __init__(
        self,
        threads: int,
        progress: Callable[[float], None] | None,
        count: int,
        repeats: int,
    ) -> None:
        self.threads, self.progress = threads, progress
        self.count, self.repeats, self.done = count, repeats, 0

    def seconds(self, made: Made) -> float:
        """Fastest of several medians: what the machine can do, not its neighbours."""
        model, shape = made
        runner = session.create(model.SerializeToString(), threads=self.threads)
        feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        runner.run(None, feeds)
        times = []
        for _ in range(self.repeats):
            runs = [_once(runner, feeds) for _ in range(3)]
            while len(runs) < 50 and sum(runs) < 0.02:
                runs.append(_once(runner, feeds))
            times.append(median(runs))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done / self.count)
        return min(times)


def _once(runner: session.Session, feeds: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    runner.run(None, feeds)
    return time.perf_counter() - start


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
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), shape


def _convolutions(conv: Convolution) -> Made:
    """DEPTH equal convolutions in a chain."""
    shape = (conv.channels, conv.channels // conv.group, conv.kernel, conv.kernel)
    values = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    weight = numpy_helper.from_array(values * np.float32(0.01), "w")
    pads = [conv.kernel // 2] * 4
    nodes = [
        helper.make_node(
            "Conv",
            [f"y{i}" if i else "x", "w"],
            [f"y{i + 1}"],
            pads=pads,
            group=conv.group,
        )
        for i in range(DEPTH)
    ]
    return _model(
        nodes, [weight], (1, conv.channels, conv.size, conv.size), f"y{DEPTH}"
    )


def _products(rows: int, width: int) -> Made:
    """DEPTH equal matrix products in a chain."""
    values = np.random.default_rng(1).standard_normal((width, width), dtype=np.float32)
    weight = numpy_helper.from_array(values * np.float32(0.01), "w")
    nodes = [
        helper.make_node("MatMul", [f"y{i}" if i else "x", "w"], [f"y{i + 1}"])
        for i in range(DEPTH)
    ]
    return _model(nodes, [weight], (1, rows, width), f"y{DEPTH}")


def _chain(shape: tuple[int, ...]) -> Made:
    """DEPTH additions of the input: two reads and a write each."""
    nodes = [
        helper.make_node("Add", [f"y{i}" if i else "x", "x"], [f"y{i + 1}"])
        for i in range(DEPTH)
    ]
    return _model(nodes, [], shape, f"y{DEPTH}")
