"""squeeze: make trained ONNX models smaller and faster, and say what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from squeeze.budget.gate import check as check
    from squeeze.cost.layers import Profile as Profile
    from squeeze.cost.layers import profile as profile
    from squeeze.errors import SqueezeError as SqueezeError
    from squeeze.model import load as load
    from squeeze.model import save as save
    from squeeze.rewrite.convert import convert as convert
    from squeeze.rewrite.plan import Result as Result
    from squeeze.rewrite.run import Options as Options

# public name → module that holds it; imported when first used
_PUBLIC = {
    "check": "squeeze.budget.gate",
    "Profile": "squeeze.cost.layers",
    "SqueezeError": "squeeze.errors",
    "Options": "squeeze.rewrite.run",
    "Result": "squeeze.rewrite.plan",
    "convert": "squeeze.rewrite.convert",
    "load": "squeeze.model",
    "profile": "squeeze.cost.layers",
    "save": "squeeze.model",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'squeeze' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
