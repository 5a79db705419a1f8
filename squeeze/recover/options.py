"""What distillation takes and what it reports, without PyTorch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Loss = Literal["auto", "soft", "mse"]
Device = Literal["auto", "cpu", "cuda"]
FEATURE_WEIGHT = 0.1  # of the replaced sites' outputs, beside the network's outputs
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Options:
    """How to distil; the defaults work unattended.

    `epochs` counts passes over the training samples, all phases together, and `minutes`
    takes its place; by default as many as make 2,000 updates, at least 20 and at most
    100. `batch` is 128 by default, less for few samples. `loss` "auto" is soft targets
    for class scores and mean squared error for everything else; what only looks like
    scores, without a softmax, has a tenth of it as well. `temperature` softens
    both networks' scores (Hinton et al. 2015). `l1` weighs the mean magnitude of every
    activation (thesis §2.2.2). `augment` shifts, mirrors and, with `mix`, blends
    images, which takes more epochs. `block_share` is the part of the schedule in which
    replaced sites learn one by one. `patience` is in epochs without gain: by default a
    third of them, at least 8.
    """

    epochs: int = 0
    minutes: float | None = None
    batch: int = 0
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    loss: Loss = "auto"
    temperature: float = 4.0
    feature_weight: float | None = None
    label_weight: float = 0.0
    l1: float = 0.0
    block_share: float = 0.2
    batch_norm: bool | None = None
    augment: bool = True
    mix: bool = False
    device: Device = "auto"
    precision: Precision = "auto"
    patience: int | None = None
    seed: int = 0

    def settled(self, samples: int) -> Options:
        """With the schedule that this many training samples ask for."""
        batch = self.batch or min(128, max(16, samples // 16))
        updates = max(samples // batch, 1)
        epochs = self.epochs or min(max(math.ceil(2000 / updates), 20), 100)
        weight = self.feature_weight
        if weight is None:  # features hold up what the L1 term is to let go
            weight = 0.0 if self.l1 else FEATURE_WEIGHT
        return dataclasses.replace(
            self, epochs=epochs, batch=batch, feature_weight=weight
        )


@dataclass(frozen=True)
class Score:
    """The student against the teacher on held-out samples.

    `loss` is what is minimised; `error` is ‖student − teacher‖ / ‖teacher‖ over the
    outputs, with offsets that soft targets alone (`loss="soft"`) don't see. `agreement`
    needs class scores, the accuracies labels as well.
    """

    loss: float
    error: float
    agreement: float | None = None
    accuracy: float | None = None
    teacher_accuracy: float | None = None


@dataclass(frozen=True)
class Epoch:
    """One pass: the mean training loss, the held-out score, and the time it took."""

    phase: str
    epoch: int
    epochs: int | None
    loss: float
    score: Score
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where training is: after every step, and with the epoch's figures at its end."""

    phase: str
    done: float
    loss: float
    seconds_left: float
    finished: Epoch | None = None
