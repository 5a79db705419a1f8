"""The training loop: phases, schedule, average, held-out score, best state, resume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squeeze.errors import SqueezeError
from squeeze.recover import checkpoint
from squeeze.recover.feed import Fed, Feed, resized
from squeeze.recover.module import GraphModule
from squeeze.recover.objective import (
    Objective,
    Targets,
    activity,
    output_loss,
)
from squeeze.recover.optimizer import Optimizer
from squeeze.recover.options import Epoch, Options, Progress, Score
from squeeze.recover.views import Views

WARM_UP = 0.15  # share of a phase in which the learning rate rises
CHECKPOINT_SECONDS = 60.0
MAX_NORM = 5.0

State = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """Some epochs with one objective; `share` of the time where minutes are given."""

    name: str
    objective: Objective
    epochs: int
    share: float
    parameters: tuple[str, ...]


@dataclass
class Cursor:
    """Where training is. Everything that a resumed run needs besides the tensors."""

    phase: int = 0
    step: int = 0
    elapsed: float = 0.0
    phase_start: float = 0.0
    total: float = 0.0  # sum of the losses of the epoch under way
    stale: int = 0
    best: float = math.inf
    stopped: str = ""
    before: Score | None = None  # of the untrained student
    history: list[Epoch] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What a run works with."""

    student: GraphModule
    feed: Feed
    views: Views
    held_out: HeldOut
    options: Options
    device: torch.device
    autocast: bool
    micro: int
    checkpoint: Path | None = None
    identity: str = ""


