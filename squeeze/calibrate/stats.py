"""Statistics of activations, reduced inside onnxruntime.

A copy of the graph is extended by the reductions and run over the data in batches:
no activation is copied out, memory does not grow with the data, sums are float64
between batches. Everything here is a sum, so that shards and waves can be added.

Rows for Gram matrices are taken at a few positions per sample. The positions follow
from the sample's bytes, so neither the order nor the batching of the data matters.

    collector = Collector(model, shapes, {"conv1": Products((Columns("x", window=w),))})
    stats = collector.over(data)["conv1"]
    stats.mean, stats.covariance

With two models in one collector, columns of both can stand in one request: inputs from
a compressed network against targets from the original (Zhang et al. 2015, §3.3).
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from squeeze import model as models
from squeeze.calibrate.data import Batch, Data, fixed_batch
from squeeze.errors import SqueezeError
from squeeze.shapes import Shapes

Array = np.ndarray
Progress = Callable[[int, int], None]  # samples done, samples in all
POSITIONS = 10  # rows per sample: enough beside 500 samples


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
        """(D, D) population covariance."""
        mean = self.mean
        raw = self.sums["product"] / max(self.count, 1)
        return np.asarray(raw - np.outer(mean, mean))

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
        keys = np.concatenate([self.keys, other.keys])
        rows = np.concatenate([self.rows, other.rows])
        kept = np.argsort(keys, kind="stable")[: self.limit]
        return Sample(keys[kept], rows[kept], self.limit)

    def columns(self, index: Array) -> Sample:
        return Sample(self.keys, self.rows[:, :, index], self.limit)

    @property
    def matrix(self) -> Array:
        """(S · P, D)."""
        return np.asarray(self.rows.reshape(-1, self.rows.shape[-1]))


@dataclass(frozen=True)
class Window:
    """What a convolution reads: per spatial axis; pads are (begins…, ends…)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, kernel: Sequence[int]) -> Window:
        """The window of a Conv node whose pads are explicit."""
        axes = len(kernel)
        ints = node.attributes.get_ints
        return cls(
            tuple(kernel),
            tuple(ints("strides", ()) or (1,) * axes),
            tuple(ints("pads", ()) or (0,) * (2 * axes)),
            tuple(ints("dilations", ()) or (1,) * axes),
        )

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Output size for a spatial input size."""
        axes = len(self.kernel)
        return tuple(
            (n + self.pads[a] + self.pads[a + axes] - self._reach(a)) // self.strides[a]
            + 1
            for a, n in enumerate(size)
        )

    def _reach(self, axis: int) -> int:
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1

    def taps(self, positions: Array, size: Sequence[int]) -> tuple[Array, Array]:
        """Flat input indices (…, K) that output `positions` read, and which are inside.

        A tap in the padding has index 0 and is not inside.
        """
        where = np.unravel_index(positions, self.grid(size))
        steps = np.unravel_index(np.arange(prod(self.kernel)), self.kernel)
        flat = np.zeros((*positions.shape, prod(self.kernel)), np.int64)
        inside = np.ones(flat.shape, bool)
        for axis, n in enumerate(size):
            at = where[axis][..., None] * self.strides[axis] - self.pads[axis]
            at = at + steps[axis] * self.dilations[axis]
            inside &= (at >= 0) & (at < n)
            flat = flat * n + at
        return np.where(inside, flat, 0), inside


@dataclass(frozen=True)
class Columns:
    """Columns of a row matrix: the channels of a value at a position.

    `axis` 1 is (N, C, *spatial), -1 is (…, C). With a `window` the columns are the
    im2col inputs (C, *kernel) of a convolution on the value, and positions are that
    convolution's outputs. `model` counts the collector's models.
    """

    value: str
    axis: int = 1
    window: Window | None = None
    model: int = 0


@dataclass(frozen=True)
class Products:
    """Wanted: sums and Gram matrix of columns side by side, at sampled positions.

    `keep` asks for the rows themselves as well, of that many samples at most.
    """

    columns: tuple[Columns, ...]
    keep: int = 0


@dataclass(frozen=True)
class Moments:
    """Wanted: per channel, over every position: sums of these kinds.

    "sum" · "square" · "positive" (how many are > 0).
    """

    value: str
    axis: int = 1
    kinds: tuple[str, ...] = ("sum", "square", "positive")
    model: int = 0


Wanted = Products | Moments


def gather(
    model: ir.Model,
    shapes: Shapes,
    data: Data,
    wanted: Mapping[str, Wanted],
    *,
    positions: int = POSITIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Stats]:
    """Statistics of one model over the data, by the names in `wanted`."""
    collector = Collector(model, shapes, wanted, positions=positions, seed=seed)
    return collector.over(data, progress)


class Collector:
    """A graph extended by reductions, ready to run over data.

    Raises SqueezeError where the model does not run here.
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        wanted: Mapping[str, Wanted],
        *,
        others: Sequence[tuple[ir.Model, Shapes]] = (),
        positions: int = POSITIONS,
        seed: int = 0,
    ) -> None:
        self._positions, self._seed = positions, seed
        self._batch = fixed_batch(model)
        parts = [(model, shapes), *others]
        builder = _Builder(
            _merged([m for m, _ in parts]), [s for _, s in parts], positions
        )
        self._plans = {name: builder.request(name, w) for name, w in wanted.items()}
        self._feeds = builder.feeds
        self._session: Any = None
        if wanted:
            self._session = _session(builder.finish())
        self._inputs: set[str] = set()
        if wanted:
            self._inputs = {i.name for i in self._session.get_inputs()}

    def over(self, data: Data, progress: Progress | None = None) -> dict[str, Stats]:
        """Run the data through and return the sums over it."""
        if self._session is None:
            return {}
        outputs = [o.name for o in self._session.get_outputs()]
        kept = {p.kept for p in self._plans.values()}
        totals: dict[str, Array] = {}
        samples: dict[str, Sample] = {}
        count = 0
        for batch in data:
            if self._batch and len(batch) != self._batch:
                continue  # the model's batch is fixed; the last samples don't fill one
            uniform = _uniform(batch, self._positions, self._seed)
            arrays = self._session.run(outputs, self._batch_feeds(batch, uniform))
            named = dict(zip(outputs, arrays, strict=True))
            for name in named.keys() - kept:
                if name in totals:
                    totals[name] += named[name]
                else:
                    totals[name] = named[name].astype(np.float64)
            self._keep(samples, named, uniform[:, 0])
            count += len(batch)
            if progress is not None:
                progress(count, len(data))
        return self._stats(count, totals, samples, data.name)

    def _keep(
        self, samples: dict[str, Sample], named: Mapping[str, Array], keys: Array
    ) -> None:
        for key, plan in self._plans.items():
            if plan.kept:
                rows = named[plan.kept].reshape(len(keys), plan.rows, -1)
                fresh = Sample(keys, rows, plan.limit)
                samples[key] = samples[key] + fresh if key in samples else fresh

    def _batch_feeds(self, batch: Batch, uniform: Array) -> dict[str, Array]:
        feeds: dict[str, Array] = dict(batch.inputs)
        for feed in self._feeds:
            feeds.update(feed.arrays(uniform))
        return {name: array for name, array in feeds.items() if name in self._inputs}

    def _stats(
        self,
        count: int,
        totals: Mapping[str, Array],
        samples: Mapping[str, Sample],
        name: str,
    ) -> dict[str, Stats]:
        if count == 0:
            raise SqueezeError(
                f"{name}: no full batch of samples to gather statistics from"
            )
        found: dict[str, Stats] = {}
        for key, plan in self._plans.items():
            sums = {kind: totals[output] for kind, output in plan.kinds.items()}
            if not all(np.isfinite(array).all() for array in sums.values()):
                raise SqueezeError(
                    f"{name}: activations at {key!r} are NaN or Inf on this data; "
                    "look at its scale and normalisation"
                )
            found[key] = Stats(plan.rows * count, sums, samples.get(key))
        return found


