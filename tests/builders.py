"""Models that several tests build: small, real graphs with seeded weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SAMPLES = Path(__file__).parent.parent / "sample_models"


class Net:
    """Nodes in a chain, or wired by the values that each call returns."""

    def __init__(
        self, shape: Sequence[int | str], seed: int = 0, name: str = "x"
    ) -> None:
        self.input = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.value = name

    def weight(self, array: np.ndarray, name: str | None = None) -> str:
        name = name or f"w{len(self.weights)}"
        array = array if array.dtype == np.int64 else array.astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(
        self, op: str, *inputs: str, name: str | None = None, **attributes: Any
    ) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        self.value = f"{name}_out"
        given = inputs or (self.value_before,)
        self.nodes.append(
            helper.make_node(op, given, [self.value], name=name, **attributes)
        )
        return self.value

    @property
    def value_before(self) -> str:
        return self.nodes[-1].output[0] if self.nodes else self.input.name

    def conv(
        self,
        cin: int,
        cout: int,
        kernel: Sequence[int] = (3, 3),
        source: str | None = None,
        bias: bool = True,
        group: int = 1,
        **attributes: Any,
    ) -> str:
        fan_in = cin // group * int(np.prod(kernel))
        shape = (cout, cin // group, *kernel)
        array = self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        inputs = [source or self.value_before, self.weight(array)]
        if bias:
            inputs.append(self.weight(self.rng.standard_normal(cout) * 0.1))
        if "pads" not in attributes and "auto_pad" not in attributes:
            attributes["pads"] = [k // 2 for k in kernel] * 2
        return self.node(
            "Conv", *inputs, kernel_shape=list(kernel), group=group, **attributes
        )

    def batch_norm(self, channels: int) -> str:
        arrays = [self.rng.uniform(0.5, 1.5, channels) for _ in range(4)]
        names = [self.weight(a) for a in arrays]
        return self.node("BatchNormalization", self.value_before, *names)

    def gemm(self, rows: int, columns: int) -> str:
        array = self.rng.standard_normal((columns, rows)) / np.sqrt(rows)
        names = [self.weight(array), self.weight(np.zeros(columns))]
        return self.node("Gemm", self.value_before, *names, transB=1)

    def model(self, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
        output = helper.make_tensor_value_info(
            self.value_before, TensorProto.FLOAT, None
        )
        graph = helper.make_graph(
            self.nodes, "net", [self.input], [output], self.weights
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        made.ir_version = ir_version
        made = onnx.shape_inference.infer_shapes(made, data_prop=True)
        del made.graph.value_info[:]
        onnx.checker.check_model(made, full_check=True)
        return made

    def save(self, path: Path, **options: Any) -> Path:
        onnx.save(self.model(**options), path)
        return path


def cifar_baseline() -> Net:
    """The baseline of EffNet, Tables 1 and 2."""
    net = Net(["N", 3, 32, 32])
    for cin, cout in ((3, 64), (64, 128), (128, 256)):
        net.conv(cin, cout)
        net.node("Relu")
        net.node("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.node("Flatten")
    net.gemm(4096, 10)
    return net


MOBILENET = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
MOBILENET += ((512, 1),) * 5 + ((1024, 2), (1024, 1))


def standard_mobilenet() -> Net:
    """MobileNets, Table 1, with every block a standard 3×3 convolution."""
    net = Net(["N", 3, 224, 224])
    net.conv(3, 32, bias=False, strides=[2, 2])
    net.node("Relu")
    cin = 32
    for cout, stride in MOBILENET:
        net.conv(cin, cout, bias=False, strides=[stride, stride])
        net.node("Relu")
        cin = cout
    net.node("GlobalAveragePool")
    net.node("Flatten")
    net.gemm(1024, 1000)
    return net


def residual_chain(nodes: int, width: int = 8) -> Net:
    """At least so many nodes: pairs of 1×1 convolutions with a skip around each."""
    net = Net(["N", width, 8, 8])
    value = net.conv(width, width, (1, 1))
    while len(net.nodes) < nodes:
        inner = net.node("Relu", net.conv(width, width, (1, 1), source=value))
        value = net.node("Add", value, net.conv(width, width, (1, 1), source=inner))
    net.conv(width, width, (1, 1), source=value)
    return net


def run(model: Path | onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """The outputs in onnxruntime; one positional-like input may be named `x`."""
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    if list(feeds) == ["x"]:
        feeds = {session.get_inputs()[0].name: feeds["x"]}
    return session.run(None, feeds)


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
