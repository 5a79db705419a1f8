"""Training state on disk: whole at every moment, and refused by another run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from squeeze.calibrate.data import Data
from squeeze.errors import SqueezeError, UsageError
from squeeze.model import without_big_weights
from squeeze.recover.options import Options

FORMAT = 1
PROBED = 32  # samples that tell data apart
_FREE = ("device", "minutes")  # options that a resumed run may change


def identity(
    student: ir.Model,
    teacher: ir.Model,
    data: tuple[Data, Data],
    options: Options,
) -> str:
    """A JSON text that differs where another run would not be the same training.

    `data` is what is trained on and what is judged by.
    """
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
    return json.dumps(
        {
            "format": FORMAT,
            "student": digest(student),
            "teacher": digest(teacher),
            "data": [fingerprint(part) for part in data],
            "options": kept,
        },
        sort_keys=True,
    )


def fingerprint(data: Data) -> str:
    """Name, number of samples, and a hash of some of them as the networks get them."""
    found = hashlib.sha256()
    some = np.unique(np.linspace(0, len(data) - 1, PROBED).astype(int))
    for batch in data.take(some):
        for array in (*batch.inputs.values(), batch.labels):
            if array is not None:
                found.update(np.ascontiguousarray(array).tobytes())
    return f"{data.name}, {len(data)} samples, {found.hexdigest()}"


def digest(model: ir.Model) -> str:
    """Hash of structure and weights."""
    found = hashlib.sha256()
    with without_big_weights(model) as light:
        found.update(ir.to_proto(light).SerializeToString(deterministic=True))
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            found.update(name.encode())
            found.update(np.ascontiguousarray(value.const_value.numpy()).tobytes())
    return found.hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the file in one step. Raises OSError, with the old file still whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, expected: str) -> dict[str, Any]:
    """The state in a checkpoint of the same training.

    Raises UsageError if there is none, SqueezeError if it belongs to another run.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no checkpoint to resume from; run without --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found, wanted = json.loads(state["identity"]), json.loads(expected)
    except Exception as error:  # torch raises many kinds
        raise SqueezeError(
            f"{path}: not a checkpoint; delete it to start anew"
        ) from error
    if found != wanted:
        raise SqueezeError(
            f"{path}: from another run ({_change(found, wanted)}); "
            "delete it to start anew"
        )
    return state


def _change(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    for key, value in wanted.items():
        if found.get(key) == value:
            continue
        if key != "options":
            return f"another {key}"
        names = [k for k in value if found[key].get(k) != value[k]]
        return ", ".join(f"{k} was {found[key].get(k)}, is {value[k]}" for k in names)
    return "another format"
