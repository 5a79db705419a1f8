"""Metrics that need the model to run: latency, accuracy, agreement."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from squeeze.budget import ratio
from squeeze.budget.ratio import Ratio
from squeeze.budget.subject import Subject
from squeeze.calibrate.data import Data, Images, open_data
from squeeze.errors import SqueezeError
from squeeze.measure import session
from squeeze.measure.inputs import random_feeds
from squeeze.measure.session import Session

T = TypeVar("T")
SECONDS = 10.0  # a latency check ends then, decided or not


def latency(
    subject: Subject, reference: Subject, limit: float, seconds: float | None
) -> Ratio:
    """Time of a model ÷ time of its reference, both run here and now, in turn.

    One thread each: with more, every run waits for the slowest core, which on a
    shared machine is another job's.
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


def predicted_ms(subject: Subject, device: str, folder: Path) -> float:
    """Time on a machine that isn't here, from its constants."""
    raise SqueezeError(f"no device {device!r}")


# -- running ------------------------------------------------------------------------


def _runner(subject: Subject) -> Callable[[], object]:
    made = _session(subject, optimize=True)
    feeds = random_feeds(made, subject.shapes.inputs)
    _running(subject, lambda: made.run(None, feeds))
    return lambda: made.run(None, feeds)


def _session(subject: Subject, optimize: bool) -> Session:
    _need_memory(subject)
    path = subject.path
    given = path if path is not None else ir.to_proto(subject.model).SerializeToString()
    return _running(
        subject, lambda: session.create(given, threads=1, optimize=optimize)
    )


def _running(subject: Subject, call: Callable[[], T]) -> T:
    """onnxruntime raises many kinds; each means that the model doesn't run here."""
    try:
        return call()
    except Exception as error:
        reason = (
            str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        )
        raise SqueezeError(
            f"{subject.name}: doesn't run in onnxruntime: {reason}"
        ) from error


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
    made = _session(subject, optimize=True)
    for batch in data:
        outputs = _running(subject, partial(made.run, None, batch.inputs))
        yield _top(subject, outputs, len(batch)), batch.labels


def _top(subject: Subject, outputs: list[np.ndarray], count: int) -> np.ndarray:
    """Classes from the first output that holds a score per class."""
    for scores in outputs:
        if isinstance(scores, np.ndarray) and scores.dtype.kind == "f":
            flat = scores.reshape(len(scores), -1) if scores.ndim else scores
            if scores.ndim >= 2 and len(flat) == count and flat.shape[1] > 1:
                if not np.isfinite(flat).all():
                    raise SqueezeError(f"{subject.name}: NaN or Inf in its outputs")
                return np.asarray(flat.argmax(1))
    raise SqueezeError(
        f"{subject.name}: no output holds class scores (samples, classes)"
    )
