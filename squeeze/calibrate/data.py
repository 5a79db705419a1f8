"""Data sources (`--data`): streamed in batches, never held whole.

`.npz` files, folders of them or of images, ONNX `test_data_set_N` folders, and Python
generators all become one `Data`: samples with an index, read in any order. What
nothing is fitted to is split off by index (`split`).
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol
from zlib import crc32

import numpy as np
import onnx
import onnx_ir as ir

from squeeze.errors import SqueezeError, UsageError
from squeeze.shapes import Shapes

Array = np.ndarray
BATCH = 32
HELD_OUT = 2000  # samples at most: enough for half a point of accuracy
LABELS = ("labels", "label", "y")
IMAGES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".webp",
    ".ppm",
    ".pgm",
    ".gif",
    ".tif",
    ".tiff",
)


@dataclass(frozen=True)
class Batch:
    """Inputs by name, each (n, …), and integer labels (n,) where the data has them."""

    inputs: dict[str, Array]
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class InputSpec:
    """What a model asks of one input: its element type and static shape at batch 1."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """How image files become inputs: `[data]` of squeeze.toml.

    `size` is (height, width); `mean` and `std` are per channel on the 0–1 scale.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "nchw"


class Source(Protocol):
    """Samples that can be read by index, some at a time."""

    def __len__(self) -> int: ...

    def read(self, indices: Array) -> tuple[dict[str, Array], Array | None]: ...


@dataclass(frozen=True)
class Data:
    """Some samples of a source, in batches that fit a model's inputs."""

    name: str
    source: Source
    specs: tuple[InputSpec, ...]
    indices: Array
    batch_size: int = BATCH

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.indices), self.batch_size):
            picked = self.indices[start : start + self.batch_size]
            inputs, labels = self.source.read(picked)
            fitted = {s.name: _fit(self.name, s, inputs) for s in self.specs}
            yield Batch(fitted, None if labels is None else _labels(self.name, labels))

    def take(self, indices: Array) -> Data:
        """The samples at these positions of this data."""
        return Data(
            self.name, self.source, self.specs, self.indices[indices], self.batch_size
        )

    def sample(self, count: int, seed: int = 0) -> Data:
        """At most `count` samples drawn by seed, in their own order."""
        if count >= len(self):
            return self
        rng = np.random.default_rng(seed)
        return self.take(np.sort(rng.choice(len(self), count, replace=False)))


@dataclass(frozen=True)
class Split:
    """Calibration samples and held-out ones, and how they were told apart."""

    calibration: Data
    evaluation: Data
    described: str


def specs_of(model: ir.Model, shapes: Shapes) -> tuple[InputSpec, ...]:
    """What the model's inputs ask for."""
    specs = []
    for value in model.graph.inputs:
        dtype, shape = shapes.dtype(value), shapes.of(value)
        if dtype is None or shape is None:
            raise SqueezeError(
                f"input {value.name!r} is no tensor; --data can't feed it"
            )
        specs.append(InputSpec(value.name or "", dtype.numpy(), shape))
    return tuple(specs)


def fixed_batch(model: ir.Model) -> int | None:
    """The batch size that the model's inputs are fixed to, None where it is dynamic."""
    for value in model.graph.inputs:
        if (
            value.shape is not None
            and len(value.shape)
            and isinstance(value.shape[0], int)
        ):
            return int(value.shape[0])
    return None


def open_data(
    spec: str | Path | Mapping[str, Array],
    model: ir.Model,
    shapes: Shapes,
    images: Images | None = None,
) -> Data:
    """Open `--data`: a path, `python:module:function`, or arrays by input name.

    Raises UsageError if there is nothing at the path, SqueezeError if it doesn't fit.
    """
    specs = specs_of(model, shapes)
    if not specs:
        raise SqueezeError("the model has no inputs to feed data to")
    source = _open(spec, specs, images or Images())
    name = str(spec) if isinstance(spec, (str, Path)) else "data"
    if len(source) == 0:
        raise SqueezeError(f"{name}: holds no samples")
    batch = fixed_batch(model) or BATCH
    count = len(source) // batch * batch if fixed_batch(model) else len(source)
    if count == 0:
        raise SqueezeError(f"{name}: fewer samples than the model's batch of {batch}")
    return Data(name, source, specs, np.arange(count), batch)


