"""Graphs of one layer or a few, in any float type, and what they compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

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
