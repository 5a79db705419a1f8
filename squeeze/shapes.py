"""Static shapes of every value, for one choice of the input shapes.

The model is not changed: `infer` works on a light copy with its inputs fixed. Where
onnx leaves a dimension open, integer shape arithmetic is folded and inference runs
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
import onnx_ir as ir

from squeeze.errors import SqueezeError, UsageError
from squeeze.model import node_name, without_big_weights

InputShapes = Mapping[str, tuple[int, ...]]
Array = np.ndarray
FOLD_ELEMENTS = 4096  # larger results are data, not shape arithmetic
FOLD_WORK = 2**24  # most elements that folding one node may touch
PROPAGATED = 2**24  # most elements of a vector that onnx may follow as data
MAX_ROUNDS = 16
# control flow, weights, and ops on data whose results may be of any size
NEVER_FOLDED = frozenset(
    """Col2Im Conv ConvTranspose DequantizeLinear Einsum If Loop MaxUnpool Resize Scan
    Upsample""".split()
)


@dataclass(frozen=True)
class Shapes:
    """Shapes and element types by value name, and the folded shape arithmetic."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, ir.DataType]
    inputs: dict[str, tuple[int, ...]]
    constants: dict[str, Array] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The value's shape, or None where it is unknown."""
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(int(n) for n in value.const_value.shape.numpy())
        return self.shapes.get(value.name or "")

    def need(self, value: ir.Value | None, node: ir.Node) -> tuple[int, ...]:
        """The value's shape; SqueezeError names what to pass where it is unknown."""
        shape = self.of(value)
        if shape is None:
            name = value.name if value is not None else "an omitted input"
            raise SqueezeError(
                f"{node.op_type} {node_name(node)!r}: the shape of {name!r} is unknown;"
                f" pass --input-shape {example_shape(self.inputs)}"
            )
        return shape

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        if value.const_value is not None:
            return value.const_value.dtype
        return self.types.get(value.name or "", value.dtype)


def example_shape(inputs: Mapping[str, tuple[int, ...]]) -> str:
    name, shape = next(iter(inputs.items()), ("input", (1, 3, 224, 224)))
    return f"{name}:{','.join(str(n) for n in shape)}"


# -- the inputs ---------------------------------------------------------------------


def input_shapes(
    model: ir.Model, given: InputShapes | None = None, batch: int = 1
) -> dict[str, tuple[int, ...]]:
    """Every input's static shape: as given, else the model's own with batch `batch`.

    A dynamic first dimension is the batch. Any other dynamic one must be given.
    """
    given = dict(given or {})
    inputs = {v.name or "": v for v in model.graph.inputs}
    if "" in given:
        if len(inputs) != 1:
            names = ", ".join(inputs)
            raise UsageError(
                f"--input-shape: name one of the inputs {names}, as NAME:1,…"
            )
        given[next(iter(inputs))] = given.pop("")
    for name in given:
        if name not in inputs:
            raise UsageError(
                f"--input-shape: no input {name!r}; the inputs are {', '.join(inputs)}"
            )
    return {
        name: _static_shape(name, value, given.get(name), batch)
        for name, value in inputs.items()
        if value.type is None or isinstance(value.type, ir.TensorType)
    }


def _static_shape(
    name: str, value: ir.Value, given: tuple[int, ...] | None, batch: int
) -> tuple[int, ...]:
    own = value.shape
    if given is not None:
        if own is not None and len(own) != len(given):
            raise UsageError(f"--input-shape: {name!r} has {len(own)} dimensions")
        for mine, new in zip(own or (), given, strict=False):
            if isinstance(mine, int) and mine > 0 and mine != new:
                raise UsageError(
                    f"--input-shape: the model fixes {name!r} to {_text(own)}; "
                    f"{','.join(map(str, given))} doesn't fit"
                )
        return given
    if own is None:
        raise SqueezeError(
            f"input {name!r} has no shape; pass --input-shape {name}:1,3,224,224"
        )
    dims: list[int] = []
    for axis, dim in enumerate(own):
        if isinstance(dim, int) and dim > 0:
            dims.append(dim)
        elif axis == 0:
            dims.append(batch)
        else:
            example = ",".join(
                str(d) if isinstance(d, int) and d > 0 else ("1" if i == 0 else "224")
                for i, d in enumerate(own)
            )
            raise SqueezeError(
                f"input {name!r} has a dynamic size {_text(own)}; "
                f"pass --input-shape {name}:{example}"
            )
    return tuple(dims)


def _text(shape: ir.Shape | None) -> str:
    dims = shape or ()
    return (
        "["
        + ", ".join(str(d) if isinstance(d, int) else d.value or "?" for d in dims)
        + "]"
    )