def split(
    data: Data, samples: int = 512, seed: int = 0, evaluation: Data | None = None
) -> Split:
    """Calibration drawn by seed; evaluation is `--eval-data`, or what is held out."""
    if evaluation is not None:
        calibration = data.sample(samples, seed)
        text = f"{len(calibration)} of {len(data)} samples of {data.name} to fit, "
        return Split(calibration, evaluation, text + f"evaluated on {evaluation.name}")
    rest, evaluation = hold_out(data)
    calibration = rest.sample(samples, seed)
    text = f"{len(calibration)} samples of {data.name} to fit, "
    return Split(calibration, evaluation, text + f"its last {len(evaluation)} held out")


def hold_out(data: Data) -> tuple[Data, Data]:
    """All but the last fifth, and that: `HELD_OUT` samples at most.

    The same for fitting, training and measuring: what one of them holds out, no other
    has seen. Raises SqueezeError for fewer than five samples.
    """
    most = min(len(data) // 5, HELD_OUT)
    held = most // data.batch_size * data.batch_size or most
    if held == 0:
        raise SqueezeError(
            f"{data.name}: {len(data)} samples are too few to hold a fifth out; "
            "pass --eval-data"
        )
    order = np.arange(len(data))
    return data.take(order[:-held]), data.take(order[-held:])


# -- fitting samples to inputs ------------------------------------------------------


def _fit(name: str, spec: InputSpec, inputs: Mapping[str, Array]) -> Array:
    array = inputs[spec.name]
    if array.shape[1:] != spec.shape[1:]:
        raise SqueezeError(
            f"{name}: samples of shape {list(array.shape[1:])} don't fit input "
            f"{spec.name!r} {list(spec.shape[1:])}"
        )
    if np.dtype(array.dtype).kind not in "biufV" or array.dtype.kind == "c":
        raise SqueezeError(
            f"{name}: {array.dtype} data for input {spec.name!r} {spec.dtype}"
        )
    if array.dtype.kind == "f" and spec.dtype.kind in "iub":
        raise SqueezeError(
            f"{name}: {array.dtype} data for the {spec.dtype} input {spec.name!r}; "
            "convert it"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SqueezeError(f"{name}: NaN or Inf in the data for input {spec.name!r}")
    return np.ascontiguousarray(array, dtype=spec.dtype)


def _labels(name: str, labels: Array) -> Array:
    if labels.ndim == 2 and labels.shape[1] > 1:
        labels = labels.argmax(1)  # one-hot
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] != 1 or labels.dtype.kind not in "iub":
        raise SqueezeError(f"{name}: labels must be one integer class per sample")
    return labels[:, 0].astype(np.int64)


# -- sources ------------------------------------------------------------------------


def _open(
    spec: str | Path | Mapping[str, Array], specs: Sequence[InputSpec], images: Images
) -> Source:
    if isinstance(spec, Mapping):
        return _arrays(dict(spec), "data", specs)
    text = str(spec)
    if text.startswith("python:"):
        return Generated.call(text, specs)
    path = Path(text)
    if not path.exists():
        raise UsageError(f"--data {path}: no such file or folder")
    if path.is_file():
        if path.suffix != ".npz":
            raise UsageError(
                f"--data {path}: not .npz; see the README for what it may be"
            )
        return _archive(path, specs)
    return _folder(path, specs, images)


def _folder(path: Path, specs: Sequence[InputSpec], images: Images) -> Source:
    if sets := sorted(path.glob("test_data_set_*")):
        return TestSets(tuple(sets), tuple(specs))
    if archives := sorted(path.glob("*.npz")):
        return Joined(tuple(_archive(p, specs) for p in archives))
    files = sorted(
        (f for f in path.rglob("*") if f.suffix.lower() in IMAGES),
        key=lambda f: (crc32(str(f.relative_to(path)).encode()), str(f)),
    )  # in no order of classes, so that any part of them holds every class
    if not files:
        raise SqueezeError(
            f"--data {path}: no .npz files, images or test_data_set_N in it"
        )
    return ImageFolder(path, tuple(files), specs[0], images)


def _archive(path: Path, specs: Sequence[InputSpec]) -> Source:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {
                name: _member(path, archive, name) for name in archive
            }
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise SqueezeError(
            f"--data {path}: not a readable .npz archive: {error}"
        ) from error
    return _arrays(arrays, str(path), specs)


def _member(path: Path, archive: Any, name: str) -> Array:
    """An array of the archive: mapped in place where it is stored uncompressed."""
    with zipfile.ZipFile(path) as zipped:
        info = zipped.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.asarray(archive[name])
        with zipped.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(member)
            header = member.tell()
    if dtype.hasobject or 0 in shape:
        return np.asarray(archive[name])
    with path.open("rb") as raw:
        raw.seek(info.header_offset + 26)
        extra = int.from_bytes(raw.read(2), "little") + int.from_bytes(
            raw.read(2), "little"
        )
    offset = info.header_offset + 30 + extra + header
    order: Literal["F", "C"] = "F" if fortran else "C"
    mapped: Array = np.memmap(path, dtype, "r", offset, shape, order)
    return mapped


def _arrays(arrays: dict[str, Array], name: str, specs: Sequence[InputSpec]) -> Source:
    labels = next((arrays.pop(key) for key in LABELS if key in arrays), None)
    wanted = [s.name for s in specs]
    if len(specs) == 1 and wanted[0] not in arrays and "x" in arrays:
        arrays[wanted[0]] = arrays["x"]
    missing = [w for w in wanted if w not in arrays]
    if missing:
        raise SqueezeError(
            f"{name}: no array for input {missing[0]!r}; it has "
            f"{', '.join(arrays) or 'none'}; name arrays after the inputs, or one x"
        )
    inputs = {w: arrays[w] for w in wanted}
    lengths = {len(a) if a.ndim else 0 for a in inputs.values()}
    if labels is not None:
        lengths.add(len(labels) if labels.ndim else 0)
    if len(lengths) != 1:
        raise SqueezeError(
            f"{name}: the arrays have different lengths {sorted(lengths)}"
        )
    return Arrays(inputs, labels)


@dataclass(frozen=True)
class Arrays:
    """Arrays in memory or mapped, by input name."""

    inputs: dict[str, Array]
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def read(self, indices: Array) -> tuple[dict[str, Array], Array | None]:
        picked = {k: np.asarray(v[indices]) for k, v in self.inputs.items()}
        return picked, None if self.labels is None else np.asarray(self.labels[indices])


@dataclass(frozen=True)
class Joined:
    """Several sources, one after the other."""

    parts: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def read(self, indices: Array) -> tuple[dict[str, Array], Array | None]:
        starts = np.cumsum([0, *(len(p) for p in self.parts)])
        which = np.searchsorted(starts, indices, side="right") - 1
        found = [
            self.parts[w].read(indices[which == w] - starts[w])
            for w in np.unique(which)
        ]
        back = np.argsort(np.argsort(which, kind="stable"), kind="stable")
        inputs = {
            k: np.concatenate([f[0][k] for f in found])[back] for k in found[0][0]
        }
        labels = [f[1] for f in found if f[1] is not None]
        return inputs, np.concatenate(labels)[back] if len(labels) == len(
            found
        ) else None


@dataclass(frozen=True)
class TestSets:
    """ONNX's own: test_data_set_N folders with input_I.pb, each one batch."""

    __test__ = False
    folders: tuple[Path, ...]
    specs: tuple[InputSpec, ...]

    @cached_property
    def starts(self) -> Array:
        """Index of each folder's first sample, and the number of all."""
        lengths = [len(self._load(f)[self.specs[0].name]) for f in self.folders]
        return np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _load(self, folder: Path) -> dict[str, Array]:
        feeds = {}
        for index, spec in enumerate(self.specs):
            file = folder / f"input_{index}.pb"
            if not file.is_file():
                raise SqueezeError(f"--data {file}: missing, for input {spec.name!r}")
            try:
                feeds[spec.name] = onnx.numpy_helper.to_array(
                    onnx.load_tensor(str(file))
                )
            except Exception as error:  # protobuf's DecodeError, numpy's ValueError
                raise SqueezeError(f"--data {file}: not a tensor file") from error
        return feeds

    def read(self, indices: Array) -> tuple[dict[str, Array], Array | None]:
        which = np.searchsorted(self.starts, indices, side="right") - 1
        wanted = np.unique(which)
        parts = Joined(tuple(Arrays(self._load(self.folders[w]), None) for w in wanted))
        lengths = np.diff(self.starts)[wanted]
        before = np.cumsum([0, *lengths])[np.searchsorted(wanted, which)]
        return parts.read(indices - self.starts[which] + before)


@dataclass(frozen=True)
class ImageFolder:
    """Image files; class subfolders, by the order of their names, give the labels."""

    root: Path
    files: tuple[Path, ...]
    spec: InputSpec
    images: Images

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def classes(self) -> list[str]:
        if any(f.parent == self.root for f in self.files):
            return []
        return sorted({f.relative_to(self.root).parts[0] for f in self.files})

    def read(self, indices: Array) -> tuple[dict[str, Array], Array | None]:
        files = [self.files[i] for i in indices]
        array = np.stack([self._decode(f) for f in files])
        classes = self.classes
        labels = [
            classes.index(f.relative_to(self.root).parts[0]) for f in files if classes
        ]
        return {self.spec.name: array}, np.array(labels) if classes else None

    def _decode(self, file: Path) -> Array:
        try:
            from PIL import Image
        except ImportError as error:
            raise UsageError(
                "images need Pillow: pip install 'squeeze[images]'"
            ) from error
        last = self.images.layout == "nhwc"
        if len(self.spec.shape) != 4:
            raise SqueezeError(f"input {self.spec.name!r} is no image; pass .npz data")
        channels = self.spec.shape[3 if last else 1]
        height, width = (
            self.images.size or self.spec.shape[1:3]
            if last
            else (self.images.size or self.spec.shape[2:4])
        )
        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if channels == 1 else "RGB")
                image = image.resize((width, height), Image.Resampling.BILINEAR)
                array = np.asarray(image, np.float32).reshape(height, width, -1) / 255
        except OSError as error:
            raise SqueezeError(f"{file}: not a readable image") from error
        if self.images.mean:
            array = array - np.asarray(self.images.mean, np.float32)
        if self.images.std:
            array = array / np.asarray(self.images.std, np.float32)
        return array if last else array.transpose(2, 0, 1)


