"""Graphs of one layer or a few, in any float type, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from squeeze.rewrite.factorize import factorize
from squeeze.rewrite.run import Options

ELEMENTS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def conv_model(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    strides: list[int],
    pads: list[int],
    dilations: list[int],
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """One convolution with bias and ReLU."""
    rng = np.random.default_rng(sum(weight) + sum(pads))
    scale = 1 / np.sqrt(np.prod(weight[1:]))
    arrays = {
        "w": rng.normal(size=weight) * scale,
        "b": rng.normal(size=weight[0]),
    }
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["y"],
            "conv",
            strides=strides,
            pads=pads,
            dilations=dilations,
        ),
        helper.make_node("Relu", ["y"], ["z"], "relu"),
    ]
    return model_of(nodes, arrays, {"x": shape}, "z", dtype)


def model_of(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    inputs: dict[str, tuple[int, ...]],
    output: str,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph with a dynamic batch; `inputs` are shapes behind it."""
    element = ELEMENTS[dtype]
    weights = [numpy_helper.from_array(a.astype(element), k) for k, a in arrays.items()]
    values = [
        helper.make_tensor_value_info(k, dtype, ["n", *s]) for k, s in inputs.items()
    ]
    out = helper.make_tensor_value_info(output, dtype, None)
    graph = helper.make_graph(nodes, "g", values, [out], weights)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def outputs(model: onnx.ModelProto | ir.Model, **feeds: np.ndarray) -> np.ndarray:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return ort.InferenceSession(proto.SerializeToString()).run(None, feeds)[0]


def relative(made: np.ndarray, wanted: np.ndarray) -> float:
    made, wanted = made.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(made - wanted) / max(np.linalg.norm(wanted), 1e-30))


# -- a layer with known singular values ---------------------------------------------


def known_spectrum(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A dense (size, size) in float32, size a power of 2; its squared singular values.

    H·diag(s)·H with the orthogonal Hadamard matrix H depends on the XOR of row and
    column alone, so one transform of the spectrum makes it; signs and an order of its
    own for each side hide that.
    """
    rng = np.random.default_rng(0)
    spectrum = 0.995 ** np.arange(size)
    first = spectrum * rng.choice([-1, 1], size)
    step = 1
    while step < size:  # fast Walsh-Hadamard transform
        pairs = first.reshape(-1, 2, step)
        first = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
        first, step = first.reshape(-1), 2 * step
    index = np.arange(size)
    weight = (first / size)[index[:, None] ^ index]
    weight = weight[rng.permutation(size)][:, rng.permutation(size)]
    signs = rng.choice([-1, 1], (2, size))
    weight = weight * signs[0][:, None] * signs[1]
    return weight.astype(np.float32), spectrum**2


@dataclass(frozen=True)
class Factored:
    """What `factorize --energy` made of a layer."""

    rank: int
    relative: float


def factor_error(weight: np.ndarray, energy: float) -> Factored:
    """Rank and relative squared error of a Gemm's factors."""
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "fc")
    proto = model_of([node], {"w": weight}, {"x": (len(weight),)}, "y")
    options = Options(bench=False, simplify=False)
    result = factorize(ir.from_proto(proto), energy=energy, round_to=1, options=options)
    (change,) = result.changes
    factors = [v.const_value.numpy() for v in result.model.graph.initializers.values()]
    first, last = sorted(factors, key=lambda a: a.shape[0])
    left = weight - (last.astype(np.float64) @ first).T
    size = np.square(weight, dtype=np.float64).sum()
    return Factored(change.details["rank"], float(np.square(left).sum() / size))
