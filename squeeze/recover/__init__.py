"""Recovering accuracy by training: distillation from the original model.

Needs PyTorch, which is imported when one of these names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from squeeze.errors import UsageError

if TYPE_CHECKING:
    from squeeze.recover.check import verify as verify
    from squeeze.recover.files import Files as Files
    from squeeze.recover.files import distill_files as distill_files
    from squeeze.recover.module import GraphModule as GraphModule
    from squeeze.recover.module import to_torch as to_torch
    from squeeze.recover.module import write_back as write_back
    from squeeze.recover.options import Epoch as Epoch
    from squeeze.recover.options import Options as Options
    from squeeze.recover.run import Distilled as Distilled
    from squeeze.recover.run import distill as distill

_PUBLIC = {
    "Distilled": "squeeze.recover.run",
    "Epoch": "squeeze.recover.options",
    "Files": "squeeze.recover.files",
    "GraphModule": "squeeze.recover.module",
    "Options": "squeeze.recover.options",
    "distill": "squeeze.recover.run",
    "distill_files": "squeeze.recover.files",
    "to_torch": "squeeze.recover.module",
    "verify": "squeeze.recover.check",
    "write_back": "squeeze.recover.module",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'squeeze.recover' has no attribute {name!r}")
    from importlib import import_module

    require_torch()
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)


def require_torch() -> None:
    """Raise UsageError with what to install where PyTorch is missing."""
    try:
        import torch  # noqa: F401  takes seconds to import
    except ImportError as error:
        raise UsageError(
            "training needs PyTorch: pip install 'squeeze[train]'"
        ) from error
