"""What the student learns: the teacher's outputs, its features, labels if given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from squeeze.errors import SqueezeError, UsageError
from squeeze.recover.feed import Fed, Inputs, resized
from squeeze.recover.module import GraphModule
from squeeze.recover.options import Options
from squeeze.recover.views import Recall

Kind = Literal["scores", "probabilities", "log-probabilities", "values"]
# ops between the network's last layer and its output that change no meaning
_RESHAPING = frozenset("Flatten Reshape Squeeze Unsqueeze".split())
_PASSING = frozenset("Cast Dropout Identity".split()) | _RESHAPING
_SCORING = frozenset("Add Conv Gemm GlobalAveragePool MatMul ReduceMean".split())
VALUES_WEIGHT = 0.1  # of the scores themselves, beside what softmax makes of them
ACTIVATIONS = frozenset(
    "Relu LeakyRelu PRelu Elu Selu Celu HardSwish Gelu Mish Clip Swish Tanh Sigmoid "
    "HardSigmoid Softplus Softsign ThresholdedRelu".split()
)


@dataclass(frozen=True)
class Pair:
    """A value of the student and what it should equal in the teacher.

    `axis` is the one of the classes, where there are any, of `rank` axes.
    """

    student: str
    teacher: str
    kind: Kind = "values"
    axis: int = 1
    rank: int = 2


@dataclass(frozen=True)
class Targets:
    """Outputs by how they are compared, features, and the sites that were replaced.

    A site is a shared value; what computes it from the shared values before differs.
    """

    outputs: tuple[Pair, ...]
    features: tuple[Pair, ...]
    sites: tuple[Pair, ...]
    known: tuple[str, ...] = ()  # sites and what they read: given while they learn
    activations: tuple[str, ...] = ()  # penalised, if there is an L1 term

    @property
    def classes(self) -> Pair | None:
        """The first output that holds class scores."""
        return next((p for p in self.outputs if p.kind != "values"), None)

    @property
    def labelled(self) -> Pair | None:
        """The first output that holds one table of class scores: labels fit it."""
        found = (p for p in self.outputs if p.kind != "values" and p.rank == 2)
        return next(found, None)


# -- finding what to compare --------------------------------------------------------


def find_targets(
    student: GraphModule, teacher: GraphModule, sample: Inputs, options: Options
) -> Targets:
    """Pair up outputs and inner values, by running both on a few samples.

    Raises SqueezeError where the outputs do not fit or nothing can be trained.
    """
    small = resized(sample, student.input_sizes)
    with torch.no_grad():
        theirs = {n: v.shape for n, v in teacher.run(sample, _inner(teacher)).items()}
        ours = {n: v.shape for n, v in student.run(small, _inner(student)).items()}
    outputs = _outputs(student, teacher, ours, theirs, options)
    shared = tuple(
        Pair(n, n)
        for n in ours
        if n in theirs and ours[n] == theirs[n] and len(ours[n]) > 1
    )
    names = {p.student for p in outputs}
    inner = _stage_ends(shared, ours, student.reached - names)
    sites = _replaced(student, teacher, shared)
    whole = [p for p in outputs if p.student in student.reached]
    if not whole:
        whole = _before_islands(student, shared)
    if not whole:
        raise SqueezeError(_unreachable(student))
    return Targets(
        tuple(whole),
        inner or _by_shape(ours, theirs, student.reached - names),
        sites,
        _known(student, sites, shared),
        _activations(student) if options.l1 else (),
    )


def _activations(module: GraphModule) -> tuple[str, ...]:
    found = tuple(s.outputs[0] for s in module.steps if s.op.kind in ACTIVATIONS)
    if not found:
        raise UsageError("--l1: the student has no activations to keep small")
    return found


def _inner(module: GraphModule) -> list[str]:
    return [n for step in module.steps for n in step.outputs if n]


def _outputs(
    student: GraphModule,
    teacher: GraphModule,
    ours: Mapping[str, torch.Size],
    theirs: Mapping[str, torch.Size],
    options: Options,
) -> list[Pair]:
    mine, other = student.output_names, teacher.output_names
    if set(mine) != set(other) and len(mine) != len(other):
        raise SqueezeError(
            f"the student has the outputs {', '.join(mine)}, the teacher "
            f"{', '.join(other)}; distil a student made from this teacher"
        )
    names = (
        [(n, n) for n in mine]
        if set(mine) == set(other)
        else zip(mine, other, strict=True)
    )
    pairs = []
    for a, b in names:
        if ours.get(a) != theirs.get(b):
            raise SqueezeError(
                f"output {a!r} is {_dims(ours.get(a))} in the student and "
                f"{_dims(theirs.get(b))} in the teacher; they must be equal"
            )
        shape = theirs.get(b, ())
        kind, axis = meaning(teacher, b, shape, options)
        pairs.append(Pair(a, b, kind, axis, len(shape)))
    return pairs


def _dims(shape: torch.Size | None) -> str:
    return "×".join(map(str, shape)) if shape is not None else "a constant"


def meaning(
    module: GraphModule, name: str, shape: Sequence[int], options: Options
) -> tuple[Kind, int]:
    """What an output holds, and the axis of its classes.

    Its last op suggests it, or `--loss soft` says it: of four axes the second then
    counts classes, else the last. A single class is a value: there is no choice.
    """
    last, reshaped = module.producer.get(name), False
    while last is not None and last.op.kind in _PASSING and last.inputs[0]:
        reshaped |= last.op.kind in _RESHAPING
        last = module.producer.get(last.inputs[0])
    kind, rank = last.op.kind if last is not None else "", len(shape)
    if rank < 2:
        return "values", 0
    axis = 1 if rank in (2, 4) else rank - 1
    found: Kind = "values"
    if last is not None and kind in ("Softmax", "LogSoftmax"):
        single = rank == 2
        if not reshaped:
            newer = last.op.opset >= 13  # before, all axes from this one on are one
            axis = int(last.op.attributes.get("axis", -1 if newer else 1)) % rank
            single = axis > 0 and (newer or axis == rank - 1)
        if single:
            found = "probabilities" if kind == "Softmax" else "log-probabilities"
    elif options.loss == "soft" or (rank == 2 and kind in _SCORING):
        found = "scores"
    return ("values" if shape[axis] < 2 else found), axis


def _before_islands(student: GraphModule, shared: Sequence[Pair]) -> list[Pair]:
    """What unknown ops at the end (box selection, say) read, instead of the outputs."""
    read = {n for step in student.steps if step.island for n in step.inputs}
    return [p for p in shared if p.student in read & student.reached]


def _unreachable(student: GraphModule) -> str:
    islands = [s for s in student.steps if s.island]
    if islands:
        return (
            f"{islands[-1].op.kind} {islands[-1].name!r}: no gradient passes through "
            "this op, and no weight can be reached without it"
        )
    return "the student has no floating weights to train"


def _by_shape(
    ours: Mapping[str, torch.Size],
    theirs: Mapping[str, torch.Size],
    reached: frozenset[str],
) -> tuple[Pair, ...]:
    """Without common names: the last value of each shape, both sides (stage ends)."""
    last = {shape: name for name, shape in theirs.items() if len(shape) >= 3}
    mine = {s: n for n, s in ours.items() if len(s) >= 3 and n in reached}
    return tuple(Pair(name, last[s]) for s, name in mine.items() if s in last)


def _stage_ends(
    shared: Sequence[Pair], ours: Mapping[str, torch.Size], reached: frozenset[str]
) -> tuple[Pair, ...]:
    """The last shared value of each shape: a few for any depth."""
    last = {ours[p.student]: p for p in shared if p.student in reached}
    return tuple(p for shape, p in last.items() if len(shape) >= 3)


def _known(
    student: GraphModule, sites: Sequence[Pair], shared: Sequence[Pair]
) -> tuple[str, ...]:
    edge = {p.student for p in shared}
    found = {p.student for p in sites}
    for pair in sites:
        found |= segment(student, pair.student, edge).reads
    return tuple(sorted(found))


def _replaced(
    student: GraphModule, teacher: GraphModule, shared: Sequence[Pair]
) -> tuple[Pair, ...]:
    edge = {p.student for p in shared}

    def is_site(name: str) -> bool:
        if name not in student.reached:
            return False
        found = segment(student, name, edge)
        if name in student.output_names and not found.reads:
            return False  # the whole network: no site of it was replaced alone
        return any(_is_new(student, teacher, w) for w in found.weights)

    return tuple(pair for pair in shared if is_site(pair.student))


@dataclass(frozen=True)
class Segment:
    """What lies between a value and the known values before it."""

    weights: frozenset[str]
    reads: frozenset[str]


def segment(module: GraphModule, name: str, edge: Set[str]) -> Segment:
    """Parameters and values of `edge` that `name` is computed from."""
    weights, reads, open_ = set[str](), set[str](), [name]
    seen = {name}
    while open_:
        step = module.producer.get(open_.pop())
        for n in step.inputs if step is not None else ():
            if n in module._parameters:
                weights.add(n)
            elif n in edge:
                reads.add(n)
            elif n and n not in seen:
                seen.add(n)
                open_.append(n)
    return Segment(frozenset(weights), frozenset(reads))


def _is_new(student: GraphModule, teacher: GraphModule, name: str) -> bool:
    old = teacher._parameters.get(name)
    own = student._parameters[name]
    return own is not None and (old is None or not torch.equal(own.cpu(), old.cpu()))


def new_weights(student: GraphModule, teacher: GraphModule) -> set[str]:
    """Names of the parameters that the teacher doesn't have, or not like this."""
    return {n for n in student._parameters if _is_new(student, teacher, n)}


