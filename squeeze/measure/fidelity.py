"""How close one model's outputs stay to another's, on the same inputs.

Outputs are compared batch by batch: memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from squeeze import session
from squeeze.calibrate.data import Batch, Data
from squeeze.errors import SqueezeError
from squeeze.measure.inputs import random_feeds
from squeeze.measure.statistics import paired_difference
from squeeze.session import Session
from squeeze.shapes import Shapes

Array = np.ndarray
RANDOM_BATCHES = 16


@dataclass(frozen=True)
class Fidelity:
    """Outputs of two models on the same inputs that nothing was fitted to.

    `relative_error` is ‖new − base‖ / ‖base‖ over all outputs; agreement is of the
    top class where an output holds class scores; accuracies need labels.
    """

    samples: int
    split: str
    relative_error: float
    max_abs_error: float
    agreement: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None


@dataclass(frozen=True)
class Output:
    """One output of both models, compared element by element.

    `nonfinite_base` and `nonfinite_new` count NaN and Inf; where there are any, the
    errors are None: such outputs are never called similar. `snr_db` is None where
    the outputs are equal. Agreements are None unless it holds class scores.
    """

    name: str
    elements: int
    nonfinite_base: int
    nonfinite_new: int
    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    cosine: float | None
    snr_db: float | None
    top1: float | None
    top5: float | None

    @property
    def equal(self) -> bool:
        return self.max_abs == 0

    @property
    def finite(self) -> bool:
        return not (self.nonfinite_base or self.nonfinite_new)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of both on labelled samples; the difference is paired.

    `low` and `high` bound new − base at 95 %.
    """

    samples: int
    base: float
    new: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """All outputs of two models on `samples` samples of what `source` says."""

    source: str
    samples: int
    outputs: tuple[Output, ...]
    accuracy: Accuracy | None
    squared_error: float
    squared_base: float
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """‖new − base‖ / ‖base‖ over all outputs; NaN where one isn't finite."""
        if not all(output.finite for output in self.outputs):
            return float("nan")
        return _relative(self.squared_error, self.squared_base)


def summary(found: Comparison, split: str | None = None) -> Fidelity:
    """The few figures that a rewrite reports."""
    worst = [o.max_abs if o.max_abs is not None else np.nan for o in found.outputs]
    tops = [o.top1 for o in found.outputs if o.top1 is not None]
    return Fidelity(
        samples=found.samples,
        split=split or found.source,
        relative_error=found.relative_error,
        max_abs_error=float(np.max(worst)) if worst else 0.0,
        agreement=min(tops) if tops else None,
        accuracy_before=found.accuracy.base if found.accuracy else None,
        accuracy_after=found.accuracy.new if found.accuracy else None,
    )


def held_out(data: Data, split: str) -> Callable[[Path, Path], Fidelity]:
    """What `rewrite.run.run` calls with the model as given and as rewritten."""
    return lambda base, new: summary(compare_outputs(base, new, data), split)


