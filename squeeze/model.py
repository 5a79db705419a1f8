"""Models in and out of files: the only door.

`load` gives an `onnx_ir.Model` in one normal form: functions inlined, constants
lifted to initializers, no initializer among the inputs. Weights in external data
stay mapped and are read when something asks for their values.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from squeeze.errors import SqueezeError, UsageError

SOURCE = "squeeze.source"  # key of `Source` in Model.meta
INLINE_LIMIT = 2**31 - 2**20  # protobuf's limit, less some room for the structure
MAP_FROM = 2**27  # bytes of a file from which on its weights are mapped, not held
FOLD_LIMIT = 2**27  # most elements of a ConstantOfShape weight


@dataclass(frozen=True)
class Source:
    """Where a model came from; `mapped` is the file, where weights are read from it."""

    path: Path
    file_bytes: int
    external: bool
    mapped: mmap.mmap | None = field(default=None, compare=False, repr=False)

    def release_pages(self) -> None:
        """Give back the memory of weights read so far; they can be read again."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file of opset 9 or later.

    Raises UsageError if there is no such file, SqueezeError if it isn't a model.
    """
    path = Path(path)
    proto = _parse(path)
    if not proto.ir_version or not proto.HasField("graph"):
        raise SqueezeError(f"{path}: not an ONNX model (it has no graph)")
    opset = next(
        (o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0
    )
    if 0 < opset < 9:
        raise SqueezeError(
            f"{path}: opset {opset} is too old; convert it to 9 or later with "
            "onnx.version_converter.convert_version(model, 13)"
        )
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds
        raise SqueezeError(
            f"{path}: invalid ONNX model: {_root_cause(error)}"
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    _check_inline(model, path)
    del proto
    external = _external_files(model, path)
    mapped = _map_weights(model, path) if path.stat().st_size > MAP_FROM else None
    size = sum(f.stat().st_size for f in {path, *external})
    source = Source(path, size, bool(external), mapped)
    source.release_pages()  # the search for the weights has touched every page
    model.meta[SOURCE] = source
    return normalize(model)


def _check_inline(model: ir.Model, path: Path) -> None:
    """Every weight in the file holds as many elements as it claims."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.TensorProtoTensor) and not _is_whole(tensor):
                shape = "×".join(str(n) for n in tensor.shape)
                raise SqueezeError(
                    f"{path}: weight {value.name!r} claims {shape} elements, more than "
                    "the file holds; export or download it again"
                )