def _uniform(batch: Batch, positions: int, seed: int) -> Array:
    """(N, positions) numbers in [0, 1) that follow from each sample's bytes."""
    rows = []
    for index in range(len(batch)):
        mark = seed
        for name in sorted(batch.inputs):
            mark = zlib.crc32(batch.inputs[name][index].tobytes(), mark)
        rows.append(np.random.default_rng(mark).random(positions))
    return np.stack(rows)


@dataclass(frozen=True)
class _Plan:
    """What one request becomes: rows per sample, and the outputs that hold it."""

    rows: int
    kinds: Mapping[str, str]
    kept: str = ""
    limit: int = 0


# -- feeds: where the rows are taken ------------------------------------------------


@dataclass(frozen=True)
class _Feed:
    """Graph inputs that pick rows: flat indices, and a mask of the taps inside."""

    name: str
    grid: int  # positions there are per sample
    taken: int  # positions sampled of them
    stride: int  # elements (channels first) or rows (last) per sample
    window: Window | None = None
    size: tuple[int, ...] = ()

    def arrays(self, uniform: Array) -> dict[str, Array]:
        """Stratified positions: one in each of `taken` equal stretches of the grid."""
        cells = np.arange(self.taken) + uniform[:, : self.taken]
        positions = np.minimum(
            (cells * self.grid / self.taken).astype(np.int64), self.grid - 1
        )
        start = np.arange(len(uniform))[:, None] * self.stride
        if self.window is None:
            return {self.name: (positions + start)[:, :, None]}
        index, inside = self.window.taps(positions, self.size)
        return {
            self.name: index + start[:, :, None],
            f"{self.name}/inside": inside.astype(np.float32),
        }