def compare_outputs(
    base: Path,
    new: Path,
    data: Data | None = None,
    *,
    shapes: Shapes | None = None,
    seed: int = 0,
    batches: int = RANDOM_BATCHES,
    progress: Callable[[float], None] | None = None,
) -> Comparison:
    """Run both models on the same batches and compare every output.

    Without data, `batches` random ones of `shapes.inputs` are drawn by `seed`.
    Raises SqueezeError where inputs or outputs differ, or a model doesn't run.
    """
    models = Pair(base, new)
    if data is None:
        if shapes is None:
            raise SqueezeError("neither data nor shapes to make inputs up from")
        source = f"random inputs, seed {seed}"
        stream: Iterable[Batch] = _random_batches(models.base, shapes, seed, batches)
        total = batches
    else:
        source, stream = data.name, data
        total = -(-len(data) // data.batch_size)
    tallies = [_Tally(name) for name in models.outputs]
    hits = _Hits()
    samples = 0
    for index, batch in enumerate(stream):
        samples += len(batch) if _has_samples(batch) else 1
        pairs = models.run(batch.inputs)
        for tally, (before, after) in zip(tallies, pairs, strict=True):
            tally.add(before, after)
        if batch.labels is not None:
            hits.add(pairs, batch.labels)
        if progress is not None:
            progress((index + 1) / total)
    return Comparison(
        source,
        samples,
        tuple(tally.result() for tally in tallies),
        hits.result(),
        sum(tally.squared_error for tally in tallies),
        sum(tally.squared_base for tally in tallies),
        tuple(models.notes),
    )


def _has_samples(batch: Batch) -> bool:
    return bool(batch.inputs) and next(iter(batch.inputs.values())).ndim > 0


def _random_batches(
    runner: Session, shapes: Shapes, seed: int, count: int
) -> Iterator[Batch]:
    for index in range(count):
        yield Batch(random_feeds(runner, shapes.inputs, seed + index), None)


def _relative(squared_error: float, squared_base: float) -> float:
    if squared_error == 0:
        return 0.0
    return float(np.sqrt(squared_error / squared_base)) if squared_base else np.inf


# -- two models as one --------------------------------------------------------------


class Pair:
    """Two models with the same inputs and outputs, matched by name.

    With one input or output each, names may differ.
    """

    def __init__(self, base: Path, new: Path) -> None:
        self.paths = (base, new)
        self.base, self.new = (session.open_model(p) for p in self.paths)
        self.notes: list[str] = []
        self.inputs = self._matched("inputs")
        matched = self._matched("outputs")
        self.outputs = [name for name in matched if self._is_tensor(name)]
        if not self.outputs:
            raise SqueezeError(f"{base}: has no tensor outputs that could be compared")
        self._fetch_new = [matched[name] for name in self.outputs]

    def _matched(self, what: str) -> dict[str, str]:
        """Names in the base → names in the new model."""
        base, new = (getattr(s, f"get_{what}")() for s in (self.base, self.new))
        if len(base) == len(new) == 1:
            pairs = [(base[0], new[0])]
        else:
            theirs = {v.name: v for v in new}
            pairs = [(v, theirs[v.name]) for v in base if v.name in theirs]
            if len(pairs) != len(base) or len(pairs) != len(new):
                raise SqueezeError(
                    f"the models have different {what}: {_names(base)} in "
                    f"{self.paths[0]}, {_names(new)} in {self.paths[1]}"
                )
        for mine, other in pairs:
            if mine.type != other.type or not _compatible(mine.shape, other.shape):
                raise SqueezeError(
                    f"the models' {what} {mine.name!r} differ: {_described(mine)} in "
                    f"{self.paths[0]}, {_described(other)} in {self.paths[1]}"
                )
        return {mine.name: other.name for mine, other in pairs}

    def _is_tensor(self, name: str) -> bool:
        kind = next(v.type for v in self.base.get_outputs() if v.name == name)
        if kind.startswith("tensor(") and kind != "tensor(string)":
            return True
        self.notes.append(f"output {name!r} is {kind}: not compared")
        return False

    def run(self, feeds: dict[str, Array]) -> list[tuple[Array, Array]]:
        """Outputs of both, in the base's order."""
        theirs = {self.inputs[name]: array for name, array in feeds.items()}
        before = _fetch(self.base, self.outputs, feeds, self.paths[0])
        after = _fetch(self.new, self._fetch_new, theirs, self.paths[1])
        pairs = list(zip(before, after, strict=True))
        for name, (a, b) in zip(self.outputs, pairs, strict=True):
            if a.shape != b.shape:
                raise SqueezeError(
                    f"output {name!r} has shape {list(a.shape)} in {self.paths[0]} and "
                    f"{list(b.shape)} in {self.paths[1]}: they can't be compared"
                )
        return pairs


def _fetch(
    runner: Session, names: Sequence[str], feeds: dict[str, Array], path: Path
) -> list[Array]:
    try:
        return [np.asarray(a) for a in runner.run(list(names), feeds)]
    except Exception as error:  # onnxruntime raises many kinds
        raise session.failed(error, path, runner) from error


def _names(values: Sequence[Any]) -> str:
    return ", ".join(v.name for v in values) or "none"


def _described(value: Any) -> str:
    dims = ", ".join("?" if d is None else str(d) for d in value.shape or ())
    return f"{value.type.removeprefix('tensor(').removesuffix(')')} [{dims}]"


def _compatible(one: Sequence[Any] | None, other: Sequence[Any] | None) -> bool:
    """Whether two shapes can be the same; symbols stand for anything."""
    if not one or not other:
        return True
    return len(one) == len(other) and all(
        a == b or not isinstance(a, int) or not isinstance(b, int)
        for a, b in zip(one, other, strict=True)
    )


# -- sums over batches --------------------------------------------------------------


@dataclass
class _Tally:
    """Running sums for one output, in float64."""

    name: str
    elements: int = 0
    bad_base: int = 0
    bad_new: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    squared_error: float = 0.0
    squared_base: float = 0.0
    squared_new: float = 0.0
    product: float = 0.0
    scored: int = 0
    same_top: int = 0
    in_top5: int = 0
    classes: int = field(default=0)

    def add(self, before: Array, after: Array) -> None:
        self.elements += before.size
        if is_scores(before):
            self._rank(before, after)
        a = before.astype(np.float64).ravel()
        b = after.astype(np.float64).ravel()
        bad = [int(a.size - np.isfinite(a).sum()), int(b.size - np.isfinite(b).sum())]
        self.bad_base, self.bad_new = self.bad_base + bad[0], self.bad_new + bad[1]
        if any(bad) or not a.size:
            return
        error = np.abs(b - a)
        self.max_abs = max(self.max_abs, float(error.max()))
        self.sum_abs += float(error.sum())
        self.squared_error += float(error @ error)
        self.squared_base += float(a @ a)
        self.squared_new += float(b @ b)
        self.product += float(a @ b)

    def _rank(self, before: Array, after: Array) -> None:
        a, b = scores(before), scores(after)
        self.classes = a.shape[1]
        self.scored += len(a)
        top = a.argmax(1)
        self.same_top += int((top == b.argmax(1)).sum())
        if self.classes > 5:
            five = np.argpartition(-b, 4, axis=1)[:, :5]
            self.in_top5 += int((five == top[:, None]).any(1).sum())

    def result(self) -> Output:
        finite = not (self.bad_base or self.bad_new)
        ranked = finite and self.scored > 0
        return Output(
            name=self.name,
            elements=self.elements,
            nonfinite_base=self.bad_base,
            nonfinite_new=self.bad_new,
            max_abs=self.max_abs if finite else None,
            mean_abs=self.sum_abs / max(self.elements, 1) if finite else None,
            relative=_relative(self.squared_error, self.squared_base)
            if finite
            else None,
            cosine=self._cosine() if finite else None,
            snr_db=self._snr() if finite else None,
            top1=self.same_top / self.scored if ranked else None,
            top5=self.in_top5 / self.scored if ranked and self.classes > 5 else None,
        )

    def _cosine(self) -> float | None:
        norms = (self.squared_base * self.squared_new) ** 0.5
        return self.product / norms if norms else None

    def _snr(self) -> float | None:
        if not self.squared_error or not self.squared_base:
            return None
        return float(10 * np.log10(self.squared_base / self.squared_error))


def is_scores(output: Array) -> bool:
    """Whether it looks like class scores: floats, (n, classes) but for ones behind."""
    return (
        output.ndim >= 2
        and output.shape[1] > 1
        and output.dtype.kind in "fV"
        and output[:1].size == output.shape[1]
    )


def scores(output: Array) -> Array:
    """Class scores as (n, classes) floats."""
    flat = output.reshape(len(output), -1)
    return flat if flat.dtype.kind == "f" else flat.astype(np.float32)


@dataclass
class _Hits:
    """Right answers of both on the same labelled samples."""

    count: int = 0
    base: int = 0
    new: int = 0
    only_base: int = 0
    only_new: int = 0

    def add(self, pairs: Sequence[tuple[Array, Array]], labels: Array) -> None:
        found = next(
            (p for p in pairs if is_scores(p[0]) and len(p[0]) == len(labels)), None
        )
        if found is None:
            return
        if labels.min() < 0 or labels.max() >= found[0].shape[1]:
            raise SqueezeError(
                f"labels from {labels.min()} to {labels.max()} don't fit an output of "
                f"{found[0].shape[1]} classes; pass data labelled for this model"
            )
        base, new = (scores(array).argmax(1) == labels for array in found)
        self.count += len(labels)
        self.base += int(base.sum())
        self.new += int(new.sum())
        self.only_base += int((base & ~new).sum())
        self.only_new += int((new & ~base).sum())

    def result(self) -> Accuracy | None:
        if not self.count:
            return None
        difference, low, high = paired_difference(
            self.only_base, self.only_new, self.count
        )
        rates = (self.base / self.count, self.new / self.count)
        return Accuracy(self.count, *rates, difference, low, high)
