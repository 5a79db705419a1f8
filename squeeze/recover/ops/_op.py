"""What the functions of the table are given besides their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

Function: TypeAlias = Callable[..., Tensor | Sequence[Tensor]]


@dataclass
class Op:
    """One node as its function sees it: attributes, opset, how many outputs.

    `training` follows the module's mode, for BatchNormalization, unless `frozen`.
    """

    kind: str
    opset: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    training: bool = False
    frozen: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        value = self.attributes.get(name)
        return default if value is None else value


def ints(value: Tensor | None) -> list[int]:
    """The integers of a shape, axes or repeats input."""
    return [] if value is None else [int(n) for n in value.reshape(-1).tolist()]


def axes_of(op: Op, given: Tensor | None) -> list[int] | None:
    """`axes`, an attribute once and an input today; None where there are none."""
    if given is not None:
        return ints(given)
    found = op.get("axes")
    return None if found is None else [int(a) for a in found]


def together(*values: Tensor) -> tuple[Tensor, ...]:
    """On one device: small integers live on the CPU, whatever the data is on."""
    devices = {v.device for v in values}
    if len(devices) == 1:
        return values
    target = next(d for d in devices if d.type != "cpu")
    return tuple(v.to(target) for v in values)
