"""The path that every rewrite takes: load, simplify, change, check, save, measure."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from squeeze import model as models
from squeeze import session
from squeeze import shapes as shaping
from squeeze.cost import profile
from squeeze.errors import SqueezeError
from squeeze.measure import latency
from squeeze.measure.fidelity import Fidelity
from squeeze.measure.inputs import random_feeds
from squeeze.rewrite.plan import Outcome, Result
from squeeze.shapes import InputShapes, Shapes

if TYPE_CHECKING:
    from squeeze.recover.run import Distilled

Transform = Callable[[ir.Model, Shapes], Outcome]
Measure = Callable[[Path, Path], Fidelity | None]
Train = Callable[[], "Distilled"]
Progress = Callable[[float], None]  # takes the share done


def _silent(title: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda share: None)


@dataclass(frozen=True)
class Options:
    """What every rewrite takes. `output` None, or `dry_run`, writes nothing.

    `train` trains the model at `output` in place and says how that went; what is
    measured afterwards is the trained model. `bar` shows one stage's progress by its
    title.
    """

    output: Path | None = None
    dry_run: bool = False
    bench: bool = True
    simplify: bool = True
    seed: int = 0
    input_shapes: InputShapes = field(default_factory=dict)
    command: str = ""
    train: Train | None = None
    bar: Callable[[str], AbstractContextManager[Progress]] = _silent

    @property
    def writes(self) -> Path | None:
        return None if self.dry_run else self.output


def default_output(path: Path, suffix: str) -> Path:
    """`model.onnx` → `model.<suffix>.onnx`, beside the input."""
    return path.with_name(f"{path.stem}.{suffix}.onnx")


def run(
    model: ir.Model | str | os.PathLike[str],
    transform: Transform,
    options: Options,
    fidelity: Measure | None = None,
) -> Result:
    """Apply `transform` to a model and report what it cost and gained.

    Nothing appears at `options.output` unless the result passes the checker and runs
    in onnxruntime; where the original doesn't run here, a note says "not verified".
    """
    if options.writes:
        models.check_output(options.writes)
    if not isinstance(model, ir.Model):
        model = models.load(Path(model))
    given = dict(options.input_shapes)
    shapes = shaping.infer(model, given)
    before = profile(model, shapes=shapes)
    origin = models.source(model)
    with options.bar("rewriting"):
        outcome, notes = _transformed(model, shapes, transform, options)
    del model
    if origin is not None:
        origin.release_pages()
    after_shapes = shaping.infer(outcome.model, _renamed_inputs(outcome.model, given))
    _stamp(outcome.model, options.command)
    written = None
    if options.writes:
        verify = _verifier(origin, shapes, after_shapes, notes)
        with options.bar("writing and running once"):
            written = models.save(outcome.model, options.writes, verify)
    trained = _trained(outcome, options, notes) if written else None
    after = profile(
        outcome.model,
        shapes=after_shapes,
        file_bytes=written or models.proto_bytes(outcome.model),
    )
    measured = similar = None
    runs_here = not any(note.startswith("not verified") for note in notes)
    if written and options.writes and origin and runs_here:
        if options.bench:
            with options.bar("timing") as progress:
                measured = latency.side_by_side(
                    origin.path,
                    options.writes,
                    shapes,
                    after_shapes,
                    options.seed,
                    progress=progress,
                )
        if fidelity is not None:
            with options.bar("comparing outputs"):
                similar = fidelity(origin.path, options.writes)
    return Result(
        input=str(origin.path) if origin else "model",
        output=str(options.writes) if options.writes else None,
        before=before.totals,
        after=after.totals,
        changes=tuple(outcome.changes),
        latency=measured,
        fidelity=similar,
        notes=tuple(notes),
        model=outcome.model if trained is None else trained.model,
        trained=trained,
    )


def _trained(outcome: Outcome, options: Options, notes: list[str]) -> Distilled | None:
    """Train what was written, if that was asked for and there is anything to learn."""
    if options.train is None:
        return None
    if not any(change.applied for change in outcome.changes):
        notes.append("not trained: nothing was changed")
        return None
    try:
        return options.train()
    except SqueezeError as error:
        raise SqueezeError(
            f"{error}; {options.writes} is written, but not trained"
        ) from error


def _transformed(
    model: ir.Model, shapes: Shapes, transform: Transform, options: Options
) -> tuple[Outcome, list[str]]:
    notes: list[str] = []
    work = model
    if options.simplify:
        work, note = models.simplify(model)
        notes += [note] if note else []
        if work is not model:
            shapes = shaping.infer(work, options.input_shapes)
    if work is model:
        work = models.copy(model)
    outcome = transform(work, shapes)
    _forget_shapes(outcome.model.graph)
    return outcome, [*notes, *outcome.notes]


def _renamed_inputs(model: ir.Model, given: InputShapes) -> dict[str, tuple[int, ...]]:
    """The user's shapes that still fit: a rewrite may have fixed new ones."""
    fixed = {
        v.name
        for v in model.graph.inputs
        if v.shape is not None and all(isinstance(d, int) for d in v.shape)
    }
    return {k: v for k, v in given.items() if k not in fixed and (k or len(fixed) == 0)}


def _forget_shapes(graph: ir.Graph) -> None:
    """Stale shapes make models that no runtime loads; onnx infers them again."""
    boundary = {*graph.outputs}
    for node in graph:
        if node.domain in ("", "ai.onnx"):
            for value in node.outputs:
                if value not in boundary:
                    value.shape = None


def _stamp(model: ir.Model, command: str) -> None:
    model.metadata_props["squeeze.version"] = version("squeeze")
    if command:
        model.metadata_props["squeeze.command"] = command


def _verifier(
    origin: models.Source | None, before: Shapes, after: Shapes, notes: list[str]
) -> Callable[[Path], None]:
    """Check and run the written file; blame the original where it fails as well."""

    def verify(written: Path) -> None:
        problem = _problem(written, after)
        if problem is None:
            return
        if origin is not None and (own := _problem(origin.path, before)) is not None:
            notes.append(f"not verified: the original doesn't run here: {own}")
            return
        raise SqueezeError(
            f"the rewritten model does not run, nothing written: {problem}"
        )

    return verify


def _problem(path: Path, shapes: Shapes) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # ValidationError, InferenceError
        return str(error).strip().splitlines()[0]
    try:
        runner = session.create(path, optimize=False)
        runner.run(None, random_feeds(runner, shapes.inputs))
    except Exception as error:  # onnxruntime raises many kinds
        return str(error).strip().splitlines()[0]
    return None
