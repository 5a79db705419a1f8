"""BatchNormalization inserted behind convolutions while training, folded at the end.

The graph never sees it: the normalisation lives in the module, starts as the identity
on the data's own statistics, and ends in the convolution's weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from squeeze.recover.module import GraphModule, Step

_KINDS = ("Batch", "Group", "Instance", "Layer")
_NORMALISED = frozenset(f"{kind}Normalization" for kind in _KINDS)


class Normalization(nn.modules.batchnorm._BatchNorm):
    """Over the second axis, whatever the rank."""

    def _check_input_dim(self, input: Tensor) -> None: ...


def places(module: GraphModule, names: Iterable[str] | None = None) -> list[Step]:
    """Convolutions that a normalisation can be put behind, and folded into.

    They have an own bias and a weight nobody else uses, and neither a normalisation
    nor an output of the graph behind them. `names` narrows it to those weights.
    """
    uses: dict[str, list[Step]] = {}
    for step in module.steps:
        for name in step.inputs:
            uses.setdefault(name, []).append(step)
    wanted = None if names is None else set(names)

    def fits(step: Step) -> bool:
        if step.op.kind != "Conv" or len(step.inputs) < 3:
            return False
        weight, bias = step.inputs[1:3]
        own = all(n in module._parameters and len(uses[n]) == 1 for n in (weight, bias))
        out = step.outputs[0]
        behind = {s.op.kind for s in uses.get(out, ())}
        free = out not in module.output_names and not behind & _NORMALISED
        return own and free and bool(behind) and (wanted is None or weight in wanted)

    return [step for step in module.steps if fits(step)]


def insert(
    module: GraphModule, steps: Iterable[Step], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Put a normalisation behind each step that leaves the outputs as they are.

    Its statistics are those of `batches`; scale and bias undo them.
    """
    steps = list(steps)
    if not steps:
        return
    moments = _moments(module, steps, batches)
    for step in steps:
        name = step.outputs[0]
        mean, var = moments[name]
        norm = Normalization(len(mean))
        with torch.no_grad():
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(var)  # type: ignore[union-attr]
            norm.weight.copy_((var + norm.eps).sqrt())
            norm.bias.copy_(mean)
        norm.train(module.training)
        module.norm_at[name] = len(module.norms)
        module.norms.append(norm.to(mean.device))


def _moments(
    module: GraphModule, steps: Iterable[Step], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance per channel of each step's output, over all batches."""
    names = [step.outputs[0] for step in steps]
    totals: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for inputs in batches:
            for name, value in module.run(inputs, names).items():
                x = value.double().transpose(0, 1).flatten(1)
                parts = [x.sum(1), x.square().sum(1), torch.tensor(float(x.shape[1]))]
                old = totals.get(name)
                totals[name] = (
                    parts
                    if old is None
                    else [a + b for a, b in zip(old, parts, strict=True)]
                )
    result = {}
    for name, (total, squares, count) in totals.items():
        mean = total / count
        var = (squares / count - mean.square()).clamp(min=0)
        result[name] = (mean.float(), var.float())
    return result


def folded(module: GraphModule) -> dict[str, Tensor]:
    """Weights and biases of the normalised convolutions, with it folded in.

    `W·γ/√(v+ε)` and `(b−μ)·γ/√(v+ε)+β`, in float64.
    """
    values: dict[str, Tensor] = {}
    for name, index in module.norm_at.items():
        norm = module.norms[index]
        assert isinstance(norm, Normalization)
        weight, bias = (
            module._weight(n).detach().double()
            for n in module.producer[name].inputs[1:3]
        )
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (
            norm.weight.detach().double()
            / (norm.running_var.double() + norm.eps).sqrt()
        )
        inputs = module.producer[name].inputs
        shape = (-1, *[1] * (weight.dim() - 1))
        values[inputs[1]] = weight * scale.reshape(shape)
        values[inputs[2]] = (bias - norm.running_mean) * scale + norm.bias.detach()
    return values
