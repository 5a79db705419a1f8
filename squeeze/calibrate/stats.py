"""Statistics of activations, gathered inside onnxruntime.

A copy of the graph is extended and run over the data in batches: sums over all
positions come out summed, of everything else only rows at sampled positions. Memory
does not grow with the data, sums are float64 between batches. Everything here is a
sum, so that shards and waves can be added.

Rows for Gram matrices are taken at a few positions per sample: fewer where there are
many samples, as a matrix of D columns needs so many rows per column and no more. The
positions follow from the sample's bytes, so neither the order nor the batching of the
data matters.

    collector = Collector(model, shapes, {"conv1": Products((Columns("x", window=w),))})
    stats = collector.over(data)["conv1"]
    stats.mean, stats.covariance

With two models in one collector, columns of both can stand in one request: inputs from
a compressed network against targets from the original (Zhang et al. 2015, §3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from squeeze.calibrate.data import Batch, Data, fixed_batch
from squeeze.calibrate.extend import Extension, Rows, Sums, merged
from squeeze.calibrate.gram import add_product, complete
from squeeze.calibrate.linear import Layout, Linear, linear_columns
from squeeze.calibrate.marks import marks, uniform
from squeeze.calibrate.wanted import Columns, Moments, Products, Wanted, Window
from squeeze.errors import SqueezeError
from squeeze.shapes import Shapes

__all__ = [
    "Collector",
    "Columns",
    "Moments",
    "Products",
    "Sample",
    "Stats",
    "Wanted",
    "Window",
    "gather",
]

Array = np.ndarray
Progress = Callable[[int, int], None]  # samples done, samples in all
POSITIONS = 10  # rows per sample at most: enough beside 500 samples
ENOUGH = 16  # rows per column: least squares lose a sixteenth of the error to chance
FEWEST = 8192  # rows of a narrow matrix: errors are judged by them as well
CHUNK = 2048  # rows whose products are summed in float32
ROUNDING = 4 * float(np.finfo(np.float32).eps)


# -- what is gathered ---------------------------------------------------------------


@dataclass(frozen=True)
class Stats:
    """Sums over rows, in float64, by kind: "sum", "square", "positive", "product".

    `count` rows; all sums are (D,) but "product" (D, D). Shards add up with `+`.
    `sample` holds some of the rows themselves, where they were asked for.
    """

    count: int
    sums: Mapping[str, Array]
    sample: Sample | None = None

    def __add__(self, other: Stats) -> Stats:
        if self.sums.keys() != other.sums.keys():
            raise ValueError(f"kinds differ: {set(self.sums)} and {set(other.sums)}")
        added = {kind: self.sums[kind] + other.sums[kind] for kind in self.sums}
        sample = self.sample + other.sample if self.sample and other.sample else None
        return Stats(self.count + other.count, added, sample)

    @property
    def mean(self) -> Array:
        """(D,) mean of every column."""
        return np.asarray(self.sums["sum"] / max(self.count, 1))

    @property
    def variance(self) -> Array:
        """(D,) population variance of every column."""
        if "product" in self.sums:
            raw = np.diagonal(self.sums["product"]) / max(self.count, 1)
        else:
            raw = self.sums["square"] / max(self.count, 1)
        return np.asarray(np.maximum(raw - self.mean**2, 0))

    @property
    def covariance(self) -> Array:
        """(D, D) population covariance; exactly 0 for columns that never vary.

        Rounding leaves about `ROUNDING` of a constant's square as its variance, and
        least squares would take what is left of several for something to go by.
        """
        mean = self.mean
        raw = self.sums["product"] / max(self.count, 1)
        found = np.asarray(raw - np.outer(mean, mean))
        still = np.diagonal(found) <= ROUNDING * mean**2
        found[still] = found[:, still] = 0
        return found

    @property
    def positive(self) -> Array:
        """(D,) how many rows (sample × position) are above zero."""
        return np.asarray(self.sums["positive"])

    def columns(self, picked: Array | slice) -> Stats:
        """The statistics of some columns alone."""
        index = np.arange(len(self.sums["sum"]))[picked]
        taken = {
            kind: array[np.ix_(index, index)] if kind == "product" else array[index]
            for kind, array in self.sums.items()
        }
        return Stats(self.count, taken, self.sample and self.sample.columns(index))


@dataclass(frozen=True)
class Sample:
    """Rows (S, P, D) of the samples with the smallest keys, `limit` samples at most.

    Keys follow from the data, so any order and any sharding keep the same samples.
    """

    keys: Array
    rows: Array
    limit: int

    def __add__(self, other: Sample) -> Sample:
        return self.joined([self, other])

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        """What one pass over all their data would have kept."""
        keys = np.concatenate([p.keys for p in parts])
        rows = np.concatenate([p.rows for p in parts])
        kept = np.argsort(keys, kind="stable")[: parts[0].limit]
        return cls(keys[kept], rows[kept], parts[0].limit)

    def columns(self, index: Array) -> Sample:
        return Sample(self.keys, self.rows[:, :, index], self.limit)

    @property
    def matrix(self) -> Array:
        """(S · P, D)."""
        return np.asarray(self.rows.reshape(-1, self.rows.shape[-1]))


def gather(
    model: ir.Model,
    shapes: Shapes,
    data: Data,
    wanted: Mapping[str, Wanted],
    *,
    positions: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Stats]:
    """Statistics of one model over the data, by the names in `wanted`.

    Rows at `positions` of every sample, or at as many as their matrix needs.
    """
    collector = Collector(
        model,
        shapes,
        wanted,
        samples=len(data) if positions is None else None,
        positions=positions or POSITIONS,
        seed=seed,
    )
    return collector.over(data, progress)


def rows_per_sample(width: int, samples: int) -> int:
    """Positions to sample for a Gram matrix of `width` columns."""
    enough = max(ENOUGH * width, FEWEST)
    return max(1, min(POSITIONS, -(-enough // max(samples, 1))))


class Collector:
    """A graph extended by reductions, ready to run over data.

    Rows are taken at `positions` of a sample at most, and at fewer where `samples`,
    all that there will be in all passes and shards that are added up, need no more.
    Raises SqueezeError where the model does not run here.
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        wanted: Mapping[str, Wanted],
        *,
        others: Sequence[tuple[ir.Model, Shapes]] = (),
        samples: int | None = None,
        positions: int = POSITIONS,
        seed: int = 0,
    ) -> None:
        self._seed = seed
        self._batch = fixed_batch(model)
        parts = [(model, shapes), *others]
        extension = Extension(merged([m for m, _ in parts]), [s for _, s in parts])

        def taken(width: int) -> int:
            needed = positions if samples is None else rows_per_sample(width, samples)
            return min(positions, needed)

        self._plans = {
            key: _plan(key, one, extension, taken) for key, one in wanted.items()
        }
        self._session: Any = None
        self._inputs: set[str] = set()
        if wanted:
            alone = not any(isinstance(one, Products) for one in wanted.values())
            self._session = _session(extension.finish(), spin=alone)
            self._inputs = {i.name for i in self._session.get_inputs()}
        self._feeds = [f for f in extension.feeds.values() if f.name in self._inputs]
        self._marked = any(plan.marked for plan in self._plans.values())

    def over(self, data: Data, progress: Progress | None = None) -> dict[str, Stats]:
        """Run the data through and return the sums over it."""
        if self._session is None:
            return {}
        outputs = [o.name for o in self._session.get_outputs()]
        sums = {key: plan.start() for key, plan in self._plans.items()}
        count = 0
        for batch in data:
            if self._batch and len(batch) != self._batch:
                continue  # the model's batch is fixed; the last samples don't fill one
            one = self._run(batch, outputs)
            for adder in sums.values():
                adder.add(one)
            count += len(batch)
            if progress is not None:
                progress(count, len(data))
        if count == 0:
            raise SqueezeError(
                f"{data.name}: no full batch of samples to gather statistics from"
            )
        return {key: _finite(key, one.stats(), data.name) for key, one in sums.items()}

    def _run(self, batch: Batch, outputs: Sequence[str]) -> _Ran:
        feeds = {k: v for k, v in batch.inputs.items() if k in self._inputs}
        marked = marks(batch, self._seed) if self._marked else None
        inside: dict[str, Array | None] = {}
        if marked is not None and self._feeds:
            drawn = uniform(marked, max(feed.taken for feed in self._feeds))
            for feed in self._feeds:
                feeds[feed.name], inside[feed.name] = feed.index(drawn)
        with _running():
            arrays = self._session.run(outputs, feeds)
        named = dict(zip(outputs, arrays, strict=True))
        return _Ran(len(batch), named, inside, marked)


