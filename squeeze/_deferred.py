"""sympy, imported when a symbolic size is computed with, not at every start.

onnx_ir imports sympy (over a second, most of a command's start) for arithmetic on
symbolic dimensions, which squeeze does not use: its shapes are static. While onnx_ir
is imported, a stand-in takes sympy's place; whatever then asks the stand-in for
something gets the real one. Where onnx_ir should need more of sympy at import than
functions to call later, the import is done again with the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

HOST, DEFERRED = "onnx_ir", "sympy"


class StandIn(ModuleType):
    """Answers for a module: functions that import it when called, then the module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(DEFERRED) is self:
            return _later(name)
        return getattr(import_module(DEFERRED), name)


def _later(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.modules.get(DEFERRED), StandIn):
            raise ImportError(f"{DEFERRED}.{name} was called while {HOST} was imported")
        return getattr(import_module(DEFERRED), name)(*args, **kwargs)

    return call


class HostLoader(Loader):
    """Loads onnx_ir with the stand-in in place, and without it if that fails."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[DEFERRED] = StandIn(DEFERRED)
        try:
            self.inner.exec_module(module)
        except (ImportError, AttributeError, TypeError):
            sys.modules.pop(DEFERRED)
            for name in [n for n in sys.modules if n.startswith(f"{HOST}.")]:
                del sys.modules[name]
            self.inner.exec_module(module)
        finally:
            if isinstance(sys.modules.get(DEFERRED), StandIn):
                del sys.modules[DEFERRED]


class HostFinder(MetaPathFinder):
    """Finds onnx_ir, once, as Python would, with the loader above."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != HOST:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None and DEFERRED not in sys.modules:
            spec.loader = HostLoader(spec.loader)
        return spec


def install() -> None:
    """Defer sympy, unless onnx_ir or sympy is there already."""
    if HOST not in sys.modules and DEFERRED not in sys.modules:
        sys.meta_path.insert(0, HostFinder())
