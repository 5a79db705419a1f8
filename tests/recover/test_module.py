"""ONNX graphs as PyTorch modules, and trained values back under their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from squeeze import load, save  # noqa: E402
from squeeze.errors import SqueezeError  # noqa: E402
from squeeze.recover import norms as norms_of  # noqa: E402
from squeeze.recover import to_torch, verify, write_back  # noqa: E402
from tests.builders import SAMPLES, Net, run  # noqa: E402

MODELS = ["digits_cnn", "digits_autoencoder", "adder_mlp", "cifar10_cnn"]


def _inputs(model: ir.Model, batch: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.standard_normal([batch, *v.shape[1:]]).astype(np.float32)
        for v in model.graph.inputs
    }


def _tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_onnxruntime(name: str) -> None:
    """A sample model's module gives its outputs to 1e-5 of the largest."""
    model = load(SAMPLES / f"{name}.onnx")
    assert verify(model, to_torch(model), _inputs(model)).error < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_writing_back_untrained_values_changes_nothing(
    name: str, tmp_path: Path
) -> None:
    """Names, nodes, opset and values are the same after a round through PyTorch."""
    model = load(SAMPLES / f"{name}.onnx")
    before = ir.to_proto(model)
    write_back(model, to_torch(model))
    after = ir.to_proto(model)
    assert after.graph.node == before.graph.node
    assert after.graph.input == before.graph.input
    assert after.opset_import == before.opset_import
    old = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    new = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    assert list(old) == list(new)
    for key, array in old.items():
        np.testing.assert_array_equal(array, new[key])


def test_the_public_example(tmp_path: Path) -> None:
    """A user's own loop trains the module, and the file runs with the new weights."""
    model = load(SAMPLES / "adder_mlp.onnx")
    module = to_torch(model)
    assert dict(module.named_parameters()).keys() == set(model.graph.initializers)
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    x = torch.rand(64, 2)
    target = x.sum(1, keepdim=True) + 1
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    write_back(model, module)
    save(model, tmp_path / "trained.onnx")
    (found,) = run(tmp_path / "trained.onnx", x=x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x).numpy(), atol=1e-5)


def test_batch_norm_statistics_follow_in_training_only() -> None:
    """BatchNormalization's mean and variance are buffers that training moves."""
    model = load(SAMPLES / "digits_autoencoder.onnx")
    module = to_torch(model)
    names = [n for n, _ in module.named_buffers()]
    assert "batchnormalization1.mean" in names or any(
        n.endswith(".mean") for n in names
    )
    x = _tensors(_inputs(model, 32))
    before = {n: b.clone() for n, b in module.named_buffers()}
    module.run(x)
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    module.train()
    module.run(x)
    moved = [n for n, b in module.named_buffers() if not torch.equal(b, before[n])]
    assert set(names) == set(moved)


def test_state_dict_round_trip_with_dots_in_names() -> None:
    """A state dict goes into another module of the same model, and no other."""
    first = to_torch(SAMPLES / "digits_cnn.onnx")
    second = to_torch(SAMPLES / "digits_cnn.onnx")
    with torch.no_grad():
        for p in first.parameters():
            p.add_(1)
    second.load_state_dict(first.state_dict())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(SqueezeError, match="does not fit"):
        second.load_state_dict(to_torch(SAMPLES / "adder_mlp.onnx").state_dict())


def test_inserted_normalisation_keeps_outputs_and_folds_away() -> None:
    """The identity at first; after training, folded weights give the same outputs."""
    model = load(SAMPLES / "digits_cnn.onnx")
    module = to_torch(model)
    inputs = _tensors(_inputs(model, 64))
    before = module.run(inputs)["logits"].detach()
    found = norms_of.places(module)
    assert [step.name for step in found] == ["conv1", "conv2", "conv3"]
    norms_of.insert(module, found, [inputs])
    torch.testing.assert_close(
        module.run(inputs)["logits"], before, rtol=1e-4, atol=1e-3
    )
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module.run(inputs)["logits"].square().mean().backward()
        optimizer.step()
    module.eval()
    trained = module.run(inputs)["logits"].detach().numpy()
    assert np.abs(trained - before.numpy()).max() > 1e-2
    write_back(model, module)
    (written,) = run(ir.to_proto(model), x=inputs["input"].numpy())
    np.testing.assert_allclose(written, trained, rtol=1e-3, atol=1e-3)


def test_an_unknown_op_runs_in_onnxruntime_and_stops_the_gradient() -> None:
    """What feeds an op without a function is frozen; what comes behind is trained."""
    net = Net(["N", 2, 6, 6])
    net.conv(2, 3)
    net.node("LpPool", kernel_shape=[2, 2])
    net.conv(3, 2)
    model = ir.from_proto(net.model())
    module = to_torch(model)
    assert [s.op.kind for s in module.steps if s.island] == ["LpPool"]
    assert verify(model, module, _inputs(model)).error < 1e-5
    module.run(_tensors(_inputs(model)))[module.output_names[0]].sum().backward()
    trained = {n for n, p in module.named_parameters() if p.grad is not None}
    assert trained == {"w2", "w3"}


