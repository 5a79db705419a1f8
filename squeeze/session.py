"""onnxruntime sessions, made and run in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from squeeze import model as models
from squeeze.errors import SqueezeError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

Session: TypeAlias = Any  # onnxruntime.InferenceSession, which has no types

CPU = "CPUExecutionProvider"
PROFILE_PREFIX = "squeeze_profile"
OUTSIDE = "session.optimized_model_external_initializers_file_name"


def create(
    model: Path | bytes,
    *,
    threads: int = 0,
    optimize: bool = True,
    spin: bool = True,
    providers: tuple[str, ...] = (CPU,),
    profile_to: Path | None = None,
    optimised_to: Path | None = None,
) -> Session:
    """A quiet session. `threads` 0 is onnxruntime's own choice.

    `optimize` False leaves out graph optimisation and weight prepacking: quicker to
    make and smaller, for runs that are not timed. `spin` False lets its threads sleep
    between runs, for sessions that take turns with other work. `profile_to` is a
    folder for onnxruntime's own profile, `optimised_to` a file for the graph that it
    runs.
    Raises whatever onnxruntime raises; see `open_model`.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to / PROFILE_PREFIX)
    if optimised_to is not None:
        options.optimized_model_filepath = str(optimised_to)
        options.add_session_config_entry(OUTSIDE, f"{optimised_to.name}.data")
    given = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(given, options, providers=list(providers))


def of(model: ir.Model, *, optimize: bool = True, spin: bool = True) -> Session:
    """`create` for a model in memory; through a file where protobuf is too small."""
    import onnx_ir as ir

    if models.proto_bytes(model) < models.INLINE_LIMIT:
        proto = ir.to_proto(model).SerializeToString()
        return create(proto, optimize=optimize, spin=spin)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.data")
        return create(path, optimize=optimize, spin=spin)


def provider(name: str) -> str:
    """onnxruntime's full name of a provider: `cuda` is CUDAExecutionProvider.

    Raises UsageError where this onnxruntime lacks it.
    """
    import onnxruntime as ort

    known: list[str] = list(ort.get_available_providers())
    names = {short(p).lower(): p for p in known}
    found = names.get(short(name.lower()))
    if found is None:
        raise UsageError(
            f"this onnxruntime has no provider {name!r}, only {', '.join(names)}; "
            "install the onnxruntime package that has it"
        )
    return found


def short(provider_name: str) -> str:
    """A provider's name without what all of them end in: CUDA."""
    ending = "executionprovider"
    return (
        provider_name[: -len(ending)]
        if provider_name.lower().endswith(ending)
        else provider_name
    )


def open_model(
    path: Path,
    *,
    threads: int = 0,
    provider_name: str = CPU,
    optimize: bool = True,
    profile_to: Path | None = None,
    optimised_to: Path | None = None,
) -> Session:
    """`create` for a user's model: SqueezeError where it can't be loaded.

    onnxruntime goes back to the CPU in silence where a provider fails to start; that
    is an error here, as its figures would be another device's.
    """
    try:
        made = create(
            path,
            threads=threads,
            optimize=optimize,
            providers=(provider_name,),
            profile_to=profile_to,
            optimised_to=optimised_to,
        )
    except Exception as error:  # onnxruntime raises many kinds
        where = "" if provider_name == CPU else f" on {short(provider_name)}"
        remedy = "" if provider_name == CPU else "; leave --provider out for the CPU"
        raise SqueezeError(
            f"{path}: onnxruntime can't load it{where}: {first_line(error)}{remedy}"
        ) from error
    if made.get_providers()[0] != provider_name:
        raise SqueezeError(
            f"{path}: {provider_name} failed to start and onnxruntime fell back to the "
            "CPU; check its driver and libraries, or leave --provider out"
        )
    return made


def profiled(runner: Session) -> list[dict[str, Any]]:
    """Events of a session that was made with `profile_to`; it profiles no more."""
    file = Path(runner.end_profiling())
    events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return events


def run(runner: Session, feeds: Mapping[str, np.ndarray], path: Path) -> Sequence[Any]:
    """Outputs of one run; SqueezeError with onnxruntime's reason where it fails."""
    try:
        outputs: Sequence[Any] = runner.run(None, dict(feeds))
    except Exception as error:  # onnxruntime raises many kinds
        raise failed(error, path, runner) from error
    return outputs


def failed(error: BaseException, path: Path, runner: Session) -> SqueezeError:
    """What to tell a user whose model fails at run time."""
    by = short(runner.get_providers()[0])
    remedy = (
        "pass --data with inputs that it accepts"
        if by == "CPU"
        else "leave --provider out to run it on the CPU"
    )
    return SqueezeError(
        f"{path}: fails at run time ({by}): {first_line(error)}; {remedy}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