def _finite(key: str, stats: Stats, name: str) -> Stats:
    if not all(np.isfinite(array).all() for array in stats.sums.values()):
        raise SqueezeError(
            f"{name}: activations at {key!r} are NaN or Inf on this data; "
            "look at its scale and normalisation"
        )
    return stats


# -- adding up ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Ran:
    """What a batch of `count` samples gave.

    Outputs by name; by feed, which of its taps are inside; marks, if any plan asks.
    """

    count: int
    outputs: Mapping[str, Array]
    inside: Mapping[str, Array | None]
    marked: Array | None


class _Adder(Protocol):
    """Sums of one request over the batches of one pass."""

    def add(self, ran: _Ran) -> None: ...

    def stats(self) -> Stats: ...


class _Plan(Protocol):
    """A request whose outputs are in the graph; `marked`: it needs samples' marks."""

    @property
    def marked(self) -> bool: ...

    def start(self) -> _Adder: ...


def _plan(
    key: str, wanted: Wanted, extension: Extension, taken: Callable[[int], int]
) -> _Plan:
    """`taken`: rows per sample for so many columns."""
    if isinstance(wanted, Moments):
        return _MomentsPlan(extension.sums(wanted), extension.rows_per_sample(wanted))
    grids = {extension.grid(c) for c in wanted.columns}
    if len(grids) != 1:
        raise ValueError(f"{key}: columns with different positions {sorted(grids)}")
    width = sum(extension.width(c) for c in wanted.columns)
    linear = linear_columns(wanted.columns, extension.parts[1])
    rows, parts = list[Rows](), list[slice | Linear]()
    for index, columns in enumerate(wanted.columns):
        if index in linear:
            parts.append(linear[index])
            continue
        start = sum(one.width for one in rows)
        rows.append(extension.rows(columns, taken(width)))
        parts.append(slice(start, start + rows[-1].width))
    return _RowsPlan(tuple(rows), Layout(tuple(parts)), wanted.keep)


