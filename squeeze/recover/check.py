"""The module against onnxruntime, before the first step of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from squeeze import session
from squeeze.errors import SqueezeError
from squeeze.model import INLINE_LIMIT, proto_bytes
from squeeze.recover.module import GraphModule

TOLERANCE = 1e-4  # of the largest magnitude, in float32
# what 16 bits of mantissa or fewer leave, where onnxruntime computes in them
COARSE = {ir.DataType.FLOAT16: 1e-2, ir.DataType.BFLOAT16: 6e-2}


@dataclass(frozen=True)
class Difference:
    """The largest relative difference over the outputs, and what was allowed."""

    error: float
    tolerance: float


def verify(
    model: ir.Model, module: GraphModule, inputs: Mapping[str, np.ndarray]
) -> Difference:
    """Compare outputs with onnxruntime's.

    Raises SqueezeError that names the first node whose own result differs.
    """
    allowed = tolerance(model)
    if proto_bytes(model) > INLINE_LIMIT:
        return Difference(float("nan"), allowed)  # onnxruntime needs it as a file
    names = list(module.output_names)
    expected = _expected(model, names, inputs)
    worst = max(_errors(module, names, inputs, expected), default=0.0)
    if worst <= allowed:
        return Difference(worst, allowed)
    raise SqueezeError(_blame(model, module, inputs, worst, allowed))


def tolerance(model: ir.Model) -> float:
    """By the coarsest float among the weights."""
    found = {
        v.const_value.dtype for v in model.graph.initializers.values() if v.const_value
    }
    return max((COARSE.get(t, TOLERANCE) for t in found), default=TOLERANCE)


def relative(own: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude; infinite for other shapes."""
    ours = own.detach().cpu().numpy() if isinstance(own, Tensor) else own
    if ours.shape != expected.shape:
        return float("inf")
    a, b = ours.astype(np.float64), expected.astype(np.float64)
    if not a.size:
        return 0.0
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = np.where(same, 0.0, np.abs(a - b))
    scale = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
    worst = float(np.max(difference))
    return worst / max(scale, 1e-12) if worst else 0.0


def _errors(
    module: GraphModule,
    names: list[str],
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
) -> list[float]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    mode = module.training
    module.train(False)
    with torch.no_grad():
        found = module.run(
            {k: as_input(v).to(device) for k, v in inputs.items()}, names
        )
    module.train(mode)
    return [relative(found[n], expected[n]) for n in names]


def as_input(array: np.ndarray) -> Tensor:
    """16-bit floats enter as 32-bit ones."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind in "fV" and array.dtype != np.float64:
        array = array.astype(np.float32)
    return torch.from_numpy(array)


def _expected(
    model: ir.Model, names: list[str], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.add().name = name
    try:
        runner = session.create(proto.SerializeToString(), optimize=False)
        arrays = runner.run(None, dict(inputs))
    except Exception as error:  # onnxruntime raises many kinds
        reason = str(error).strip().splitlines()[0]
        raise SqueezeError(
            f"the model does not run in onnxruntime: {reason}"
        ) from error
    return dict(zip(names, arrays, strict=True))


def _blame(
    model: ir.Model,
    module: GraphModule,
    inputs: Mapping[str, np.ndarray],
    worst: float,
    allowed: float,
) -> str:
    """Feed each node what onnxruntime fed it: the first wrong result is its own."""
    names = [n for step in module.steps for n in step.outputs if n]
    expected = _expected(model, names, inputs)
    given = {k: as_input(v) for k, v in expected.items()}
    feeds = {k: as_input(v) for k, v in inputs.items()}
    with torch.no_grad():
        found = module.run(feeds, names, given)
    for step in module.steps:
        error = max(
            (relative(found[n], expected[n]) for n in step.outputs if n), default=0
        )
        if error > allowed:
            return (
                f"{step.op.kind} {step.name!r} differs from onnxruntime by "
                f"{error:.2g} of its largest value; not trained"
            )
    return (
        f"the outputs differ from onnxruntime's by {worst:.2g}, summed over all nodes"
    )
