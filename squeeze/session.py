"""onnxruntime sessions, made in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

Session: TypeAlias = Any  # onnxruntime.InferenceSession, which has no types


def create(
    model: Path | bytes,
    *,
    threads: int = 0,
    optimize: bool = True,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
) -> Session:
    """A quiet session. `threads` 0 is onnxruntime's own choice.

    `optimize` False leaves out graph optimisation and weight prepacking: quicker to
    make and smaller, for runs that are not timed.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    given = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(given, options, providers=list(providers))
