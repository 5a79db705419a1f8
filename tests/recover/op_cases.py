"""One or more small cases for every op of the interpreter's table.

A case is an op, its inputs and its attributes. Floating inputs are checked against
onnxruntime and, where the op has a gradient, against finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """Inputs in order (None for an omitted one); `fixed` are constants of the graph."""

    op: str
    inputs: tuple[Array | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()
    opset: int = 18
    outputs: int = 1
    gradient: bool = True
    note: str = ""
    tolerance: float = 1e-5

    @property
    def id(self) -> str:
        return "-".join(p for p in (self.op, str(self.opset), self.note) if p)

    def model(self) -> onnx.ModelProto:
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(self.inputs)]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, name="node", **self.attributes)
        values, weights = [], []
        for i, x in enumerate(self.inputs):
            if x is None:
                continue
            if i in self.fixed:
                weights.append(onnx.numpy_helper.from_array(x, names[i]))
            else:
                kind = helper.np_dtype_to_tensor_dtype(x.dtype)
                values.append(helper.make_tensor_value_info(names[i], kind, x.shape))
        infos = [onnx.ValueInfoProto(name=n) for n in outputs]
        graph = helper.make_graph([node], "case", values, infos, weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)]
        )
        model.ir_version = 10
        return onnx.shape_inference.infer_shapes(model)


_rng = np.random.default_rng(0)


def x(*shape: int, low: float = -2.0, high: float = 2.0) -> Array:
    """Uniform values, no two of which are closer than finite differences can tell."""
    count = int(np.prod(shape))
    steps = _rng.permutation(count) + _rng.uniform(0.2, 0.8, count)
    return (low + (high - low) * steps / count).reshape(shape).astype(np.float32)


def i(*values: int) -> Array:
    return np.array(values, np.int64)


def _unary() -> list[Case]:
    smooth = "Cos Cosh Erf Exp Identity Neg Sin Sinh Tanh Sigmoid Softplus Softsign"
    kinked = "Abs Relu LeakyRelu Elu Selu Celu HardSigmoid HardSwish Shrink"
    cases = [Case(op, (x(2, 9),)) for op in f"{smooth} {kinked}".split()]
    cases += [Case(op, (x(2, 9, low=0.2),)) for op in ("Log", "Sqrt", "Reciprocal")]
    cases += [Case(op, (x(9, low=-0.9, high=0.9),)) for op in ("Acos", "Asin")]
    cases += [Case(op, (x(9),)) for op in ("Atan", "Mish", "ThresholdedRelu")]
    cases += [Case("Tan", (x(9, low=-1, high=1),))]
    cases += [
        Case(op, (x(9),), gradient=False) for op in ("Ceil", "Floor", "Round", "Sign")
    ]
    cases += [
        Case("Gelu", (x(9),), opset=20),
        Case("Gelu", (x(9),), {"approximate": "tanh"}, opset=20, note="tanh"),
        Case("Clip", (x(9), np.float32(-1), np.float32(1)), fixed=(1, 2)),
        Case("Clip", (x(9), None, np.float32(1)), fixed=(2,), note="above"),
        Case("Clip", (x(9),), {"min": -0.5, "max": 0.5}, opset=9),
        Case("PRelu", (x(2, 3, 4), x(3, 1, low=0.1, high=0.4))),
        Case("Softmax", (x(2, 3, 4),), {"axis": 1}),
        Case("Softmax", (x(2, 3, 4),), {"axis": 1}, opset=11),
        Case("LogSoftmax", (x(2, 3, 4),), {"axis": 2}),
        Case("Dropout", (x(4),)),
        Case("Cast", (x(4),), {"to": 10}, gradient=False, note="half", tolerance=2e-3),
        Case("Cast", (x(4),), {"to": 7}, gradient=False, note="int"),
        Case("Cast", (i(1, 2),), {"to": 1}, gradient=False, note="float"),
        Case("CastLike", (i(1, 2), x(1)), gradient=False),
        Case("IsNaN", (x(4),), gradient=False),
        Case("Not", (np.array([True, False]),), gradient=False),
    ]
    return cases


def _binary() -> list[Case]:
    pairs = [Case(op, (x(2, 3), x(3, low=0.5))) for op in ("Add", "Div", "Mul", "Sub")]
    pairs += [
        Case(op, (x(2, 3), x(2, 3), x(3))) for op in ("Max", "Mean", "Min", "Sum")
    ]
    compare = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    pairs += [Case(op, (x(4), x(4)), gradient=False) for op in compare]
    truth = (np.array([True, True, False]), np.array([True, False, False]))
    pairs += [Case(op, truth, gradient=False) for op in ("And", "Or", "Xor")]
    pairs += [
        Case("Div", (i(7, -7), i(2, 2)), gradient=False, note="int"),
        Case("Mod", (i(7, -7), i(3, 3)), gradient=False),
        Case("Mod", (x(5), x(5, low=1)), {"fmod": 1}, gradient=False, note="fmod"),
        Case("Pow", (x(2, 3, low=0.3), x(3))),
        Case("Where", (np.array([True, False, True]), x(3), x(3))),
    ]
    return pairs


def _reductions() -> list[Case]:
    ops = "L1 L2 Max Mean Min Prod Sum SumSquare LogSumExp".split()
    cases = [Case(f"Reduce{o}", (x(2, 3, 4), i(1)), fixed=(1,)) for o in ops]
    cases += [
        Case("ReduceLogSum", (x(2, 3, low=0.5), i(1)), fixed=(1,)),
        Case("ReduceMean", (x(2, 3, 4),), {"axes": [1, 2], "keepdims": 0}, opset=13),
        Case("ReduceSum", (x(2, 3),), note="all"),
        Case("ReduceSum", (x(2, 3),), {"noop_with_empty_axes": 1}, note="none"),
        Case("ArgMax", (x(2, 5),), {"axis": 1}, gradient=False),
        Case("ArgMin", (x(2, 5),), {"axis": 0, "keepdims": 0}, gradient=False),
        Case("CumSum", (x(2, 5), np.int64(1)), fixed=(1,)),
        Case(
            "CumSum",
            (x(2, 5), np.int64(0)),
            {"exclusive": 1, "reverse": 1},
            fixed=(1,),
            note="reverse",
        ),
        Case("TopK", (x(2, 5), i(3)), fixed=(1,), outputs=2),
    ]
    return cases


def _layers() -> list[Case]:
    image = x(1, 2, 5, 6)
    uneven = {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1], "strides": [2, 1]}
    ceil = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}
    conv, deconv = (image, x(4, 2, 3, 2), x(4)), (x(1, 2, 3, 3), x(2, 3, 3, 2), x(3))
    return [
        Case("Conv", conv, uneven, note="uneven"),
        Case(
            "Conv", conv[:2], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, note="same"
        ),
        Case("Conv", conv[:2], {"auto_pad": "VALID"}, note="valid"),
        Case("Conv", (image, x(4, 1, 3, 2)), {"group": 2, "dilations": [2, 1]}),
        Case("Conv", (x(1, 2, 7), x(3, 2, 3), x(3)), {"pads": [1, 1]}, note="1d"),
        Case("Conv", (x(1, 2, 3, 4, 3), x(3, 2, 2, 2, 2)), note="3d"),
        Case("ConvTranspose", deconv, {"strides": [2, 2], "pads": [1, 0, 1, 0]}),
        Case("ConvTranspose", deconv, {"pads": [1, 0, 0, 1]}, note="uneven"),
        Case(
            "ConvTranspose",
            deconv,
            {"strides": [2, 2], "output_padding": [1, 1]},
            note="output-padding",
        ),
        Case(
            "ConvTranspose",
            deconv[:2],
            {"strides": [2, 2], "output_shape": [6, 6]},
            note="output-shape",
        ),
        Case(
            "ConvTranspose",
            deconv[:2],
            {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
            note="same",
        ),
        Case("Gemm", (x(2, 3), x(4, 3), x(4)), {"transB": 1}),
        Case(
            "Gemm",
            (x(3, 2), x(3, 4), x(2, 1)),
            {"transA": 1, "alpha": 0.5, "beta": 2.0},
        ),
        Case("Gemm", (x(2, 3), x(3, 4)), note="no-c"),
        Case("MatMul", (x(2, 3, 4), x(4, 2))),
        Case("Einsum", (x(2, 3), x(3, 4)), {"equation": "ij, jk -> ik"}),
        Case("MaxPool", (image,), uneven, note="uneven"),
        Case("MaxPool", (image,), {**ceil, "ceil_mode": 1}, note="ceil"),
        Case("MaxPool", (image,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Case("AveragePool", (image,), uneven, note="uneven"),
        Case("AveragePool", (image,), {**ceil, "count_include_pad": 1}, note="include"),
        Case("AveragePool", (image,), {**ceil, "ceil_mode": 1}, note="ceil"),
        Case("AveragePool", (image,), {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}),
        Case("GlobalAveragePool", (image,)),
        Case("GlobalMaxPool", (image,)),
        Case(
            "BatchNormalization",
            (x(2, 3, 4), x(3), x(3), x(3), x(3, low=0.5)),
            {"epsilon": 1e-3},
            fixed=(3, 4),
        ),
        Case("InstanceNormalization", (x(2, 3, 4), x(3), x(3))),
        Case("LayerNormalization", (x(2, 3, 4), x(4), x(4))),
        Case("LayerNormalization", (x(2, 3, 4), x(3, 4)), {"axis": 1}, note="axis"),
        Case(
            "LayerNormalization", (x(2, 3, 4), x(4), x(3, 4)), {"axis": 1}, note="wide"
        ),
        Case(
            "GroupNormalization", (x(2, 4, 3), x(2), x(2)), {"num_groups": 2}, opset=18
        ),
        Case(
            "GroupNormalization", (x(2, 4, 3), x(4), x(4)), {"num_groups": 2}, opset=21
        ),
        Case("RMSNormalization", (x(2, 3, 4), x(4)), opset=23),
        Case("LRN", (x(1, 5, 2, 3),), {"size": 3, "alpha": 0.1, "beta": 0.6}),
        Case("LpNormalization", (x(2, 5),), {"axis": 1, "p": 2}),
    ]


def _layout() -> list[Case]:
    indices = np.array([[0, 1], [1, -1]], np.int64)
    return [
        Case("Concat", (x(2, 3), x(2, 1)), {"axis": 1}),
        Case("ConstantOfShape", (i(2, 3),), gradient=False),
        Case("DepthToSpace", (x(1, 8, 2, 3),), {"blocksize": 2}),
        Case(
            "DepthToSpace",
            (x(1, 8, 2, 3),),
            {"blocksize": 2, "mode": "CRD"},
            note="CRD",
        ),
        Case("SpaceToDepth", (x(1, 2, 4, 6),), {"blocksize": 2}),
        Case("Expand", (x(3, 1), i(2, 1, 4)), fixed=(1,)),
        Case("Flatten", (x(2, 3, 4),), {"axis": 2}),
        Case("Gather", (x(3, 4), indices), {"axis": 1}),
        Case("Gather", (x(3, 4), np.array(-1)), note="one"),
        Case("GatherElements", (x(2, 3), indices), {"axis": 1}),
        Case("GatherND", (x(2, 3, 2), indices)),
        Case("ScatterND", (x(4, 2), i(1, 3)[:, None], x(2, 2))),
        Case(
            "ScatterND",
            (x(4), i(1, 1)[:, None], x(2)),
            {"reduction": "add"},
            note="add",
        ),
        Case("Pad", (x(2, 3), i(1, 0, 0, 2), np.float32(0.5)), fixed=(1, 2)),
        Case("Pad", (x(2, 3), i(0, 1, 0, -1)), fixed=(1,), note="cut"),
        Case(
            "Pad", (x(2, 4), i(0, 2, 1, 3)), {"mode": "edge"}, fixed=(1,), note="edge"
        ),
        Case(
            "Pad",
            (x(3, 4), i(2, 2, 1, 3)),
            {"mode": "reflect"},
            fixed=(1,),
            note="reflect",
        ),
        Case("Pad", (x(3, 4), i(1, 2), None, i(1)), fixed=(1, 3), note="axes"),
        Case("Pad", (x(2, 3),), {"pads": [1, 0, 0, 2], "value": 0.5}, opset=9),
        Case("Range", tuple(np.array(n) for n in (1, 9, 3)), gradient=False),
        Case("Reshape", (x(2, 3, 4), i(0, -1)), fixed=(1,)),
        Case("Shape", (x(2, 3, 4),), {"start": 1}, gradient=False),
        Case("Size", (x(2, 3),), gradient=False),
        Case(
            "Slice", (x(4, 5), i(1, -1), i(9, 0), i(0, 1), i(2, -2)), fixed=(1, 2, 3, 4)
        ),
        Case(
            "Slice",
            (x(4), i(-1), i(-(2**63)), i(0), i(-1)),
            fixed=(1, 2, 3, 4),
            note="all",
        ),
        Case("Slice", (x(4, 5),), {"starts": [1], "ends": [-1], "axes": [1]}, opset=9),
        Case("Split", (x(2, 5), i(2, 3)), {"axis": 1}, fixed=(1,), outputs=2),
        Case("Split", (x(5, 2),), {"num_outputs": 2}, outputs=2, note="even"),
        Case("Squeeze", (x(1, 3, 1), i(0)), fixed=(1,)),
        Case("Squeeze", (x(1, 3, 1),), note="all"),
        Case("Unsqueeze", (x(3), i(0, -1)), fixed=(1,)),
        Case("Unsqueeze", (x(3),), {"axes": [1]}, opset=11),
        Case("Tile", (x(2, 3), i(2, 1)), fixed=(1,)),
        Case("Transpose", (x(2, 3, 4),), {"perm": [2, 0, 1]}),
        Case("Trilu", (x(3, 4),), {"upper": 0}),
        Case("Trilu", (x(3, 4), np.int64(1)), fixed=(1,), note="k"),
        *_resizes(),
    ]


def _resizes() -> list[Case]:
    image, grow = x(1, 2, 3, 4), np.float32([1, 1, 2, 1.5])
    cases = [
        Case(
            "Resize",
            (image, None, grow),
            {"mode": mode, "coordinate_transformation_mode": where},
            fixed=(2,),
            note=f"{mode}-{where}",
        )
        for mode in ("nearest", "linear", "cubic")
        for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ]
    cases += [
        Case(
            "Resize", (image, None, None, i(1, 2, 5, 2)), {"mode": "linear"}, fixed=(3,)
        ),
        Case("Resize", (image, grow), {"mode": "nearest"}, fixed=(1,), opset=10),
        Case("Upsample", (image, np.float32([1, 1, 2, 2])), fixed=(1,), opset=9),
    ]
    cases += [
        Case(
            "Resize",
            (image, None, np.float32([1, 1, 1.5, 0.5])),
            {"mode": "nearest", "nearest_mode": how},
            fixed=(2,),
            note=how,
        )
        for how in ("round_prefer_ceil", "floor", "ceil")
    ]
    return cases


CASES = [*_unary(), *_binary(), *_reductions(), *_layers(), *_layout()]
