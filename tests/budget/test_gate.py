"""The gate from Python: properties of its verdicts, hostile models, latency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import squeeze
from squeeze.budget import baseline, config, gate, ratio
from squeeze.errors import SqueezeError, UsageError
from squeeze.testing import BudgetWarning, assert_within
from tests.builders import SAMPLES, Net

CIFAR = SAMPLES / "cifar10_cnn.onnx"
COSTS = ("macs", "flops", "params", "weight_size", "file_size", "peak_memory")


@given(
    st.sampled_from(COSTS),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
    st.integers(0, 200),
    st.integers(0, 200),
)
@settings(max_examples=40, deadline=None)
def test_raising_a_limit_never_fails_what_passed(
    metric: str, one: int, other: int, low: int, high: int
) -> None:
    """Of two limits the higher one passes wherever the lower one does."""
    base = str(SAMPLES / "digits_cnn.onnx")

    def status(limit: int, increase: int) -> int:
        bounds = {"max": limit, "max_increase": f"{increase}%"}
        return squeeze.check(CIFAR, {metric: bounds, "baseline": base}).status

    lower = status(min(one, other), min(low, high))
    assert status(max(one, other), max(low, high)) <= lower


@st.composite
def nets(draw: st.DrawFn) -> onnx.ModelProto:
    """Chains of convolutions with equal names here and there."""
    net = Net([1, 2, 6, 6], seed=draw(st.integers(0, 9)))
    channels = 2
    for index in range(draw(st.integers(1, 4))):
        out = draw(st.integers(1, 5))
        net.conv(channels, out)
        net.nodes[-1].name = draw(st.sampled_from(["", "same", f"conv{index}"]))
        net.node("Relu")
        channels = out
    return net.model()


@given(model=nets())
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_model_keeps_its_own_baseline(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Against its own baseline every cost passes `max_increase = "0%"`."""
    file = tmp_path / "m.onnx"
    onnx.save(model, file)
    limits = {metric: {"max_increase": "0%"} for metric in COSTS}
    layer = {k: limits[k] for k in ("macs", "params")}
    table = {
        "model": "m.onnx",
        "baseline": "b.json",
        "layer": [{"match": "*", **layer}],
        **limits,
    }
    budget = config.Budget((config.one(table, folder=tmp_path),))
    for update in gate.updates(budget):
        baseline.write(update.path, update.content)
    report = gate.run(budget)
    assert report.passed, report.failures()
    assert [c.kind for c in report.changes] == ["unchanged"]
    assert baseline.read(tmp_path / "b.json")["m.onnx"] == next(
        iter(gate.updates(budget)[0].content.values())
    )


def test_each_failure_names_its_layers_and_a_remedy() -> None:
    """By how much, which layers weigh most, and a command with a target that fits."""
    report = squeeze.check(CIFAR, {"macs": {"max": "19779584"}})
    (result,) = report.results
    assert result.reason == "19.78 M (100 %) over 19.78 M"
    assert [s.layer for s in result.heaviest] == ["conv2", "conv3", "conv1"]
    assert result.heaviest[0].share == pytest.approx(18_874_368 / 39_559_168)
    assert "squeeze shrink" in result.remedy
    assert "--macs 50%" in result.remedy


def test_a_renamed_layer_is_no_change(tmp_path: Path) -> None:
    """An export that only numbers its nodes anew changes nothing."""
    model = onnx.load(CIFAR)
    for node in model.graph.node:
        node.name = f"{node.name}_renamed"
    onnx.save(model, tmp_path / "renamed.onnx")
    report = squeeze.check(
        tmp_path / "renamed.onnx",
        {"macs": {"max_increase": "0%"}, "baseline": str(CIFAR)},
    )
    assert report.passed
    assert report.changes[0].layers == ()


def test_check_of_a_model_in_memory() -> None:
    """What squeeze.load gives is checked as its file is."""
    budget = {"macs": {"max": "39559168"}, "params": {"max": "411785"}}
    report = squeeze.check(squeeze.load(CIFAR), budget)
    assert [r.status for r in report.results] == ["within", "over"]


def test_budget_of_a_missing_model() -> None:
    """A wrong budget or a missing file is an exception, not a result."""
    with pytest.raises(UsageError, match="no such file"):
        squeeze.check("no.onnx", {"macs": {"max": 1}})
    with pytest.raises(UsageError, match="did you mean"):
        squeeze.check(CIFAR, {"mac": {"max": 1}})


# -- for tests of models ------------------------------------------------------------


def test_assert_within() -> None:
    """Over is an AssertionError, not measured a SqueezeError, a warning a warning."""
    assert assert_within(CIFAR, macs="600M", params="5M").passed
    with pytest.raises(AssertionError, match="conv2"):
        assert_within(CIFAR, macs="1M")
    with pytest.raises(SqueezeError, match="needs data") as caught:
        assert_within(CIFAR, accuracy="90%")
    assert not isinstance(caught.value, AssertionError)
    with pytest.warns(BudgetWarning, match="over 1 M"):
        assert_within(CIFAR, macs={"max": "1M", "level": "warn"})


# -- latency ------------------------------------------------------------------------