@dataclass(frozen=True)
class _MomentsPlan:
    kinds: Mapping[str, Sums]
    rows: int
    marked: bool = False

    def start(self) -> _Adder:
        return _MomentsSum(self)


class _MomentsSum:
    def __init__(self, plan: _MomentsPlan) -> None:
        self.plan, self.count = plan, 0
        self.totals = {k: np.zeros(s.channels) for k, s in plan.kinds.items()}

    def add(self, ran: _Ran) -> None:
        for kind, sums in self.plan.kinds.items():
            self.totals[kind] += sums.of(ran.outputs[sums.output])
        self.count += self.plan.rows * ran.count

    def stats(self) -> Stats:
        return Stats(self.count, self.totals)


@dataclass(frozen=True)
class _RowsPlan:
    parts: tuple[Rows, ...]
    layout: Layout
    keep: int

    @property
    def width(self) -> int:
        return sum(p.width for p in self.parts)

    @property
    def marked(self) -> bool:
        return self.keep > 0 or any(p.feed for p in self.parts)

    @property
    def order(self) -> Array:
        """Columns as they are wanted, (C, *kernel), among those that come, (K, C)."""
        starts = np.cumsum([0, *(p.width for p in self.parts)])
        found = [
            start + np.arange(p.width).reshape(p.taps, p.channels).T.reshape(-1)
            for start, p in zip(starts, self.parts, strict=False)
        ]
        return np.concatenate(found)

    def start(self) -> _Adder:
        return _RowsSum(self)