@dataclass(frozen=True)
class Generated:
    """`python:package.module:function`: a function that yields dicts of batches.

    It is called anew for every pass and read as a stream: memory holds one dict.
    """

    function: Callable[[], Iterator[Mapping[str, Array]]]
    name: str
    specs: tuple[InputSpec, ...]
    counts: tuple[int, ...] = field(default=())

    @classmethod
    def call(cls, text: str, specs: Sequence[InputSpec]) -> Generated:
        module, _, name = text.removeprefix("python:").rpartition(":")
        if not module:
            raise UsageError(f"--data {text}: write python:package.module:function")
        sys.path.insert(0, str(Path.cwd()))
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--data {text}: {error}") from error
        finally:
            sys.path.pop(0)
        made = cls(function, text, tuple(specs))
        counts = tuple(len(arrays) for arrays in made._stream())
        return cls(function, text, tuple(specs), counts)

    def _stream(self) -> Iterator[Arrays]:
        try:
            for item in self.function():
                arrays = {k: np.asarray(v) for k, v in item.items()}
                found = _arrays(arrays, self.name, self.specs)
                assert isinstance(found, Arrays)
                yield found
        except SqueezeError:
            raise
        except Exception as error:  # the user's code
            raise SqueezeError(
                f"--data {self.name}: {type(error).__name__}: {error}"
            ) from error

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, indices: Array) -> tuple[dict[str, Array], Array | None]:
        order = np.argsort(indices, kind="stable")
        wanted, start, parts = indices[order], 0, []
        for arrays in self._stream():
            inside = wanted[(wanted >= start) & (wanted < start + len(arrays))] - start
            start += len(arrays)
            if len(inside):
                parts.append(arrays.read(inside))
            if start > wanted[-1]:
                break
        back = np.argsort(order, kind="stable")
        inputs = {
            k: np.concatenate([p[0][k] for p in parts])[back] for k in parts[0][0]
        }
        labels = [p[1] for p in parts if p[1] is not None]
        return inputs, np.concatenate(labels)[back] if len(labels) == len(
            parts
        ) else None
