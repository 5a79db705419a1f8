"""Distillation: the smaller network learns from the original, on the user's data."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from squeeze import model as models
from squeeze.calibrate.data import HELD_OUT, Data, fixed_batch, hold_out
from squeeze.cost import profile
from squeeze.errors import SqueezeError, UsageError
from squeeze.recover import checkpoint as checkpoints
from squeeze.recover import norms
from squeeze.recover.check import relative, verify
from squeeze.recover.feed import (
    Fed,
    Feed,
    Inputs,
    feeds_for,
    read,
    resized,
    sample_bytes,
)
from squeeze.recover.host import keep_freed, suited_threads
from squeeze.recover.module import GraphModule, to_torch, write_back
from squeeze.recover.objective import (
    BlockObjective,
    Targets,
    WholeObjective,
    find_targets,
    new_weights,
    segment,
)
from squeeze.recover.options import Epoch, Options, Progress, Score
from squeeze.recover.train import HeldOut, Phase, Setting, Trainer
from squeeze.recover.views import Recall, Views

NORM_BATCH = 16  # fewer samples make poor statistics
NORM_SAMPLES = 512  # to start an inserted normalisation from
EVAL_BATCH = 128
HELD_BYTES = 2 * 10**9  # of held-out samples with the outputs on them
BLOCK_UPDATES = 750  # sites alone gain little after that


@dataclass(frozen=True)
class Distilled:
    """The trained student (a new model), its score before and after, and how it went.

    `stopped` says why training ended before its schedule did, or is empty.
    """

    model: ir.Model
    before: Score
    after: Score
    history: tuple[Epoch, ...]
    seconds: float
    device: str
    precision: str
    samples: int
    held_out: int
    sites: tuple[str, ...]
    normalised: int
    stopped: str
    notes: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should hear of how it went."""
        return (*((self.stopped,) if self.stopped else ()), *self.notes)


