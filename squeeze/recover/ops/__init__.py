"""The table of ops: one function per ONNX op, over PyTorch tensors.

`find` gives a node's function, or the reason why there is none: then onnxruntime runs
the node, and no gradient passes through it.
"""

from __future__ import annotations

from collections.abc import Callable

from squeeze.recover.ops import elementwise, layers, layout
from squeeze.recover.ops._op import Function, Op

__all__ = ["TABLE", "Function", "Op", "find"]

TABLE: dict[str, Function] = {**elementwise.TABLE, **layers.TABLE, **layout.TABLE}

# forms of an op that its function doesn't cover: true where it does not
_NOT_COVERED: dict[str, Callable[[Op], bool]] = {
    "ArgMax": lambda op: bool(op.get("select_last_index", 0)),
    "ArgMin": lambda op: bool(op.get("select_last_index", 0)),
    "AveragePool": lambda op: any(d != 1 for d in op.get("dilations", [])),
    "BatchNormalization": lambda op: bool(op.outputs > 1 or op.get("training_mode", 0)),
    "Cast": lambda op: op.get("to") not in elementwise.CASTS,
    "GatherND": lambda op: bool(op.get("batch_dims", 0)),
    "LayerNormalization": lambda op: op.outputs > 1,
    "MaxPool": lambda op: op.outputs > 1,
    "Resize": lambda op: bool(
        op.get("antialias", 0)
        or op.get("exclude_outside", 0)
        or op.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        or op.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ),
    "ScatterND": lambda op: op.get("reduction", "none") not in ("none", "add"),
}


def find(op: Op, domain: str) -> Function | None:
    """The function of a node, None where the table has none for it."""
    if domain not in ("", "ai.onnx") or op.kind not in TABLE:
        return None
    uncovered = _NOT_COVERED.get(op.kind)
    return None if uncovered is not None and uncovered(op) else TABLE[op.kind]
