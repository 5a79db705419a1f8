"""The width multiplier: thin every layer (MobileNets §3.3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze.cost import Totals
from squeeze.errors import UsageError
from squeeze.rewrite import criteria
from squeeze.rewrite.channels import changes as views
from squeeze.rewrite.channels import choose, prepare, trace
from squeeze.rewrite.channels.trace import Array, Trace
from squeeze.rewrite.plan import Outcome, Result, selector
from squeeze.rewrite.refit import Network
from squeeze.rewrite.run import Options, run
from squeeze.rewrite.samples import Removing, Samples
from squeeze.shapes import Shapes

Keep = Literal["best", "first"]


@dataclass(frozen=True)
class Width:
    """How to thin. `multiplier` in (0, 1]; floor(multiplier · channels) stay.

    `keep` the best channels (by data, else by weights) or the first; `fresh` draws all
    weights anew, to train from scratch.
    """

    multiplier: Fraction
    keep: Keep = "best"
    fresh: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    round_to: int = 1
    refit: bool = True


def width(
    model: ir.Model | str | os.PathLike[str],
    plan: Width,
    samples: Samples | None = None,
    options: Options | None = None,
) -> Result:
    """Thin every layer to floor(multiplier · channels); inputs and outputs are kept.

    Raises UsageError for a multiplier outside (0, 1].
    """
    if not 0 < plan.multiplier <= 1:
        value = float(plan.multiplier)
        raise UsageError(f"--multiplier {value:g}: must be above 0 and at most 1")
    options = options or Options()
    if not isinstance(model, ir.Model):
        model = models.load(Path(model))
    state = _Thinning(samples or Samples(), options.seed, plan=plan)
    return run(model, state.transform, options, state.fidelity)


def table(
    model: ir.Model | str | os.PathLike[str],
    plans: Sequence[Width],
    options: Options | None = None,
) -> list[tuple[Width, Totals]]:
    """Costs at several multipliers; nothing is fitted or written."""
    options = options or Options()
    if not isinstance(model, ir.Model):
        model = models.load(Path(model))
    trial = Options(
        dry_run=True,
        bench=False,
        simplify=options.simplify,
        seed=options.seed,
        input_shapes=options.input_shapes,
    )
    return [(plan, width(model, plan, None, trial).after) for plan in plans]


@dataclass(kw_only=True)
class _Thinning(Removing):
    """One thinning: what `run` calls back into."""

    plan: Width

    def transform(self, model: ir.Model, shapes: Shapes) -> Outcome:
        plan = self.plan
        self.open(model, shapes)
        prepared = prepare(model, shapes)
        original = Network(prepared.model.clone(), prepared.shapes)
        found = trace(prepared)
        reason = selector(plan.only, plan.skip)
        families = choose.selected(found, reason)
        quota = choose.share(plan.multiplier, plan.round_to)
        keep = choose.thin(found, families, self._scores(found), quota)
        after, changes, masks = views.apply(found, keep, "width", reason)
        if plan.fresh:
            _draw(model, self.seed)
            self.notes.append("weights are fresh: train the result")
        elif not keep.all():
            self.repair(original, Network(model, after), masks, plan.refit)
        return Outcome(model, self.told(changes), self.notes)

    def _scores(self, found: Trace) -> Array:
        if self.plan.keep == "first" or self.plan.fresh:
            return np.zeros(len(found.root))
        by = "energy" if self.data is not None else "l2"
        return criteria.TABLE[by].score(self.context(found))


def _draw(model: ir.Model, seed: int) -> None:
    """Fresh weights, in place: He's for layers, 1 and 0 for normalisation."""
    rng = np.random.default_rng(seed)
    done: set[ir.Value] = set()
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value in done:
                continue
            tensor = value.const_value
            if tensor.dtype.is_floating_point() and tensor.size > 1:
                array = _fresh(node, index, tensor.numpy(), rng)
                if array is not None:
                    done.add(value)
                    value.const_value = ir.Tensor(array, name=value.name)


_ONES = {
    ("BatchNormalization", 1),
    ("BatchNormalization", 4),
    ("LayerNormalization", 1),
}
_ZEROS = {
    ("BatchNormalization", 2),
    ("BatchNormalization", 3),
    ("LayerNormalization", 2),
}


def _fresh(
    node: ir.Node, index: int, old: Array, rng: np.random.Generator
) -> Array | None:
    """New values for one weight; None for constants that are no weights."""
    if (node.op_type, index) in _ONES:
        return np.ones_like(old)
    if (node.op_type, index) in _ZEROS or (
        node.op_type in ("Conv", "ConvTranspose", "Gemm") and index == 2
    ):
        return np.zeros_like(old)
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or old.ndim < 2:
        return None
    rows = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    fan_in = old.shape[-2] if rows else old[0].size
    drawn: Array = rng.standard_normal(old.shape) * np.sqrt(2 / fan_in)
    return drawn.astype(old.dtype)