def distill(
    student: ir.Model,
    teacher: ir.Model,
    data: Data,
    options: Options | None = None,
    *,
    evaluation: Data | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Distilled:
    """Train `student` to do what `teacher` does on `data`; neither model is changed.

    `data` is opened for the teacher's inputs; its last part is held out unless
    `evaluation` is given. At `checkpoint` the state is kept for `resume`; the caller
    deletes it once the result is safe. Raises SqueezeError where the two do not fit.
    """
    _check_inputs(student, teacher)
    _check_options(options or Options())
    training, held = (
        hold_out(data) if evaluation is None else (data, evaluation.sample(HELD_OUT))
    )
    options = (options or Options()).settled(len(training))
    identity = ""
    if checkpoint:
        used = training, held
        identity = checkpoints.identity(student, teacher, used, options)
    saved = Saved(checkpoint, identity, resume)
    keep_freed()
    with suited_threads(_macs(teacher, data) * options.batch):
        return _distill((student, teacher), training, held, options, saved, progress)


@dataclass(frozen=True)
class Saved:
    """Where the state is kept, whose state it is, and whether to go on from it."""

    checkpoint: Path | None
    identity: str
    resume: bool


def _macs(model: ir.Model, data: Data) -> float:
    """Of one sample; infinite where nobody can tell."""
    try:
        counted = profile(model, {s.name: s.shape for s in data.specs})
    except SqueezeError:
        return math.inf
    return counted.totals.macs / (*data.specs[0].shape, 1)[0]


def _distill(
    pair: tuple[ir.Model, ir.Model],
    training: Data,
    held: Data,
    options: Options,
    saved: Saved,
    progress: Callable[[Progress], None] | None,
) -> Distilled:
    started = time.monotonic()
    student, teacher = pair
    device = _device(options)
    modules = to_torch(student), to_torch(teacher)
    sample = _verified(pair, modules, training)
    for module in modules:
        module.place(device)
    sample = sample.to(device)
    targets = find_targets(*modules, sample.inputs, options)
    micro = min(
        _micro_batch(m, b, sample, options)
        for m, b in zip(modules, map(fixed_batch, pair), strict=True)
    )
    feed = Feed(training, options.batch, options.seed)
    _check_labels(feed, targets, options)
    _freeze_statistics(modules[0], micro)
    inserted = _insert_norms(modules, training, options, device, micro)
    views = Views(options, len(training), sample.inputs)
    held = _that_fit(held, modules[1], targets, sample, micro)
    setting = Setting(
        modules[0],
        feed,
        views,
        HeldOut(_batches(held, device, micro), modules[1], targets, options),
        options,
        device,
        _autocast(options, device),
        micro,
        saved.checkpoint,
        saved.identity,
    )
    recall = Recall(len(training), views.count)
    phases = _phases(modules, targets, options, len(feed), recall)
    trainer = Trainer(setting, phases, progress)
    if saved.resume:
        trainer.load()
    else:
        trainer.begin()
    before = trainer.run()
    trainer.save()
    result = models.copy(student)
    write_back(result, setting.student)
    return Distilled(
        model=result,
        before=before,
        after=setting.held_out.score(setting.student),
        history=tuple(trainer.cursor.history),
        seconds=time.monotonic() - started,
        device=str(device),
        precision="bfloat16" if setting.autocast else "float32",
        samples=len(training),
        held_out=len(held),
        sites=tuple(p.student for p in targets.sites),
        normalised=inserted,
        stopped=trainer.cursor.stopped,
        notes=tuple(trainer.notes),
    )


# -- before training ----------------------------------------------------------------


def _check_inputs(student: ir.Model, teacher: ir.Model) -> None:
    ours, theirs = ([v.name for v in m.graph.inputs] for m in (student, teacher))
    if set(ours) != set(theirs):
        raise SqueezeError(
            f"the student's inputs are {', '.join(map(str, ours))}, the teacher's "
            f"{', '.join(map(str, theirs))}; distil a student made from this teacher"
        )


def _check_options(options: Options) -> None:
    """Settings that are no numbers, or would do nothing."""
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')}: {value} is no number")
    if options.mix and (options.label_weight or not options.augment):
        raise UsageError(
            "--mix: a blend has no label, and --no-augment leaves images as they are; "
            "leave one of them out"
        )


def _device(options: Options) -> torch.device:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch finds no GPU; pass --device cpu")
    cuda = available and options.device != "cpu"
    return torch.device("cuda" if cuda else "cpu")


def _autocast(options: Options, device: torch.device) -> bool:
    """bfloat16 where the hardware multiplies in it: elsewhere it is slower."""
    if options.precision != "auto":
        return options.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    flag = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(flag())


def _verified(
    models: tuple[ir.Model, ir.Model],
    modules: tuple[GraphModule, GraphModule],
    data: Data,
) -> Fed:
    """A few samples, on which both modules gave what onnxruntime gives."""
    sizes = [fixed_batch(m) or 2 for m in models]
    if len(data) < max(fixed_batch(m) or 1 for m in models):
        raise SqueezeError(
            f"{data.name}: {len(data)} samples to train on are fewer than the batch "
            f"of {max(sizes)} that the network is fixed to; pass more"
        )
    sample = read(data.take(np.arange(min(max(sizes), len(data)))))
    for what, model, module, size in zip(
        ("student", "teacher"), models, modules, sizes, strict=True
    ):
        part = next(sample.split(size)).inputs
        try:
            verify(model, module, feeds_for(model, part))
        except SqueezeError as error:
            raise SqueezeError(f"{what}: {error}") from error
    return sample


def _micro_batch(
    module: GraphModule, fixed: int | None, sample: Fed, options: Options
) -> int:
    """Samples that go through the graph at once: its own batch where it is bound to it.

    A graph exported for one batch often works for any; two copies of a batch tell.
    """
    if fixed is None:
        return options.batch
    one = resized(next(sample.split(fixed)).inputs, module.input_sizes)
    two = {k: torch.cat([v, v.roll(1, -1)]) for k, v in one.items()}
    with torch.no_grad():
        try:
            alone = [
                module.run({k: v[i : i + fixed] for k, v in two.items()})
                for i in (0, fixed)
            ]
            both = module.run(two)
        except SqueezeError:
            return fixed
    for name in module.output_names:
        expected = torch.cat([a[name] for a in alone]).cpu().numpy()
        if relative(both[name], expected) > 1e-3:
            return fixed
    return max(options.batch // fixed, 1) * fixed


def _check_labels(feed: Feed, targets: Targets, options: Options) -> None:
    if options.label_weight and not feed.labelled:
        raise UsageError("--label-weight: the data has no labels; leave it out")
    if options.label_weight and targets.labelled is None:
        raise UsageError("--label-weight: no output holds class scores; leave it out")


def _freeze_statistics(module: GraphModule, micro: int) -> None:
    if micro < NORM_BATCH:
        for step in module.steps:
            step.op.frozen = True


def _insert_norms(
    modules: tuple[GraphModule, GraphModule],
    data: Data,
    options: Options,
    device: torch.device,
    micro: int,
) -> int:
    """Behind new convolutions, where batches are large enough for statistics."""
    student, teacher = modules
    size = min(micro, options.batch, len(data))
    if options.batch_norm and size < 2:
        raise UsageError(
            "--batch-norm: one sample at a time has no statistics; leave it out, or "
            "pass a larger --batch"
        )
    if options.batch_norm is False or (
        options.batch_norm is None and size < NORM_BATCH
    ):
        return 0
    wanted = new_weights(student, teacher) if options.batch_norm is None else None
    found = norms.places(student, wanted)
    sample = data.sample(NORM_SAMPLES, options.seed)

    def batches() -> list[Inputs]:
        fed = _batches(sample, device, micro)
        return [resized(f.inputs, student.input_sizes) for f in fed]

    norms.insert(student, found, batches() if found else [])
    return len(found)


def _that_fit(
    held: Data, teacher: GraphModule, targets: Targets, sample: Fed, micro: int
) -> Data:
    """As many samples as fit `HELD_BYTES` with the teacher's outputs, an eighth of
    them at least: dense outputs of large images would fill the memory.
    """
    with torch.no_grad():
        outputs = teacher.run(sample.inputs, [p.teacher for p in targets.outputs])
    size = sample_bytes(held) + sum(v.nbytes for v in outputs.values()) / len(sample)
    most = max(int(HELD_BYTES / size), len(held) // 8, micro) // micro * micro
    if most >= len(held):
        return held
    return held.take(np.linspace(0, len(held) - 1, most).astype(int))


def _batches(data: Data, device: torch.device, micro: int) -> list[Fed]:
    return [fed.to(device) for fed in read(data).split(min(micro, EVAL_BATCH))]


def _phases(
    modules: tuple[GraphModule, GraphModule],
    targets: Targets,
    options: Options,
    updates: int,
    recall: Recall,
) -> list[Phase]:
    """Block by block while sites are new, then end to end; `updates` of an epoch."""
    student, teacher = modules
    every = tuple(student._parameters)
    whole = WholeObjective(student, teacher, targets, options, recall)
    share = options.block_share if targets.sites else 0.0
    epochs = round(options.epochs * share)
    if share and options.epochs > 2:
        epochs = min(max(epochs, 1), math.ceil(BLOCK_UPDATES / updates))
    if not options.minutes:
        share = epochs / options.epochs
    if not epochs:
        return [Phase("whole", whole, options.epochs, 1.0, every)]
    edge = set(targets.known)
    inside = {
        w for p in targets.sites for w in segment(student, p.student, edge).weights
    }
    blocks = BlockObjective(student, teacher, targets, options)
    return [
        Phase("blocks", blocks, epochs, share, tuple(sorted(inside))),
        Phase("whole", whole, options.epochs - epochs, 1 - share, every),
    ]