# -- losses -------------------------------------------------------------------------


def mean_squared(own: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's variance: 1 for a constant guess.

    The target gets no gradient. In bfloat16 only the sums are in float32: a float32
    copy of every feature would take a sixth of a training step.
    """
    error: Tensor = _SquaredDistance.apply(own, target)  # type: ignore[no-untyped-call]
    mean = target.mean(dtype=_summing(target)).to(target.dtype)
    return error / _squares(target - mean).clamp(min=1e-8 * target.numel())


class _SquaredDistance(torch.autograd.Function):
    """‖own − target‖², of the difference in their type and the sum in float32."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, target: Tensor) -> Tensor:
        difference = own - target
        ctx.save_for_backward(difference)
        return _squares(difference)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * grad).to(difference.dtype), None


def _squares(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=_summing(x))
    return norm.square()


def _summing(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def log_probabilities(x: Tensor, pair: Pair, temperature: float) -> Tensor:
    """Logarithms of the class probabilities at a temperature."""
    x = x.float()
    if pair.kind == "probabilities":
        x = x.clamp(min=1e-8).log()
    return F.log_softmax(x / temperature, pair.axis)


def soft_targets(own: Tensor, target: Tensor, pair: Pair, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) at temperature T (Hinton et al. 2015, §2).

    The mean over samples, and over positions where every one has classes.
    """
    ours = log_probabilities(own, pair, temperature)
    theirs = log_probabilities(target, pair, temperature)
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total * (temperature**2 * own.shape[pair.axis] / own.numel())


def output_loss(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    labels: Tensor | None,
    targets: Targets,
    options: Options,
) -> Tensor:
    """Mean over the outputs, and `label_weight` times the labels' cross-entropy."""
    losses = [
        _pair_loss(found[p.student], wanted[p.teacher], p, options)
        for p in targets.outputs
    ]
    loss = torch.stack(losses).mean()
    pair = targets.labelled
    if labels is not None and options.label_weight and pair is not None:
        scores = log_probabilities(found[pair.student], pair, 1.0)
        _check_range(labels, scores.shape[1])
        loss = loss + options.label_weight * F.nll_loss(scores, labels)
    return loss


def _pair_loss(own: Tensor, target: Tensor, pair: Pair, options: Options) -> Tensor:
    """By what the values are; what only seems to be scores counts as values, too.

    Softmax tells neither an offset of all nor the size of small ones: without that
    term an embedding or a regression would drift where it matters.
    """
    if pair.kind == "values" or options.loss == "mse":
        return mean_squared(own, target)
    loss = soft_targets(own, target, pair, options.temperature)
    if pair.kind == "scores" and options.loss == "auto":
        loss = loss + VALUES_WEIGHT * mean_squared(own, target)
    return loss


def _check_range(labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise SqueezeError(
            f"--label-weight: a label is {low if low < 0 else high}, the output has "
            f"the classes 0 to {classes - 1}; correct the labels"
        )


def activity(
    found: Mapping[str, Tensor], names: Sequence[str], options: Options
) -> Tensor:
    """The L1 term: mean magnitude of each activation, summed (thesis §2.2.2)."""
    sizes = [found[n].float().abs().mean() for n in names]
    return options.l1 * torch.stack(sizes).sum() if sizes else torch.zeros(())


@dataclass(frozen=True)
class Objective:
    """The loss of one phase, from a batch; gradients reach the student alone."""

    student: GraphModule
    teacher: GraphModule
    targets: Targets
    options: Options

    def __call__(self, fed: Fed) -> Tensor:
        raise NotImplementedError


class BlockObjective(Objective):
    """Each replaced site learns its original's output from its original's input."""

    def __call__(self, fed: Fed) -> Tensor:
        sites = [p.student for p in self.targets.sites]
        with torch.no_grad():
            given = self.teacher.run(fed.inputs, self.targets.known)
        small = resized(fed.inputs, self.student.input_sizes)
        found = self.student.run(small, sites, given)
        return torch.stack([mean_squared(found[n], given[n]) for n in sites]).mean()


@dataclass(frozen=True)
class WholeObjective(Objective):
    """The teacher's outputs, its features and the labels, end to end.

    Features count while the teacher runs; on pictures that come again, what it gave
    for them stands, and its outputs are all there is to learn.
    """

    recall: Recall

    def __call__(self, fed: Fed) -> Tensor:
        options, targets = self.options, self.targets
        wanted, features = self._wanted(fed)
        small = resized(fed.inputs, self.student.input_sizes)
        compared = (*targets.outputs, *features)
        found = self.student.run(
            small, [*(p.student for p in compared), *targets.activations]
        )
        loss = output_loss(found, wanted, fed.labels, targets, options)
        if features:
            errors = [
                mean_squared(found[p.student], wanted[p.teacher]) for p in features
            ]
            weight = options.feature_weight or 0.0
            loss = loss + weight * torch.stack(errors).mean()
        return loss + activity(found, targets.activations, options)

    def _wanted(self, fed: Fed) -> tuple[Mapping[str, Tensor], tuple[Pair, ...]]:
        """The teacher's values on the batch, and which of them are features."""
        targets = self.targets
        kept = self.recall.find(fed) if fed.again else None
        if kept is not None:
            return kept, ()
        features: tuple[Pair, ...] = ()
        if self.options.feature_weight and not fed.again:
            features = targets.sites or targets.features
        outputs = [p.teacher for p in targets.outputs]
        with torch.no_grad():
            wanted = self.teacher.run(
                fed.inputs, [*outputs, *(p.teacher for p in features)]
            )
        self.recall.keep(fed, {n: wanted[n] for n in outputs})
        return wanted, features