def test_constants_of_unknown_ops_stay_with_them() -> None:
    """Scales, zero points and quantised weights: nobody else has them."""
    net = Net(["N", 2, 6, 6])
    settings = {
        "scale": np.array(0.05, np.float32),
        "zero": np.array(128, np.uint8),
        "packed": np.arange(-27, 27, dtype=np.int8).reshape(3, 2, 3, 3),
        "middle": np.array(0, np.int8),
    }
    net.weights += [numpy_helper.from_array(a, n) for n, a in settings.items()]
    quantised = net.node("QuantizeLinear", "x", "scale", "zero")
    x = net.node("DequantizeLinear", quantised, "scale", "zero")
    weight = net.node("DequantizeLinear", "packed", "scale", "middle")
    net.node("Conv", x, weight, kernel_shape=[3, 3], pads=[1] * 4)
    net.conv(3, 2)
    model = ir.from_proto(net.model())
    module = to_torch(model)
    islands = [s.op.kind for s in module.steps if s.island]
    assert islands == ["QuantizeLinear", "DequantizeLinear"]  # the weight is folded
    assert verify(model, module, _inputs(model)).error < 1e-5


def test_control_flow_is_refused_by_name() -> None:
    """An If can't be walked: the message names the node."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])],
    )
    node = helper.make_node(
        "If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch
    )
    values = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "g", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(SqueezeError, match="If 'choice'"):
        to_torch(ir.from_proto(model))


def test_a_difference_names_the_first_wrong_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong function is found out before training, by the node's name."""
    model = load(SAMPLES / "digits_cnn.onnx")
    module = to_torch(model)
    wrong = next(s for s in module.steps if s.name == "relu2")
    object.__setattr__(wrong, "function", lambda op, x: torch.tanh(x))
    with pytest.raises(SqueezeError, match="Relu 'relu2' differs from onnxruntime"):
        verify(model, module, _inputs(model))


def test_tied_weights_are_one_parameter() -> None:
    """A weight that two layers share is trained once and stays shared."""
    net = Net(["N", 4])
    weight = net.weight(np.eye(4) * 0.5)
    net.node("MatMul", "x", weight)
    net.node("Relu")
    net.node("MatMul", net.value_before, weight)
    module = to_torch(ir.from_proto(net.model()))
    assert [n for n, _ in module.named_parameters()] == [weight]


def test_half_precision_is_trained_in_float32_and_written_as_half() -> None:
    """float16 weights become float32 parameters and go back rounded."""
    net = Net(["N", 4])
    net.gemm(4, 3)
    proto = net.model()
    for tensor in proto.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    model = ir.from_proto(proto)
    module = to_torch(model)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    inputs = {"x": np.ones((2, 4), np.float16)}
    assert verify(model, module, inputs).error < 1e-2
    write_back(model, module)
    types = {v.const_value.dtype for v in model.graph.initializers.values()}
    assert types == {ir.DataType.FLOAT16}


def test_constants_are_not_trained() -> None:
    """Clip's bounds and a decomposed GELU's numbers are settings, not weights."""
    net = Net(["N", 4])
    net.gemm(4, 3)
    half = net.weight(np.array(0.5))
    net.node("Mul", net.value_before, half)
    net.node(
        "Clip", net.value_before, net.weight(np.array(-1.0)), net.weight(np.array(1.0))
    )
    module = to_torch(ir.from_proto(net.model()))
    assert [n for n, _ in module.named_parameters()] == ["w0", "w1"]


def test_a_graph_of_batch_1_takes_any_batch() -> None:
    """Targets of Reshape that hold the exporter's batch are scaled to the batch fed."""
    net = Net([1, 2, 4, 4])
    net.conv(2, 3)
    net.node("Reshape", net.value_before, net.weight(np.array([1, -1], np.int64)))
    net.gemm(48, 5)
    model = ir.from_proto(net.model())
    module = to_torch(model)
    x = torch.from_numpy(np.random.default_rng(0).random((4, 2, 4, 4), np.float32))
    both = module(x)
    alone = torch.cat([module(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(both, alone)


def test_an_onnx_file_is_left_alone(tmp_path: Path) -> None:
    """Making a module changes neither the file nor the model in memory."""
    path = SAMPLES / "digits_autoencoder.onnx"
    model = load(path)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    module = to_torch(model)
    module.train()
    module.run(_tensors(_inputs(model, 8)))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(str(path))