def is_dynamic(model: ir.Model) -> bool:
    """Whether any input dimension behind the first is symbolic."""
    return any(
        not isinstance(d, int)
        for v in model.graph.inputs
        if v.shape is not None
        for d in list(v.shape)[1:]
    )


# -- inference ----------------------------------------------------------------------


def infer(model: ir.Model, given: InputShapes | None = None, batch: int = 1) -> Shapes:
    """Shapes of all values with the inputs fixed; unknown ones are left out."""
    inputs = input_shapes(model, given, batch)
    proto = _light_proto(model, inputs)
    result = _infer_proto(proto, propagate=False)
    propagate = bool(_missing(model, result.shapes)) and _bounded(model, result.shapes)
    if propagate:
        result = _infer_proto(proto, propagate)
    for _ in range(MAX_ROUNDS):
        missing = _missing(model, result.shapes)
        if not missing:
            break
        folded = fold(model, result)
        fresh = {k: v for k, v in folded.items() if k not in result.constants}
        if not fresh:
            break
        _replace_by_constants(proto, fresh)
        known = result.constants | folded
        result = _infer_proto(proto, propagate)
        result.constants.update(known)
        result.shapes.update({k: v.shape for k, v in known.items()})
    result.inputs.update(inputs)
    return result


def _light_proto(model: ir.Model, inputs: InputShapes) -> onnx.ModelProto:
    with without_big_weights(model) as light:
        proto = ir.to_proto(light)
    custom = _custom_outputs(model)
    kept = [v for v in proto.graph.value_info if v.name in custom]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    for info in proto.graph.input:
        if info.name in inputs:
            _set_shape(info, inputs[info.name])
    for info in proto.graph.output:
        if info.name not in custom and info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    return proto


def _custom_outputs(model: ir.Model) -> set[str]:
    """Outputs of ops that onnx can't infer: what the file says is all there is."""
    names: set[str] = set()
    for node in model.graph:
        if node.domain not in ("", "ai.onnx", "ai.onnx.ml"):
            for value in node.outputs:
                dims = list(value.shape) if value.shape is not None else []
                if all(isinstance(d, int) for d in dims):
                    names.add(value.name or "")
    return names


