"""A single node that PyTorch has no function for, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from squeeze import session
from squeeze.errors import SqueezeError
from squeeze.model import node_name
from squeeze.recover.ops import Op
from squeeze.shapes import Shapes


class Island:
    """Called like a function of the table; what it returns carries no gradient.

    `fed` are its inputs by name, "" for constants: they are in its own model. The
    session is made when first used: only then the types of the inputs are certain.
    """

    def __init__(
        self,
        node: ir.Node,
        model: ir.Model,
        shapes: Shapes | None,
        fed: Sequence[str],
    ) -> None:
        self._node, self._model, self._shapes = node, model, shapes
        self._session: Any = None
        self._fed = [i for i, name in enumerate(fed) if name]

    def __call__(self, op: Op, *inputs: Tensor | None) -> list[Tensor]:
        feeds: dict[str, np.ndarray] = {}
        device = torch.device("cpu")
        for i in self._fed:
            value, tensor = self._node.inputs[i], inputs[i]
            if value is not None and tensor is not None:
                device = tensor.device
                array = (
                    tensor.detach().float() if tensor.is_floating_point() else tensor
                )
                feeds[value.name or ""] = (
                    array.cpu().numpy().astype(self._type(value, array))
                )
        if self._session is None:
            self._session = self._make(feeds)
        found = self._session.run(None, feeds)
        return [self._back(array).to(device) for array in found]

    def _type(self, value: ir.Value, tensor: Tensor) -> np.dtype[Any]:
        known = self._shapes.dtype(value) if self._shapes is not None else value.dtype
        return known.numpy() if known is not None else tensor.cpu().numpy().dtype

    @staticmethod
    def _back(array: np.ndarray) -> Tensor:
        floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        return torch.from_numpy(array.astype(np.float32) if floating else array)

    def _make(self, feeds: dict[str, np.ndarray]) -> Any:
        node = self._node
        values: dict[str, ir.Value] = {}
        for value in node.inputs:
            if value is not None and value.name not in values:
                values[value.name or ""] = self._copy(value, feeds)
        inner = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else values[v.name or ""] for v in node.inputs],
            list(node.attributes.values()),
            outputs=[ir.Value(name=v.name) for v in node.outputs if v.name],
            name=node.name,
        )
        graph = ir.Graph(
            [values[name] for name in feeds],
            list(inner.outputs),
            nodes=[inner],
            initializers=[v for n, v in values.items() if n not in feeds],
            opset_imports=dict(self._model.opset_imports),
            name="island",
        )
        proto = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version))
        try:
            return session.create(proto.SerializeToString(), optimize=False)
        except Exception as error:  # onnxruntime raises many kinds
            raise SqueezeError(
                f"{node.op_type} {node_name(node)!r}: neither PyTorch nor onnxruntime "
                f"can run it: {str(error).strip().splitlines()[0]}"
            ) from error

    @staticmethod
    def _copy(value: ir.Value, feeds: dict[str, np.ndarray]) -> ir.Value:
        if value.name not in feeds:
            return ir.Value(name=value.name, const_value=value.const_value)
        array = feeds[value.name]
        kind = ir.DataType.from_numpy(array.dtype)
        rank = ir.Shape([None] * array.ndim)
        return ir.Value(name=value.name, type=ir.TensorType(kind), shape=rank)
