"""Distillation from file to file, with its checkpoint beside the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from squeeze import model as models
from squeeze import session
from squeeze import shapes as shaping
from squeeze.calibrate.data import Data, Images, fixed_batch, open_data
from squeeze.errors import SqueezeError, UsageError
from squeeze.recover.feed import feeds_for, read
from squeeze.recover.options import Options, Progress
from squeeze.recover.run import Distilled, distill
from squeeze.shapes import InputShapes


@dataclass(frozen=True)
class Files:
    """What is read and written. `output` None is `<student>.distilled.onnx`."""

    student: Path
    teacher: Path
    data: str
    output: Path | None = None
    evaluation: str | None = None
    input_shapes: InputShapes = field(default_factory=dict)
    images: Images = field(default_factory=Images)
    command: str = ""

    @property
    def writes(self) -> Path:
        own = self.student.with_name(f"{self.student.stem}.distilled.onnx")
        return self.output or own

    @property
    def checkpoint(self) -> Path:
        return self.writes.with_name(f"{self.writes.name}.checkpoint")


def distill_files(
    files: Files,
    options: Options,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Distilled:
    """Train, check, write; the checkpoint goes once the output is in its place.

    Raises UsageError and SqueezeError before training wherever that is possible.
    """
    models.check_output(files.writes)
    if resume and not files.checkpoint.is_file():
        raise UsageError(
            f"{files.checkpoint}: no checkpoint to resume from; run without --resume"
        )
    if not resume and files.checkpoint.is_file():
        raise UsageError(
            f"{files.checkpoint}: left by an interrupted run; pass --resume to go on, "
            "or delete it to start anew"
        )
    student, teacher = models.load(files.student), models.load(files.teacher)
    if files.writes.exists() and files.writes.samefile(files.teacher):
        raise UsageError(f"{files.writes}: is the teacher; choose another -o")
    data = _open(files, teacher, files.data)
    evaluation = _open(files, teacher, files.evaluation) if files.evaluation else None
    done = distill(
        student,
        teacher,
        data,
        options,
        evaluation=evaluation,
        checkpoint=files.checkpoint,
        resume=resume,
        progress=progress,
    )
    done.model.metadata_props["squeeze.version"] = version("squeeze")
    if files.command:
        done.model.metadata_props["squeeze.command"] = files.command
    try:
        models.save(done.model, files.writes, _verifier(done.model, data))
    except SqueezeError as error:
        if files.checkpoint.is_file():
            raise SqueezeError(
                f"{error}; nothing is lost: run again with --resume"
            ) from error
        raise
    files.checkpoint.unlink(missing_ok=True)
    return done


def _open(files: Files, teacher: ir.Model, spec: str) -> Data:
    shapes = shaping.infer(teacher, files.input_shapes)
    return open_data(spec, teacher, shapes, files.images)


def _verifier(model: ir.Model, data: Data) -> Callable[[Path], None]:
    """The written file passes the checker and gives finite outputs."""

    def verify(written: Path) -> None:
        try:
            onnx.checker.check_model(str(written), full_check=True)
            sample = read(data.take(np.arange(fixed_batch(model) or 1)))
            feeds = feeds_for(model, sample.inputs)
            outputs = session.create(written, optimize=False).run(None, feeds)
        except SqueezeError:
            raise
        except Exception as error:  # ValidationError, and onnxruntime's many kinds
            reason = str(error).strip().splitlines()[0]
            raise SqueezeError(f"the trained model does not run: {reason}") from error
        if not all(np.isfinite(o).all() for o in outputs if o.dtype.kind == "f"):
            raise SqueezeError("the trained model gives infinite or NaN outputs")

    return verify
