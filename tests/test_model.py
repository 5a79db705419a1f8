"""Loading and saving: every kind of file, and nothing lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import squeeze
from squeeze import model as models
from squeeze.errors import SqueezeError, UsageError
from tests.builders import Net, images, run


@pytest.fixture
def net() -> Net:
    """A small network with one layer of every common kind."""
    net = Net(["N", 3, 8, 8])
    net.conv(3, 8)
    net.node("Relu")
    net.node("Flatten")
    net.gemm(512, 4)
    return net


def test_round_trip_keeps_names_opset_metadata_and_outputs(
    net: Net, tmp_path: Path
) -> None:
    """What comes in goes out, byte for byte the second time."""
    model = net.model(opset=13)
    helper.set_model_props(model, {"author": "me"})
    onnx.save(model, tmp_path / "a.onnx")
    squeeze.save(squeeze.load(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    squeeze.save(squeeze.load(tmp_path / "b.onnx"), tmp_path / "c.onnx")
    loaded = onnx.load(tmp_path / "b.onnx")
    assert [i.name for i in loaded.graph.input] == ["x"]
    assert loaded.graph.output[0].name == model.graph.output[0].name
    assert {o.domain: o.version for o in loaded.opset_import} == {"": 13}
    assert {p.key: p.value for p in loaded.metadata_props} == {"author": "me"}
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
    x = images(2, 3, 8, 8)
    assert np.array_equal(
        run(tmp_path / "a.onnx", x=x)[0], run(tmp_path / "b.onnx", x=x)[0]
    )


def test_external_data_stays_external(net: Net, tmp_path: Path) -> None:
    """A model that came with a data file is saved with one, under the new name."""
    path = tmp_path / "a.onnx"
    onnx.save(
        net.model(),
        path,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    model = squeeze.load(path)
    assert all(
        isinstance(v.const_value, ir.ExternalTensor)
        for v in model.graph.initializers.values()
    )
    (tmp_path / "out").mkdir()
    squeeze.save(model, tmp_path / "out/b.onnx")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "b.onnx",
        "b.onnx.data",
    ]
    x = images(2, 3, 8, 8)
    assert np.array_equal(run(path, x=x)[0], run(tmp_path / "out/b.onnx", x=x)[0])


def test_overwriting_a_model_with_its_own_data(net: Net, tmp_path: Path) -> None:
    """Saving over the input and its data file keeps the weights."""
    path = tmp_path / "a.onnx"
    onnx.save(
        net.model(),
        path,
        save_as_external_data=True,
        location="a.onnx.data",
        size_threshold=0,
    )
    x = images(1, 3, 8, 8)
    before = run(path, x=x)[0]
    squeeze.save(squeeze.load(path), path)
    assert np.array_equal(before, run(path, x=x)[0])
    assert len(list(tmp_path.iterdir())) == 2


def test_linked_external_data_is_followed(net: Net, tmp_path: Path) -> None:
    """Download caches keep data behind symbolic links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = tmp_path / "blobs/a.onnx"
    onnx.save(
        net.model(),
        path,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    for name in ("a.onnx", "w.bin"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    model = squeeze.load(tmp_path / "snapshot/a.onnx")
    squeeze.save(model, tmp_path / "b.onnx")
    x = images(1, 3, 8, 8)
    assert np.array_equal(run(path, x=x)[0], run(tmp_path / "b.onnx", x=x)[0])
    os.link(path.with_name("w.bin"), tmp_path / "hard.bin")
    with pytest.raises(SqueezeError, match="hard links"):
        squeeze.load(path)


def test_initializers_among_the_inputs(tmp_path: Path) -> None:
    """IR 3 lists weights as inputs; they are weights here."""
    net = Net([1, 3, 8, 8])
    net.conv(3, 4)
    model = net.model(opset=9)
    model.ir_version = 3
    for weight in model.graph.initializer:
        info = helper.make_tensor_value_info(
            weight.name, TensorProto.FLOAT, weight.dims
        )
        model.graph.input.append(info)
    onnx.save(model, tmp_path / "a.onnx")
    loaded = squeeze.load(tmp_path / "a.onnx")
    assert [v.name for v in loaded.graph.inputs] == ["x"]
    squeeze.save(loaded, tmp_path / "b.onnx")
    x = images(1, 3, 8, 8)
    assert np.array_equal(
        run(tmp_path / "a.onnx", x=x)[0], run(tmp_path / "b.onnx", x=x)[0]
    )


def test_constant_nodes_and_functions_become_plain(tmp_path: Path) -> None:
    """Constant and ConstantOfShape weights are lifted, functions inlined."""
    constant = helper.make_node(
        "Constant",
        [],
        ["w"],
        value=numpy_helper.from_array(np.ones((4, 3), np.float32)),
    )
    shape = helper.make_node("Constant", [], ["s"], value_ints=[3, 4])
    filled = helper.make_node(
        "ConstantOfShape", ["s"], ["v"], value=helper.make_tensor("", 1, [1], [0.5])
    )
    function = helper.make_function(
        "mine",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        constant,
        shape,
        filled,
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Twice", ["h"], ["t"], domain="mine"),
        helper.make_node("MatMul", ["t", "v"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [2, 4])],
        [info("y", TensorProto.FLOAT, [2, 4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function])
    model.ir_version = 8
    onnx.save(model, tmp_path / "a.onnx")
    loaded = squeeze.load(tmp_path / "a.onnx")
    assert [node.op_type for node in loaded.graph] == ["MatMul", "Add", "MatMul"]
    assert set(loaded.graph.initializers) >= {"w", "v"}
    assert squeeze.profile(tmp_path / "a.onnx").totals.params == 24
    squeeze.save(loaded, tmp_path / "b.onnx")
    x = images(2, 4)
    assert np.allclose(
        run(tmp_path / "a.onnx", x=x)[0], run(tmp_path / "b.onnx", x=x)[0]
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_half_precision_weights_keep_their_type(dtype: type, tmp_path: Path) -> None:
    """float16 and bfloat16 stay what they are through a conversion."""
    net = Net([1, 8, 8, 8])
    net.conv(8, 16)
    net.conv(16, 16)
    model = net.model()
    code = ir.DataType.from_numpy(np.dtype(dtype)).value
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = code
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight).astype(dtype)
        weight.CopyFrom(ir.to_proto(ir.Tensor(array, name=weight.name)))
    onnx.save(model, tmp_path / "a.onnx")
    options = squeeze.Options(bench=False)
    out = tmp_path / "b.onnx"
    result = squeeze.convert(
        tmp_path / "a.onnx", "depthwise-separable", out, options=options
    )
    assert result.applied == 1
    kinds = {
        v.const_value.dtype.value for v in squeeze.load(out).graph.initializers.values()
    }
    assert kinds == {code}
    unverified = any(note.startswith("not verified") for note in result.notes)
    assert unverified == (dtype is ml_dtypes.bfloat16)


# -- bad files ----------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    """A missing file and a folder are bad usage."""
    with pytest.raises(UsageError, match="no such file"):
        squeeze.load(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="is a folder"):
        squeeze.load(tmp_path)


def test_files_that_are_no_model(net: Net, tmp_path: Path) -> None:
    """Empty, text, LFS pointer, truncated: each with its own words."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    with pytest.raises(SqueezeError, match="empty"):
        squeeze.load(path)
    path.write_text("hello, this is no model\n" * 10)
    with pytest.raises(SqueezeError, match="text file"):
        squeeze.load(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SqueezeError, match="git lfs pull"):
        squeeze.load(path)
    whole = net.model().SerializeToString()
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(
            SqueezeError, match=r"truncated|no graph|invalid|not an ONNX"
        ):
            squeeze.load(path)


def test_external_data_missing_truncated_or_elsewhere(net: Net, tmp_path: Path) -> None:
    """The data file is named, with what to do."""
    path = tmp_path / "a.onnx"
    onnx.save(
        net.model(),
        path,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(SqueezeError, match=r"w\.bin.*truncated"):
        squeeze.load(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(SqueezeError, match=r"w\.bin.*missing"):
        squeeze.load(path)
    proto = onnx.load(path, load_external_data=False)
    for weight in proto.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    onnx.save(proto, path)
    with pytest.raises(SqueezeError, match="outside"):
        squeeze.load(path)


def test_old_opset(tmp_path: Path) -> None:
    """Opset 8 is refused with the way to convert it."""
    net = Net([1, 3, 8, 8])
    net.conv(3, 4)
    model = net.model(opset=9)
    model.opset_import[0].version = 8
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(SqueezeError, match="convert_version"):
        squeeze.load(tmp_path / "a.onnx")


def test_unwritable_output(net: Net, tmp_path: Path) -> None:
    """No folder, or a folder in the file's place."""
    model = squeeze.load(net.save(tmp_path / "a.onnx"))
    with pytest.raises(UsageError, match="no such folder"):
        squeeze.save(model, tmp_path / "none/b.onnx")
    with pytest.raises(UsageError, match="is a folder"):
        squeeze.save(model, tmp_path)


def test_disk_full_halfway_leaves_nothing(net: Net, tmp_path: Path) -> None:
    """A write that fails leaves neither a part nor a temporary file, and status 3."""
    path = net.save(tmp_path / "a.onnx")
    limit = path.stat().st_size // 2

    def small_files() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [
        sys.executable,
        "-m",
        "squeeze",
        "convert",
        str(path),
        "--to",
        "bottleneck",
    ]
    command += ["--no-simplify", "--no-bench", "-o", str(tmp_path / "b.onnx")]
    done = subprocess.run(
        command, preexec_fn=small_files, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "b.onnx: could not be written" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]


def test_failed_verification_leaves_the_old_file(net: Net, tmp_path: Path) -> None:
    """The output is replaced only after the new one has been checked."""
    path = net.save(tmp_path / "a.onnx")
    before = path.read_bytes()

    def refuse(written: Path) -> None:
        assert written.stat().st_size
        raise SqueezeError("no good")

    with pytest.raises(SqueezeError, match="no good"):
        models.save(squeeze.load(path), path, refuse)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_past_the_limit_of_one_file_data_goes_beside(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model over protobuf's 2 GB is saved with external data (limit lowered here)."""
    model = squeeze.load(net.save(tmp_path / "a.onnx"))
    monkeypatch.setattr(models, "INLINE_LIMIT", 1000)
    squeeze.save(model, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").stat().st_size > 1000
    x = images(2, 3, 8, 8)
    same = run(tmp_path / "a.onnx", x=x)[0] == run(tmp_path / "b.onnx", x=x)[0]
    assert same.all()


def test_simplified_models_keep_what_describes_them(net: Net, tmp_path: Path) -> None:
    """onnxsim runs before a rewrite; metadata, names and opset survive it."""
    model = net.model(opset=12)
    helper.set_model_props(model, {"classes": "cat,dog"})
    model.doc_string, model.producer_name = "what it is", "me"
    onnx.save(model, tmp_path / "a.onnx")
    squeeze.convert(
        tmp_path / "a.onnx", "bottleneck", tmp_path / "b.onnx", keep_first=False
    )
    made = onnx.load(tmp_path / "b.onnx")
    props = {p.key: p.value for p in made.metadata_props}
    assert props["classes"] == "cat,dog"
    assert props["squeeze.version"] == squeeze.__version__
    assert (made.doc_string, made.producer_name) == ("what it is", "me")
    assert made.opset_import[0].version == 12
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert [n.name for n in made.graph.node if n.op_type == "Gemm"] == ["gemm3"]


def test_weights_of_big_files_are_mapped(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped weights are equal to the parsed ones, also after the file is replaced."""
    wide = Net(["N", 64, 4, 4])
    wide.conv(64, 64)
    wide.conv(64, 64)
    path = wide.save(tmp_path / "a.onnx")
    plain = squeeze.load(path)
    monkeypatch.setattr(models, "MAP_FROM", 1)
    mapped = squeeze.load(path)
    path.unlink()
    for name, value in plain.graph.initializers.items():
        other = mapped.graph.initializers[name].const_value
        assert np.array_equal(value.const_value.numpy(), other.numpy())