# -- the extended graph -------------------------------------------------------------


def _merged(parts: Sequence[ir.Model]) -> tuple[ir.Model, list[dict[str, ir.Value]]]:
    """All parts in one model, from the same inputs; and values by name, per part."""
    base = parts[0].clone()
    base.meta.update(parts[0].meta)
    names = [_values(base.graph)]
    for number, part in enumerate(parts[1:], 1):
        other = part.clone().graph
        named = _values(other)
        names.append(named)
        for value in list(other.inputs):
            if value.name not in names[0]:
                raise ValueError(f"the models differ in input {value.name!r}")
            ir.convenience.replace_all_uses_with(value, names[0][value.name])
        nodes = list(other)
        other.outputs.clear()
        other.remove(nodes)
        weights = list(other.initializers.values())
        other.initializers.clear()
        for name, value in named.items():
            if value in other.inputs:
                named[name] = names[0][name]
            else:
                value.name = f"{name}/{number}"
        for node in nodes:
            node.name = f"{node.name}/{number}" if node.name else None
        for value in weights:
            base.graph.initializers.add(value)
        base.graph.extend(nodes)
    return base, names


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    values += [v for node in graph for v in node.outputs]
    return {v.name: v for v in values if v.name}


@dataclass
class _Builder:
    """Adds reductions to a merged graph; opset differences live in `reduce`."""

    merged: tuple[ir.Model, list[dict[str, ir.Value]]]
    shapes: list[Shapes]
    positions: int
    feeds: list[_Feed] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    made: dict[Any, Any] = field(default_factory=dict)  # equal parts are built once

    @property
    def graph(self) -> ir.Graph:
        return self.merged[0].graph

    def request(self, key: str, wanted: Wanted) -> _Plan:
        """Add what a request needs to the graph."""
        if isinstance(wanted, Moments):
            return self._moments(wanted)
        grids = {self._grid(c) for c in wanted.columns}
        if len(grids) != 1:
            raise ValueError(f"{key}: columns with different positions {sorted(grids)}")
        matrix = self._once(wanted.columns, partial(self._matrix, wanted.columns))
        kinds = {
            "sum": self.reduce("ReduceSum", matrix, [0]),
            "product": self.add("Gemm", [matrix, matrix], transA=1),
        }
        rows = min(grids.pop(), self.positions)
        kept = self._emit({"rows": matrix})["rows"] if wanted.keep else ""
        return _Plan(rows, self._emit(kinds), kept, wanted.keep)

    def _matrix(self, columns: tuple[Columns, ...]) -> ir.Value:
        parts = [self._rows(c) for c in columns]
        if len(parts) == 1:
            return self.add("Identity", parts)
        return self.add("Concat", parts, axis=1)

    def _emit(self, kinds: Mapping[str, ir.Value]) -> dict[str, str]:
        for value in kinds.values():
            if value not in self.outputs:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                self.outputs.append(value)
        return {kind: value.name or "" for kind, value in kinds.items()}

    # moments

    def _moments(self, wanted: Moments) -> _Plan:
        shape = self._shape(wanted.value, wanted.model)
        axis = wanted.axis % len(shape)
        axes = [a for a in range(len(shape)) if a != axis]
        value = self._float(wanted.value, wanted.model)
        kinds: dict[str, ir.Value] = {}
        for kind in wanted.kinds:
            make = partial(self._sum, kind, value, axes)
            kinds[kind] = self._once((kind, value, axis), make)
        rows = prod(shape) // shape[axis] // self._samples()
        return _Plan(rows, self._emit(kinds))

    def _sum(self, kind: str, value: ir.Value, axes: list[int]) -> ir.Value:
        if kind == "positive":
            above = self.add("Greater", [value, self.constant(np.float32(0))])
            value = self.add("Cast", [above], to=ir.DataType.FLOAT.value)
        op = "ReduceSumSquare" if kind == "square" else "ReduceSum"
        return self.reduce(op, value, axes)

    # rows

    def _grid(self, columns: Columns) -> int:
        shape = self._shape(columns.value, columns.model)
        if columns.axis == 1 and len(shape) > 2:
            size = shape[2:]
            return prod(columns.window.grid(size) if columns.window else size)
        return prod(shape[:-1]) // self._samples()

    def _rows(self, columns: Columns) -> ir.Value:
        return self._once(columns, lambda: self._make_rows(columns))

    def _make_rows(self, columns: Columns) -> ir.Value:
        shape = self._shape(columns.value, columns.model)
        grid = self._grid(columns)
        taken = min(grid, self.positions)
        if columns.axis == 1 and len(shape) > 2:
            return self._window_rows(columns, shape, grid, taken)
        value = self._value(columns.value, columns.model)
        flat = self.add("Reshape", [value, self.constant(np.array([-1, shape[-1]]))])
        if taken == grid:
            return self._cast(flat)
        index = self._index(_Feed(self._name("rows"), grid, taken, grid))
        picked = self.add("Gather", [flat, index], axis=0)
        return self._flat(self._cast(picked), shape[-1])

    def _window_rows(
        self, columns: Columns, shape: tuple[int, ...], grid: int, taken: int
    ) -> ir.Value:
        """Rows (C, *kernel) of a channels-first value, by one Gather over all of it."""
        channels, size = shape[1], shape[2:]
        window = columns.window
        name = self._name("taps")
        feed = _Feed(name, grid, taken, channels * prod(size), window, size)
        index = self._index(feed)  # (N, P, K)
        offsets = np.arange(channels)[:, None] * prod(size)
        index = self._unsqueezed(index, -1 if window is None else prod(window.kernel))
        index = self.add("Add", [index, self.constant(offsets)])  # (N, P, C, K)
        value = self._value(columns.value, columns.model)
        flat = self.add("Reshape", [value, self.constant(np.array([-1]))])
        picked = self._cast(self.add("Gather", [flat, index], axis=0))
        taps = 1
        if window is not None:
            taps = prod(window.kernel)
            inside = self._input(f"{name}/inside", ir.DataType.FLOAT, 3)
            picked = self.add("Mul", [picked, self._unsqueezed(inside, taps)])
        return self._flat(picked, channels * taps)

    def _unsqueezed(self, value: ir.Value, taps: int) -> ir.Value:
        """(N, P, K) → (N, P, 1, K), by a Reshape, which every opset writes the same."""
        shape = np.array([0, 0, 1, max(taps, 1)])
        return self.add("Reshape", [value, self.constant(shape)])

    def _flat(self, value: ir.Value, width: int) -> ir.Value:
        return self.add("Reshape", [value, self.constant(np.array([-1, width]))])

    def _index(self, feed: _Feed) -> ir.Value:
        self.feeds.append(feed)
        return self._input(feed.name, ir.DataType.INT64, 3)

    # small parts

    def _once(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self.made:
            self.made[key] = make()
        found = self.made[key]
        assert isinstance(found, ir.Value)
        return found

    def _name(self, stem: str) -> str:
        return f"squeeze/{stem}/{len(self.made)}/{len(self.feeds)}"

    def _samples(self) -> int:
        """The batch that shapes were inferred at."""
        return next(iter(self.shapes[0].inputs.values()))[0]

    def _shape(self, value: str, model: int) -> tuple[int, ...]:
        found = self.shapes[model].shapes.get(value)
        if not found:
            raise SqueezeError(
                f"the shape of {value!r} is unknown: no statistics; pass --input-shape"
            )
        return found

    def _value(self, name: str, model: int) -> ir.Value:
        return self.merged[1][model][name]

    def _float(self, name: str, model: int) -> ir.Value:
        value = self._value(name, model)
        dtype = self.shapes[model].types.get(name)
        if dtype == ir.DataType.FLOAT:
            return value
        return self._once(("float", value), lambda: self._cast(value))

    def _cast(self, value: ir.Value) -> ir.Value:
        return self.add("Cast", [value], to=ir.DataType.FLOAT.value)

    def _input(self, name: str, dtype: ir.DataType, rank: int) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape([f"{name}/{axis}" for axis in range(rank)]),
            type=ir.TensorType(dtype),
        )
        self.graph.inputs.append(value)
        return value

    def constant(self, array: Array | np.generic) -> ir.Value:
        array = np.asarray(array)
        array = array.astype(np.int64) if array.dtype.kind in "iu" else array
        name = f"squeeze/constant/{len(self.graph.initializers)}"
        return models.add_initializer(self.graph, ir.Tensor(array, name=name))

    def add(self, op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(op, list(inputs), attributes)
        self.graph.append(node)
        value = node.outputs[0]
        value.name = f"squeeze/{op}/{len(self.graph)}"
        return value

    def reduce(self, op: str, value: ir.Value, axes: list[int]) -> ir.Value:
        """Axes are an input since opset 13 (ReduceSum) or 18 (the others)."""
        since = 13 if op == "ReduceSum" else 18
        if models.opset(self.merged[0]) >= since:
            return self.add(op, [value, self.constant(np.array(axes))], keepdims=0)
        return self.add(op, [value], axes=axes, keepdims=0)

    def finish(self) -> ir.Model:
        """The graph with the sums as its only outputs, and nothing they don't need."""
        model = self.merged[0]
        model.graph.outputs.clear()
        model.graph.outputs.extend(self.outputs)
        passes.RemoveUnusedNodesPass()(model)
        return model


def _session(model: ir.Model) -> Any:
    from squeeze import session

    try:
        if models.proto_bytes(model) < models.INLINE_LIMIT:
            return session.create(ir.to_proto(model).SerializeToString())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "statistics.onnx"
            ir.save(model, path, external_data="statistics.data")
            return session.create(path)
    except Exception as error:  # onnxruntime raises many kinds
        first = str(error).strip().splitlines()[0]
        raise SqueezeError(
            f"statistics can't be gathered, the model does not run here: {first}"
        ) from error
