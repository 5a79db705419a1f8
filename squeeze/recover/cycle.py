"""Distorted pruning: weights perturbed between rounds of pruning and training."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from squeeze.recover.module import TRAINED


def distort(model: ir.Model, seed: int = 0) -> None:
    """Add `rand(shape) · (1 − var(W))` to every weight matrix and kernel, in place.

    From the thesis, §2.2.2: weights that share one feature part ways, and the next
    round of training can leave some of them unused. Biases stay.
    """
    rng = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is None
            or not tensor.dtype.is_floating_point()
            or len(tensor.shape) < 2
        ):
            continue
        if any(u.idx in TRAINED.get(u.node.op_type, ()) for u in value.uses()):
            weight = np.asarray(tensor.numpy()).astype(np.float64)
            noise = rng.random(weight.shape) * (1 - weight.var())
            changed = (weight + noise).astype(tensor.dtype.numpy())
            value.const_value = ir.Tensor(changed, name=name)