class Clock:
    """Time that only the runs move: how long each takes is drawn from a noise."""

    def __init__(self, seed: int, spread: float) -> None:
        self.now, self.spread = 0.0, spread
        self.rng = np.random.default_rng(seed)

    def run(self, seconds: float) -> None:
        noise = np.exp(self.spread * abs(self.rng.standard_t(3)))
        self.now += seconds * min(noise, 50.0)


def _status(seed: int, slower: float, spread: float, limit: float = 1.1) -> str:
    clock = Clock(seed, spread)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        for name in ("perf_counter", "thread_time"):
            patched.setattr(ratio.time, name, lambda: clock.now)
        found = ratio.measure(
            lambda: clock.run(0.003 * slower), lambda: clock.run(0.003), limit, 10.0
        )
    return found.verdict(limit)


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_noise_is_no_slowdown_and_a_slowdown_is_one(spread: float) -> None:
    """Of 100 runs with heavy-tailed noise none is a false alarm; 25 % is caught."""
    same = [_status(seed, 1.0, spread) for seed in range(100)]
    slower = [_status(seed, 1.25, spread) for seed in range(100)]
    assert same.count("over") <= 1
    assert slower.count("over") >= 95


def test_too_much_noise_is_said_not_passed() -> None:
    """Where 25 % could hide in the noise, the verdict is neither within nor over."""
    assert _status(1, 1.1, 3.0, limit=1.1) == "unclear"


def test_sign_rank_is_the_binomial_tail() -> None:
    """The chance that both bounds miss the median is the binomial's, to its level."""
    from math import comb

    for count in (9, 12, 24, 48, 96):
        rank = ratio.sign_rank(count, 0.0025)
        assert sum(comb(count, i) for i in range(rank + 1)) / 2**count <= 0.0025
        assert sum(comb(count, i) for i in range(rank + 2)) / 2**count > 0.0025


def test_latency_of_a_slower_model_is_over(tmp_path: Path) -> None:
    """In onnxruntime: twice the layers are over a limit of 10 %, the same are not."""

    def chain(count: int) -> Path:
        net = Net([1, 16, 32, 32])
        for _ in range(count):
            net.conv(16, 16)
        onnx.save(net.model(), tmp_path / f"{count}.onnx")
        return tmp_path / f"{count}.onnx"

    limit = {"max_increase": "10%", "reference": str(chain(4)), "level": "error"}
    assert squeeze.check(chain(8), {"latency": limit}).status == 1
    assert squeeze.check(chain(4), {"latency": limit}).status == 0


# -- hostile models -----------------------------------------------------------------


def _value(name: str, shape: list[int] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(
    path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]
) -> Path:
    graph = helper.make_graph(
        nodes, "g", [_value("x", [1])], [_value("y", None)], weights
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _scalar(name: str, value: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.int64), name)


def _claims() -> onnx.TensorProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, raw_data=b"\0" * 16)
    weight.dims.extend([2**60])
    return weight


node = helper.make_node
GROWING = [node("Concat", [f"v{i}", f"v{i}"], [f"v{i + 1}"], axis=0) for i in range(40)]
HOSTILE = {
    "a weight of 2^60": ([node("Add", ["x", "w"], ["y"])], [_claims()], "unmeasured"),
    "a constant of 2^60": (
        [node("ConstantOfShape", ["s"], ["t"]), node("Relu", ["t"], ["y"])],
        [_ints("s", 2**60)],
        "over",
    ),
    "a range of 2^40": (
        [node("Range", ["a", "b", "c"], ["r"]), node("NonZero", ["r"], ["y"])],
        [_scalar("a", 0), _scalar("b", 2**40), _scalar("c", 1)],
        "unmeasured",
    ),
    "a tile of 2^35": (
        [node("Tile", ["a", "k"], ["t"]), node("NonZero", ["t"], ["y"])],
        [_ints("a", 1), _ints("k", 2**35)],
        "unmeasured",
    ),
    "an expansion of 2^35": (
        [
            node("Shape", ["x"], ["q"]),
            node("Mul", ["q", "k"], ["s"]),
            node("Expand", ["k", "s"], ["e"]),
            node("NonZero", ["e"], ["y"]),
        ],
        [_ints("k", 2**35)],
        "unmeasured",
    ),
    "doubled 40 times": (
        [*GROWING, node("NonZero", ["v40"], ["y"])],
        [_ints("v0", 1)],
        "unmeasured",
    ),
    "sizes past 64 bits": (
        [node("Reshape", ["x", "s"], ["y"])],
        [_ints("s", 2**40, 2**40)],
        "unmeasured",
    ),
    "nodes in a circle": (
        [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])],
        [],
        "unmeasured",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_sizes_that_no_machine_holds(name: str, tmp_path: Path) -> None:
    """A model that claims more than memory is judged or refused, and never run."""
    import tracemalloc

    nodes, weights, expected = HOSTILE[name]
    path = _save(tmp_path / "m.onnx", nodes, weights)
    latency = {"max_increase": "10%", "reference": str(path)}
    tracemalloc.start()
    report = squeeze.check(path, {"peak_memory": {"max": "1MB"}, "latency": latency})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    memory, time = report.results
    assert memory.status == expected
    assert time.status == "unmeasured"
    assert memory.reason
    assert time.reason
    assert peak < 300e6
    assert report.status == (1 if expected == "over" else 3)