def _is_whole(tensor: ir.TensorProtoTensor) -> bool:
    """As raw bytes exactly; as a repeated field at least two 4-bit values each."""
    proto = tensor.raw
    claimed = prod(proto.dims)
    if min(proto.dims, default=0) < 0:
        return False
    if proto.HasField("raw_data"):
        return bool(len(proto.raw_data) == (claimed * tensor.dtype.bitwidth + 7) // 8)
    fields = (
        proto.float_data,
        proto.int32_data,
        proto.int64_data,
        proto.double_data,
        proto.uint64_data,
        proto.string_data,
    )
    packed = max(1, 8 // tensor.dtype.bitwidth) if tensor.dtype.bitwidth else 1
    return bool(claimed <= packed * max(len(f) for f in fields))


def _parse(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name the .onnx file in it")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise SqueezeError(f"{path}: the file is empty")
    try:
        known = path.suffix in (".json", ".textproto", ".onnxtxt", ".onnxtext")
        form = None if known else "protobuf"
        return onnx.load(path, format=form, load_external_data=False)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, and the text parsers' own
        raise SqueezeError(f"{path}: {_why_not_onnx(path)}") from error


def _why_not_onnx(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the model; run: git lfs pull"
    with contextlib.suppress(UnicodeDecodeError):
        head[:1024].decode("ascii")
        return "a text file, not an ONNX model"
    return "not an ONNX model, or truncated; export or download it again"


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def _external_files(model: ir.Model, path: Path) -> set[Path]:
    """Check every external tensor's file; follow symbolic links inside the folder."""
    found: set[Path] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                found.add(_check_external(tensor, path))
                value.const_value = _resolved(tensor)
    return found


def _check_external(tensor: ir.ExternalTensor, path: Path) -> Path:
    file = Path(tensor.path)
    inside = Path(os.path.normpath(file)).is_relative_to(os.path.normpath(path.parent))
    if Path(tensor.location).is_absolute() or not inside:
        raise SqueezeError(
            f"{path}: external data {str(tensor.location)!r} lies outside the model's "
            "folder; save the model with its data beside it"
        )
    if not file.is_file():
        raise SqueezeError(
            f"{path}: external data {str(tensor.location)!r} of {tensor.name!r} is "
            "missing; copy it beside the model"
        )
    size, end = file.stat().st_size, (tensor.offset or 0) + (tensor.length or 0)
    if end > size:
        raise SqueezeError(
            f"{path}: external data {str(tensor.location)!r} is truncated: "
            f"{size} bytes, {tensor.name!r} ends at {end}; copy it again"
        )
    return file


def _resolved(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """onnx_ir refuses links; name the real file (as download caches need)."""
    real = Path(tensor.path).resolve()
    if real.stat().st_nlink > 1:
        raise SqueezeError(
            f"{tensor.path}: external data with several hard links is refused by onnx; "
            "make a copy of the file"
        )
    if real == Path(tensor.path).absolute():
        return tensor
    assert tensor.name is not None
    return ir.ExternalTensor(
        real.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=real.parent,
    )


def _map_weights(model: ir.Model, path: Path) -> mmap.mmap:
    """Back big inline weights by the file's own bytes, so that the parsed copy can go.

    The bytes are found by looking for them: whatever is found is equal.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    position = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.TensorProtoTensor) or tensor.nbytes < 2**16:
            continue
        found = mapped.find(tensor.tobytes(), position)
        dtype = tensor.dtype.numpy()
        if found < 0 or tensor.dtype.bitwidth < 8:
            value.const_value = ir.Tensor(
                tensor.numpy(), tensor.dtype, name=tensor.name
            )
            continue
        position = found + tensor.nbytes
        array = np.frombuffer(mapped, dtype, tensor.size, found)
        shape = tensor.shape.numpy()
        value.const_value = ir.Tensor(
            array.reshape(shape), tensor.dtype, shape=ir.Shape(shape), name=tensor.name
        )
    return mapped


def normalize(model: ir.Model) -> ir.Model:
    """Inline functions, lift constants, and take initializers out of the inputs."""
    if model.functions:
        meta = dict(model.meta)
        model = passes.InlinePass()(model).model
        model.meta.update(meta)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if any(v.is_initializer() for v in model.graph.inputs):
        passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version, 4)
    _skip_identities(model.graph)
    _lift_constant_of_shape(model.graph)
    return model


def _skip_identities(graph: ir.Graph) -> None:
    """Identity of a weight is how exporters write a tied one."""
    for node in list(graph):
        if (
            node.op_type == "Identity"
            and not node.domain
            and node.inputs[0] is not None
        ):
            weight, out = node.inputs[0], node.outputs[0]
            if weight.is_initializer() and not out.is_graph_output():
                out.replace_all_uses_with(weight)
                graph.remove(node, safe=True)


def _lift_constant_of_shape(graph: ir.Graph) -> None:
    """ConstantOfShape of a constant shape is a weight; it takes memory when used."""
    for node in list(graph):
        if node.op_type != "ConstantOfShape" or node.domain:
            continue
        shape_of = node.inputs[0].const_value if node.inputs[0] is not None else None
        out = node.outputs[0]
        if shape_of is None or out.is_graph_output():
            continue
        shape = tuple(int(n) for n in shape_of.numpy())
        if any(n < 0 for n in shape) or np.prod(shape, dtype=object) > FOLD_LIMIT:
            continue
        fill = np.zeros(1, np.float32)
        if "value" in node.attributes:
            fill = node.attributes["value"].as_tensor().numpy()
        tensor = ir.Tensor(np.broadcast_to(fill.reshape(()), shape), name=out.name)
        add_initializer(graph, tensor, replaces=out)
        graph.remove(node, safe=True)


def add_initializer(
    graph: ir.Graph, tensor: ir.TensorProtocol, replaces: ir.Value | None = None
) -> ir.Value:
    """Register `tensor` under its own name, in place of a value if one is given."""
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    if replaces is not None:
        replaces.replace_all_uses_with(value)
    graph.register_initializer(value)
    return value


# -- names and sizes ----------------------------------------------------------------


def node_name(node: ir.Node) -> str:
    """The node's name as in the file, else its first output's."""
    return (
        node.name or next((v.name for v in node.outputs if v.name), "") or node.op_type
    )


def constant(node: ir.Node, index: int) -> np.ndarray | None:
    """Values of an input that is a constant, else None; omitted inputs are None."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def copy(model: ir.Model) -> ir.Model:
    """A clone that remembers where the model came from."""
    made = model.clone()
    made.meta.update(model.meta)
    return made


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, tied ones once, whatever file they lie in."""
    return sum(
        v.const_value.nbytes
        for graph in model.graphs()
        for v in graph.initializers.values()
        if v.const_value is not None
    )


def source(model: ir.Model) -> Source | None:
    """The file that `load` read this model from."""
    found = model.meta.get(SOURCE)
    return found if isinstance(found, Source) else None


def opset(model: ir.Model) -> int:
    """Version of the default domain."""
    return model.opset_imports.get("", 0)


# -- light protos -------------------------------------------------------------------


@contextlib.contextmanager
def without_big_weights(model: ir.Model, limit: int = 1024) -> Iterator[ir.Model]:
    """While open, initializers over `limit` bytes are graph inputs with shape, no data.

    onnx's C++ functions copy whatever they are given; this keeps weights out of it.
    """
    graph = model.graph
    inputs = list(graph.inputs)
    kept = {v: v.const_value for v in graph.initializers.values()}
    order = list(graph.initializers)
    try:
        for value, tensor in kept.items():
            if tensor is not None and tensor.nbytes > limit:
                value.shape, value.type = (
                    ir.Shape(tensor.shape.numpy()),
                    ir.TensorType(tensor.dtype),
                )
                graph.initializers.pop(value.name or "")
                value.const_value = None
                graph.inputs.append(value)
        yield model
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        graph.initializers.clear()
        by_name = {value.name: value for value in kept}
        for name in order:
            value = by_name[name]
            value.const_value = kept[value]
            graph.initializers.add(value)


def proto_bytes(model: ir.Model) -> int:
    """Bytes the model takes as one file, without building that file."""
    with without_big_weights(model) as light:
        structure = int(ir.to_proto(light).ByteSize())
        inside = weight_bytes(light)
    return structure + weight_bytes(model) - inside


# -- simplify -----------------------------------------------------------------------

SIMPLIFY_LIMIT = 500 * 10**6


def simplify(model: ir.Model) -> tuple[ir.Model, str | None]:
    """Run onnxsim without folding BatchNormalization; a note says why if it did not."""
    if proto_bytes(model) > SIMPLIFY_LIMIT:
        return model, "onnxsim skipped: the model is over 500 MB"
    import onnxsim  # takes over a second to import

    try:
        with _quiet():
            proto, _ = onnxsim.simplify(
                ir.to_proto(_inline_weights(model)), skip_fuse_bn=True, certify=False
            )
        simplified = normalize(ir.from_proto(proto))
    except Exception as error:  # whatever it trips over, the model itself still works
        return model, f"onnxsim failed, went on without it: {_root_cause(error)}"
    names = [[v.name for v in m.graph.inputs] for m in (model, simplified)]
    names += [[v.name for v in m.graph.outputs] for m in (model, simplified)]
    if names[0] != names[1] or names[2] != names[3]:
        return model, "onnxsim skipped: it changed the inputs or outputs"
    simplified.meta.update(model.meta)
    simplified.opset_imports.update(model.opset_imports)
    return simplified, None


def _inline_weights(model: ir.Model) -> ir.Model:
    if any(
        isinstance(v.const_value, ir.ExternalTensor)
        for v in model.graph.initializers.values()
    ):
        return ir.external_data.load_to_model(model.clone())
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what native code prints out of our stdout and stderr."""
    with tempfile.TemporaryFile() as sink:
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            for fd, copy in enumerate(saved, 1):
                os.dup2(copy, fd)
                os.close(copy)


# -- save ---------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Raise UsageError if nothing could be written at `path`."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file to write")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; make it first")
    if not os.access(folder, os.W_OK) or (
        path.exists() and not os.access(path, os.W_OK)
    ):
        raise UsageError(f"{path}: not writable; choose another -o")


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    verify: Callable[[Path], None] | None = None,
) -> int:
    """Write the model and return its bytes, data file included.

    The file appears whole or not at all: it is written beside its place, checked by
    `verify`, then renamed. Weights go to `<name>.data` past 2 GB, or when the model
    was loaded with external data.
    """
    path = Path(path)
    check_output(path)
    came_from = source(model)
    external = proto_bytes(model) > INLINE_LIMIT or bool(
        came_from and came_from.external
    )
    data = f"{path.name}.data" if external else None
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        written = folder / path.name
        ir.save(model, written, format="protobuf", external_data=data)
        files = sorted(
            folder.iterdir(), key=lambda f: f.name == path.name
        )  # model last
        size = sum(f.stat().st_size for f in files)
        if verify is not None:
            verify(written)
        for file in files:
            file.replace(path.absolute().parent / file.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SqueezeError(f"{path}: could not be written: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return size