class _RowsSum:
    """The Gram matrix: float32 over `CHUNK` rows, float64 between them.

    Sums of columns are float32 over a batch's rows.

    Rows are taken relative to the mean of the first batch's, so that a mean far from
    zero costs no digits.
    """

    def __init__(self, plan: _RowsPlan) -> None:
        self.plan, self.count, self.filled = plan, 0, 0
        width = plan.width
        self.chunk = np.empty((0, width), np.float32)
        self.shift: Array | None = None
        self.sum, self.product = np.zeros(width), np.zeros((width, width))
        self.kept: list[Sample] = []

    def add(self, ran: _Ran) -> None:
        rows = self._room(ran.count * self.plan.parts[0].taken)
        with np.errstate(invalid="ignore"):  # Inf is told of by its sums
            if self.shift is None:
                self._fill(rows, ran, np.zeros(self.plan.width, np.float32))
                self.shift = rows.mean(0)
            self._fill(rows, ran, self.shift)
            self.sum += rows.sum(0)
        if self.plan.keep and ran.marked is not None:
            self._keep(ran.marked, rows + self.shift)

    def _fill(self, rows: Array, ran: _Ran, shift: Array) -> None:
        """What the batch gave, less `shift`; taps that are not inside are 0."""
        start = 0
        for part in self.plan.parts:
            columns = slice(start, start := start + part.width)
            shape = (len(rows), part.taps, part.channels)
            into = rows[:, columns].reshape(shape)
            origin = shift[columns].reshape(shape[1:])
            mask = ran.inside.get(part.feed)
            np.subtract(ran.outputs[part.output].reshape(shape), origin, out=into)
            if mask is not None:
                row, tap = np.nonzero(~mask.reshape(shape[:2]))
                into[row, tap] = -origin[tap]

    def _room(self, count: int) -> Array:
        """The chunk's next rows, to be filled in."""
        if self.filled + count > len(self.chunk):
            self._flush()
            if len(self.chunk) < count:
                size = max(count, CHUNK)
                self.chunk = np.empty((size, self.plan.width), np.float32)
        self.filled += count
        return self.chunk[self.filled - count : self.filled]

    def _flush(self) -> None:
        if not self.filled:
            return
        rows = self.chunk[: self.filled]
        add_product(rows, self.product)
        self.count += self.filled
        self.filled = 0

    def _keep(self, keys: Array, rows: Array) -> None:
        shaped = rows.reshape(len(keys), -1, self.plan.width)
        self.kept.append(Sample(keys, shaped, self.plan.keep))
        if sum(len(s.keys) for s in self.kept) > 2 * self.plan.keep:
            self.kept = [Sample.joined(self.kept)]

    def stats(self) -> Stats:
        self._flush()
        order = self.plan.order
        shift = self.shift if self.shift is not None else np.zeros(len(order))
        shift = shift.astype(np.float64)
        complete(self.product, shift, self.sum + self.count / 2 * shift)
        total = (self.sum + self.count * shift)[order]
        product = self.product[np.ix_(order, order)]
        sample = Sample.joined(self.kept).columns(order) if self.kept else None
        return _complete(
            self.plan.layout,
            Stats(self.count, {"sum": total, "product": product}, sample),
        )


def _complete(layout: Layout, known: Stats) -> Stats:
    """With the columns that follow from those that were taken."""
    if layout.plain:
        return known
    total, product = known.sums["sum"], known.sums["product"]
    sums = {
        "sum": layout.sums(known.count, total),
        "product": layout.products(known.count, total, product),
    }
    sample = known.sample
    if sample is not None:
        rows = layout.rows(sample.matrix).reshape(*sample.rows.shape[:2], -1)
        sample = Sample(sample.keys, rows, sample.limit)
    return Stats(known.count, sums, sample)


def _session(model: ir.Model, spin: bool) -> Any:
    """`spin` where no other session takes turns with it."""
    from squeeze import session

    with _running():
        return session.of(model, spin=spin)


@contextmanager
def _running() -> Iterator[None]:
    """What onnxruntime can't make or run, told as that: it raises many kinds."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SqueezeError(
            f"statistics can't be gathered, the model does not run here: {first}; "
            "leave --data out to go by the weights alone"
        ) from error
