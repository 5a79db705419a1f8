"""Metrics that need the model to run: latency, accuracy, agreement."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from squeeze import session
from squeeze.budget import ratio
from squeeze.budget.ratio import Ratio
from squeeze.budget.subject import Subject
from squeeze.calibrate.data import Data, Images, open_data
from squeeze.errors import SqueezeError
from squeeze.measure.fidelity import is_scores, scores
from squeeze.measure.inputs import random_feeds
from squeeze.session import Session

if TYPE_CHECKING:
    from squeeze.cost.device import Device

SECONDS = 10.0  # a latency check ends then, decided or not


def latency(
    subject: Subject, reference: Subject, limit: float, seconds: float | None
) -> Ratio:
    """Time of a model ÷ time of its reference, both run here and now, in turn.

    One thread: with more, every run waits for the slowest core, which on a shared
    machine is another job's.
    """
    return ratio.measure(
        _runner(subject), _runner(reference), limit, seconds or SECONDS
    )


def accuracy(subject: Subject, data: Data) -> float:
    """Share of the samples whose top class is the label."""
    right = count = 0
    for classes, labels in _classes(subject, data):
        if labels is None:
            raise SqueezeError(f"{data.name}: has no labels; accuracy needs them")
        right += int((classes == labels).sum())
        count += len(labels)
    return right / count


def agreement(subject: Subject, reference: Subject, data: Data) -> float:
    """Share of the samples that both models put into the same class."""
    same = count = 0
    pairs = zip(_classes(subject, data), _classes(reference, data), strict=True)
    for (mine, _), (theirs, _) in pairs:
        same += int((mine == theirs).sum())
        count += len(mine)
    return same / count


def open_for(
    subject: Subject, spec: str, folder: Path, images: Mapping[str, Any]
) -> Data:
    """The check's data; paths start at the folder of the configuration."""
    place = spec if spec.startswith("python:") else str(folder / spec)
    return open_data(place, subject.model, subject.shapes, Images(**images))


def device(name: str, folder: Path) -> Device:
    """A shipped device, or a file beside the configuration. Raises UsageError."""
    from squeeze.cost import device as devices

    own = folder / name
    return devices.load(str(own) if own.is_file() else name)


def predicted_ms(subject: Subject, machine: Device) -> float:
    """Milliseconds on a machine that isn't here, from its constants."""
    from squeeze.cost import device as devices

    graph, shapes = subject.model.graph, subject.shapes
    return 1e3 * devices.predict(graph, shapes, subject.profile, machine).total_s


# -- running ------------------------------------------------------------------------


def _runner(subject: Subject) -> Callable[[], object]:
    made, path = _session(subject), _path(subject)
    feeds = random_feeds(made, subject.shapes.inputs)
    session.run(made, feeds, path)  # once with onnxruntime's reason where it fails
    return partial(made.run, None, feeds)


def _path(subject: Subject) -> Path:
    """Sessions read files; a model in memory may have been changed since."""
    if subject.path is None:
        raise SqueezeError(f"{subject.name}: save it first; only files are run")
    return subject.path


def _session(subject: Subject) -> Session:
    _need_memory(subject)
    return session.open_model(_path(subject), threads=1)


def _need_memory(subject: Subject) -> None:
    """Refuse what can't fit, rather than have the system end the process."""
    totals = subject.profile.totals
    need = totals.peak_activation_bytes + 2 * totals.weight_bytes
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise SqueezeError(
            f"{subject.name}: running it takes {need / 1e9:.3g} GB, "
            f"this machine has {have / 1e9:.3g} GB"
        )


def _classes(
    subject: Subject, data: Data
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The top class of every sample, batch by batch, with its label."""
    made, path = _session(subject), _path(subject)
    for batch in data:
        outputs = session.run(made, batch.inputs, path)
        yield _top(subject, outputs, len(batch)), batch.labels


def _top(subject: Subject, outputs: Sequence[Any], count: int) -> np.ndarray:
    """Classes from the first output that holds a score per class."""
    for output in outputs:
        if isinstance(output, np.ndarray) and len(output) == count:
            if not is_scores(output):
                continue
            found = scores(output)
            if not np.isfinite(found).all():
                raise SqueezeError(f"{subject.name}: NaN or Inf in its outputs")
            return np.asarray(found.argmax(1))
    raise SqueezeError(
        f"{subject.name}: no output holds class scores (samples, classes)"
    )
