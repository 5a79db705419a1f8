"""What turns gradients into updates: Muon for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Parameters = Iterable[torch.nn.Parameter]
RATE = 2.0  # Muon's learning rate over AdamW's
MOMENTUM = 0.95
LARGEST = 2048  # the smaller side of a matrix: orthogonalising takes its square
# of the polynomial x → ax + bx³ + cx⁵ that takes singular values to about 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Optimizer:
    """Both, behind the part of PyTorch's interface that training uses.

    Layers that mix channels are Muon's. Depthwise kernels, scales and biases are
    AdamW's, and so are matrices that are large on both sides. All are, where channels
    are to die (`sparse`): an orthogonal update keeps every one of them alive. Decay is
    for weights alone: biases, scales and offsets keep their size.
    """

    def __init__(
        self, parameters: Parameters, rate: float, decay: float, sparse: bool = False
    ) -> None:
        chosen = list(parameters)
        matrices = [p for p in chosen if is_matrix(p) and not sparse]
        rest = [p for p in chosen if not is_matrix(p) or sparse]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self._scales: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            self._scales.append((Muon(matrices, decay), RATE))
        if groups:
            self._scales.append((torch.optim.AdamW(groups), 1.0))
        self.parameters = chosen
        self.set_rate(rate)

    def set_rate(self, rate: float) -> None:
        for part, scale in self._scales:
            for group in part.param_groups:
                group["lr"] = scale * rate

    def zero_grad(self) -> None:
        for part, _ in self._scales:
            part.zero_grad()

    def step(self) -> None:
        for part, _ in self._scales:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part, _ in self._scales]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        for (part, _), own in zip(self._scales, state, strict=True):
            part.load_state_dict(own)


def is_matrix(parameter: Tensor) -> bool:
    if parameter.dim() < 2 or parameter.shape[1] == 1:
        return False
    return min(len(parameter), parameter[0].numel()) <= LARGEST


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, kernels as matrices of rows per output.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". It
    needs about half the epochs of AdamW (effnet in the CIFAR-10 sample: held-out loss
    0.182 after 8 epochs against 0.195 after 15).
    """

    def __init__(self, parameters: Parameters, decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(self._update(p), alpha=group["lr"])

    def _update(self, p: Tensor) -> Tensor:
        """Nesterov momentum, orthogonal, scaled to one size for every shape."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].mul_(MOMENTUM).add_(p.grad)
        update = (p.grad + MOMENTUM * momentum).flatten(1)
        rows, columns = update.shape
        scale = max(1.0, rows / columns) ** 0.5
        return orthogonal(update).mul_(scale).reshape(p.shape)


def orthogonal(x: Tensor) -> Tensor:
    """About U Vᵀ of x = U S Vᵀ (m, n), by Newton-Schulz iterations; 0 stays 0."""
    a, b, c = COEFFICIENTS
    wide = len(x) <= x.shape[1]
    y = x if wide else x.T
    y = y.div(y.norm().clamp(min=1e-12))
    for _ in range(ITERATIONS):
        gram = y @ y.T
        y = a * y + gram.mul(b).addmm(gram, gram, alpha=c) @ y
    return y if wide else y.T