def _set_shape(info: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    tensor = info.type.tensor_type
    tensor.ClearField("shape")
    for size in shape:
        tensor.shape.dim.add().dim_value = size
    if not shape:
        tensor.shape.SetInParent()


def _bounded(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether onnx may follow data: it lists every element of a vector, however long.

    Vectors whose length is not known yet are as long as what they are made of; shape
    arithmetic starts with few elements, and only Concat adds up.
    """
    lengths: dict[ir.Value, int] = {}
    for node in model.graph:
        parts = [
            lengths.get(v, _length(v, shapes)) for v in node.inputs if v is not None
        ]
        grown = sum(parts) if node.op_type == "Concat" else max(parts, default=0)
        for value in node.outputs:
            known = shapes.get(value.name or "")
            lengths[value] = grown if known is None else _vector(known)
    ends = [_length(v, shapes) for v in model.graph.inputs]
    return max([*lengths.values(), *ends], default=0) <= PROPAGATED


def _length(value: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> int:
    tensor = value.const_value
    if tensor is not None:
        return _vector(tuple(int(n) for n in tensor.shape.numpy()))
    return _vector(shapes.get(value.name or "", ()))


def _vector(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else 1


def _infer_proto(proto: onnx.ModelProto, propagate: bool) -> Shapes:
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=propagate)
    except Exception as error:  # InferenceError and its relatives
        first = str(error).strip().splitlines()[0]
        raise SqueezeError(f"shapes do not fit together: {first}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, ir.DataType] = {}
    graph = inferred.graph
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if tensor.elem_type:
            types[info.name] = ir.DataType(tensor.elem_type)
        dims = tensor.shape.dim
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            shape = tuple(d.dim_value for d in dims)
            if min(shape, default=0) >= 0:  # past 64 bits sizes wrap around
                shapes[info.name] = shape
    return Shapes(shapes, types, {})


def _missing(model: ir.Model, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        v.name
        for node in model.graph
        for v in node.outputs
        if v.name and v.name not in shapes
    ]


def _replace_by_constants(proto: onnx.ModelProto, values: dict[str, Array]) -> None:
    nodes = [n for n in proto.graph.node if not any(o in values for o in n.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for name, array in values.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))


# -- folding ------------------------------------------------------------------------


def fold(model: ir.Model, shapes: Shapes) -> dict[str, Array]:
    """Values that depend on shapes and small constants alone, by name."""
    known: dict[str, Array] = dict(shapes.constants)
    results: dict[str, Array] = dict(shapes.constants)
    versions = {"": model.opset_imports.get("", 17)}
    for node in model.graph:
        if node.domain or node.op_type in NEVER_FOLDED or len(node.outputs) != 1:
            continue
        out = node.outputs[0].name or ""
        if out in known:
            continue
        array = _fold_node(node, known, shapes, versions)
        if array is not None and array.size <= FOLD_ELEMENTS:
            known[out] = results[out] = array
    return results


def _fold_node(
    node: ir.Node, known: dict[str, Array], shapes: Shapes, versions: dict[str, int]
) -> Array | None:
    if node.op_type in ("Shape", "Size"):
        shape = shapes.of(node.inputs[0])
        if shape is None:
            return None
        if node.op_type == "Size":
            return np.array(prod(shape), np.int64) if prod(shape) < 2**63 else None
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(shape))
        return np.array(shape[start:end], np.int64)
    if not node.inputs or node.op_type.startswith("Random"):
        return None
    feeds: dict[str, Array] = {}
    for value in node.inputs:
        if value is not None:
            array = _constant(value, known)
            if array is None:
                return None
            feeds[value.name or ""] = array
    if _work(node, list(feeds.values()), shapes) > FOLD_WORK:
        return None
    return _evaluate(node, feeds, versions)


def _constant(value: ir.Value, known: dict[str, Array]) -> Array | None:
    """A value that is known; small weights join those, read when first asked for."""
    name, tensor = value.name or "", value.const_value
    if name in known or tensor is None or not value.is_initializer():
        return known.get(name)
    if tensor.size <= FOLD_ELEMENTS:
        known[name] = tensor.numpy()
    return known.get(name)


def _work(node: ir.Node, feeds: list[Array], shapes: Shapes) -> int:
    """At least as many elements as evaluating the node makes; huge where unsure."""
    out = shapes.of(node.outputs[0])
    if out is not None:
        return prod(out)
    grows = GROWTH.get(node.op_type)
    if grows is None:
        return prod(max(f.size, 1) for f in feeds)  # broadcasting, at the most
    try:
        return grows(feeds)
    except (IndexError, OverflowError, TypeError, ValueError):
        return FOLD_WORK + 1


def _product(array: Array) -> int:
    return prod(abs(int(n)) for n in array.reshape(-1))


def _range(feeds: list[Array]) -> int:
    start, limit, delta = (float(f.reshape(-1)[0]) for f in feeds)
    return int(abs(limit - start) / abs(delta)) if delta else FOLD_WORK + 1


# ops whose result is larger than what they read: elements, from their inputs
GROWTH: dict[str, Callable[[list[Array]], int]] = {
    "CenterCropPad": lambda f: _product(f[1]),
    "ConstantOfShape": lambda f: _product(f[0]),
    "Expand": lambda f: f[0].size * _product(f[1]),
    "OneHot": lambda f: f[0].size * _product(f[1]),
    "Pad": lambda f: f[0].size * prod(1 + abs(int(n)) for n in f[1].reshape(-1)),
    "Range": _range,
    "Tile": lambda f: f[0].size * _product(f[1]),
}


def _concat(node: ir.Node, parts: list[Array]) -> Array:
    return np.concatenate(parts, node.attributes.get_int("axis", 0))


def _gather(node: ir.Node, parts: list[Array]) -> Array:
    return np.asarray(np.take(parts[0], parts[1], node.attributes.get_int("axis", 0)))


def _unsqueeze(node: ir.Node, parts: list[Array]) -> Array:
    axes = parts[1] if len(parts) > 1 else node.attributes.get_ints("axes", ())
    return np.expand_dims(parts[0], tuple(int(n) for n in axes))


# what most of shape arithmetic is made of, without onnx's reference: tenths of seconds
QUICK: dict[str, Callable[[ir.Node, list[Array]], Array]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
}


def _evaluate(
    node: ir.Node, feeds: dict[str, Array], versions: dict[str, int]
) -> Array | None:
    try:
        if node.op_type in QUICK:
            parts = [feeds[v.name or ""] for v in node.inputs if v is not None]
            return QUICK[node.op_type](node, parts)
        from onnx.reference import ReferenceEvaluator  # slow to import, rarely needed

        proto = ir.serde.serialize_node(node)
        evaluator = ReferenceEvaluator(proto, opsets=versions)
        return np.asarray(next(iter(evaluator.run(None, feeds))))
    except Exception:  # an op that the reference lacks stays unfolded
        return None