class Trainer:
    """Runs the phases. `best` holds the state of the best held-out loss."""

    def __init__(
        self,
        setting: Setting,
        phases: list[Phase],
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.setting, self.phases = setting, phases
        self.cursor = Cursor()
        self.notes: list[str] = []
        self._progress = progress or (lambda _: None)
        self._average = snapshot(setting.student)
        self.best = snapshot(setting.student)
        self._optimizer = self._make_optimizer()
        self._started = self._saved = time.monotonic()

    # -- the run ----------------------------------------------------------------

    def run(self) -> Score:
        """Train to the end; returns the untrained student's score."""
        self._started = self._saved = time.monotonic()
        before = self.cursor.before or self.setting.held_out.score(self.setting.student)
        if self.cursor.before is None:
            self.cursor.before, self.cursor.best = before, before.loss
        while self.cursor.phase < len(self.phases) and not self.cursor.stopped:
            self._run_phase(self.phases[self.cursor.phase])
        restore(self.setting.student, self.best)
        return before

    def _run_phase(self, phase: Phase) -> None:
        setting, cursor = self.setting, self.cursor
        per_epoch = len(setting.feed)
        setting.student.train(True)
        while not self._finished(phase):
            epoch, start = divmod(cursor.step, per_epoch)
            index = 1000 * cursor.phase + epoch
            for fed in setting.feed.epoch(index, start):
                if not self._step(phase, setting.views.of(fed, cursor.phase, epoch)):
                    return
                if cursor.step % per_epoch == 0 or self._finished(phase):
                    break
            self._end_epoch(phase, epoch + 1)
            if cursor.stopped:
                return
        self._next_phase()

    def _next_phase(self) -> None:
        """The average goes on; its optimizer doesn't."""
        restore(self.setting.student, self._average)
        self.cursor.phase += 1
        self.cursor.step, self.cursor.phase_start = 0, self._elapsed()
        self._optimizer = self._make_optimizer()
        self.save()

    def _step(self, phase: Phase, fed: Fed) -> bool:
        """One update; False where the loss is no number any more."""
        options, cursor = self.setting.options, self.cursor
        done = self._done(phase)
        self._optimizer.set_rate(options.learning_rate * schedule(done))
        loss = self._gradients(phase, fed)
        if not math.isfinite(loss):
            cursor.stopped = (
                f"the loss became {loss} in phase {phase.name!r}, step {cursor.step}; "
                "kept the best state before it; a lower --learning-rate may help"
            )
            return False
        self._optimizer.step()
        self._follow()
        cursor.step += 1
        cursor.total += loss
        self._report(phase, loss)
        ends = cursor.step % len(self.setting.feed) == 0 or self._finished(phase)
        if not ends and time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()  # where an epoch ends, its score must be in
        return True

    def _gradients(self, phase: Phase, fed: Fed) -> float:
        """The batch's loss, its gradients accumulated over parts that fit the graph."""
        self._optimizer.zero_grad()
        total = 0.0
        for part in fed.split(self.setting.micro):
            weight = len(part) / len(fed)
            with self._precision():
                loss = phase.objective(part.to(self.setting.device)) * weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        trained = self._optimizer.parameters
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        return total if math.isfinite(float(norm)) else math.nan

    def _precision(self) -> Any:
        kind = self.setting.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.setting.autocast)

    def _make_optimizer(self) -> Optimizer:
        """For what the phase trains; everything else stands still."""
        names = set[str]()
        if self.cursor.phase < len(self.phases):
            names.update(self.phases[self.cursor.phase].parameters)
        chosen, norms = [], f"{self.setting.student.norms_key}."
        for name, parameter in self.setting.student.named_parameters():
            used = bool(names) and (name in names or name.startswith(norms))
            parameter.requires_grad_(used)
            chosen += [parameter] if used else []
        options = self.setting.options
        return Optimizer(
            chosen, options.learning_rate, options.weight_decay, sparse=options.l1 > 0
        )

    def _follow(self) -> None:
        """A moving average over about two epochs, quicker at the beginning."""
        horizon = max(2 * len(self.setting.feed), 20)
        decay = min(1 - 1 / horizon, (1 + self.cursor.step) / (10 + self.cursor.step))
        own = self.setting.student.state_dict()
        floats = [n for n, v in own.items() if v.is_floating_point()]
        with torch.no_grad():  # one call for all: small networks have many tensors
            torch._foreach_lerp_(
                [self._average[n] for n in floats], [own[n] for n in floats], 1 - decay
            )
            for name in own.keys() - set(floats):
                self._average[name].copy_(own[name])

    # -- epochs -----------------------------------------------------------------

    def _end_epoch(self, phase: Phase, epoch: int) -> None:
        setting, cursor = self.setting, self.cursor
        steps = cursor.step % len(setting.feed) or len(setting.feed)
        with swapped(setting.student, self._average):
            score = setting.held_out.score(setting.student)
        found = Epoch(
            phase.name,
            epoch,
            None if setting.options.minutes else phase.epochs,
            cursor.total / steps,
            score,
            self._elapsed(),
        )
        cursor.history.append(found)
        cursor.total = 0.0
        if score.loss < cursor.best:
            cursor.best, cursor.stale = score.loss, 0
            self.best = {k: v.clone() for k, v in self._average.items()}
        elif cursor.phase == len(self.phases) - 1:
            cursor.stale += 1
            if cursor.stale >= self._patience():
                cursor.stopped = f"no better for {cursor.stale} epochs"
        self._report(phase, found.loss, found)
        self.save()

    def _patience(self) -> int:
        given = self.setting.options.patience
        return given if given is not None else max(8, self.setting.options.epochs // 3)

    def _elapsed(self) -> float:
        return self.cursor.elapsed + time.monotonic() - self._started

    def _done(self, phase: Phase) -> float:
        """How much of the phase is behind, from 0 to 1: of its time or of its steps."""
        minutes = self.setting.options.minutes
        if minutes:
            spent = self._elapsed() - self.cursor.phase_start
            allowed = 60 * minutes * phase.share
            if self.cursor.phase == len(self.phases) - 1:
                allowed = 60 * minutes - self.cursor.phase_start
            return min(spent / max(allowed, 1e-9), 1.0)
        steps = phase.epochs * len(self.setting.feed)
        return self.cursor.step / steps if steps else 1.0

    def _finished(self, phase: Phase) -> bool:
        return self._done(phase) >= 1.0

    def _report(self, phase: Phase, loss: float, epoch: Epoch | None = None) -> None:
        done = sum(p.share for p in self.phases[: self.cursor.phase])
        done = min(done + phase.share * self._done(phase), 1.0)
        left = self._elapsed() * (1 - done) / done if done else math.inf
        self._progress(Progress(phase.name, done, loss, left, epoch))

    # -- interruption -------------------------------------------------------------

    def begin(self) -> None:
        """Try whether a checkpoint can be written; raises SqueezeError if not."""
        path = self.setting.checkpoint
        try:
            if path is not None:
                checkpoint.save(path, self._state())
                path.unlink()  # until there is something to go on from
        except OSError as error:
            raise SqueezeError(
                f"{path}: can't write the checkpoint: {error.strerror or error}; "
                "make room, or choose another -o"
            ) from error

    def save(self) -> None:
        """Write the checkpoint; a full disk is a note, training goes on without."""
        self._saved = time.monotonic()
        if self.setting.checkpoint is None:
            return
        try:
            checkpoint.save(self.setting.checkpoint, self._state())
        except OSError as error:
            note = (
                f"no checkpoint: {self.setting.checkpoint}: {error.strerror or error}"
            )
            if note not in self.notes:
                self.notes.append(note)

    def _state(self) -> dict[str, Any]:
        cursor = dataclasses.replace(self.cursor, elapsed=self._elapsed())
        return {
            "identity": self.setting.identity,
            "cursor": dataclasses.asdict(cursor),
            "student": self.setting.student.state_dict(),
            "average": self._average,
            "best": self.best,
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self) -> None:
        """Go on from the checkpoint. Raises where there is none or another run's."""
        assert self.setting.checkpoint is not None
        state = checkpoint.load(self.setting.checkpoint, self.setting.identity)
        cursor = dict(state["cursor"])
        cursor["history"] = [
            Epoch(**{**e, "score": Score(**e["score"])}) for e in cursor["history"]
        ]
        if cursor["before"] is not None:
            cursor["before"] = Score(**cursor["before"])
        self.cursor = Cursor(**cursor)
        self._average = _like(state["average"], self._average)
        self.best = _like(state["best"], self.best)
        restore(self.setting.student, _like(state["student"], self.best))
        self._optimizer = self._make_optimizer()
        self._optimizer.load_state_dict(state["optimizer"])


def schedule(done: float) -> float:
    """Up in a straight line, down in half a cosine to a thousandth."""
    if done < WARM_UP:
        return 0.04 + 0.96 * done / WARM_UP
    falling = (done - WARM_UP) / (1 - WARM_UP)
    return 0.001 + 0.999 * (1 + math.cos(math.pi * falling)) / 2


# -- states -------------------------------------------------------------------------


def snapshot(module: GraphModule) -> State:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def restore(module: GraphModule, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(state[name])


@contextmanager
def swapped(module: GraphModule, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the module holds `state`."""
    own = snapshot(module)
    restore(module, state)
    try:
        yield
    finally:
        restore(module, own)


def _like(state: Mapping[str, Tensor], example: Mapping[str, Tensor]) -> State:
    return {k: state[k].to(v.device).clone() for k, v in example.items()}


# -- the held-out part --------------------------------------------------------------


class HeldOut:
    """Samples that nothing is fitted to, with the teacher's outputs on them."""

    def __init__(
        self,
        batches: list[Fed],
        teacher: GraphModule,
        targets: Targets,
        options: Options,
    ) -> None:
        self.batches, self._targets, self._options = batches, targets, options
        names = [p.teacher for p in targets.outputs]
        with torch.no_grad():
            self._wanted = [teacher.run(fed.inputs, names) for fed in batches]

    def score(self, student: GraphModule) -> Score:
        """In float32 and evaluation mode, as the written model will run."""
        mode = student.training
        student.train(False)
        with torch.no_grad():
            parts = [
                self._score(student, fed, wanted)
                for fed, wanted in zip(self.batches, self._wanted, strict=True)
            ]
        student.train(mode)
        counts = np.array([len(fed) for fed in self.batches], float)
        share = counts / counts.sum()

        def mean(key: str) -> float | None:
            values = [p[key] for p in parts if key in p]
            return float(np.dot(values, share)) if len(values) == len(parts) else None

        different, size = (
            sum(p["different"] for p in parts),
            sum(p["size"] for p in parts),
        )
        return Score(
            mean("loss") or 0.0,
            math.sqrt(different / size) if size else 0.0,
            mean("agreement"),
            mean("accuracy"),
            mean("teacher"),
        )

    def _score(
        self, student: GraphModule, fed: Fed, wanted: Mapping[str, Tensor]
    ) -> dict[str, float]:
        small = resized(fed.inputs, student.input_sizes)
        active = self._targets.activations
        names = [*(p.student for p in self._targets.outputs), *active]
        found = student.run(small, names)
        loss = output_loss(found, wanted, fed.labels, self._targets, self._options)
        loss = loss + activity(found, active, self._options)
        result = {"loss": float(loss), "different": 0.0, "size": 0.0}
        for pair in self._targets.outputs:
            own, target = found[pair.student].double(), wanted[pair.teacher].double()
            result["different"] += float((own - target).square().sum())
            result["size"] += float(target.square().sum())
        classes = self._targets.classes
        if classes is not None:
            ours = found[classes.student].argmax(classes.axis)
            theirs = wanted[classes.teacher].argmax(classes.axis)
            result["agreement"] = float((ours == theirs).float().mean())
            if fed.labels is not None and fed.labels.shape == ours.shape:
                result["accuracy"] = float((ours == fed.labels).float().mean())
                result["teacher"] = float((theirs == fed.labels).float().mean())
        return result
