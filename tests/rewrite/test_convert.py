"""convert: published costs, and outputs of the right shape at every site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import squeeze
from squeeze import rules
from squeeze.cli import run as squeeze_cli
from squeeze.errors import RuleError, UsageError
from tests.builders import (
    MOBILENET,
    SAMPLES,
    Net,
    cifar_baseline,
    images,
    run,
    standard_mobilenet,
)

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
PLAN = squeeze.Options(dry_run=True, bench=False, simplify=False)
QUICK = squeeze.Options(bench=False, simplify=False)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EffNet's CIFAR-10 baseline as a file."""
    return cifar_baseline().save(tmp_path_factory.mktemp("cifar") / "baseline.onnx")


# EffNet, Tables 1 and 2: `squeeze convert …` → MACs, exact
CIFAR_TABLE = {
    "--to depthwise-separable --pool absorb": 2_914_304,
    "--to shufflenet --pool absorb": 2_231_296,
    "--to effnet": 5_640_192,
    "--to effnet-v2 --set expansion=2": 6_225_920,
    "--to effnet-v2 --set expansion=4": 10_641_408,
    "--to effnet-v2 --set expansion=6": 15_056_896,
    "--to inverted-residual --pool absorb --set expansion=2": 8_212_480,
    "--to inverted-residual --pool absorb --set expansion=4": 14_614_528,
    "--to inverted-residual --pool absorb --set expansion=6": 21_016_576,
    "--to mobile-improved --set expansion=6": 22_011_904,
}


@pytest.mark.parametrize("arguments", CIFAR_TABLE)
def test_effnet_tables(
    arguments: str, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row of EffNet's tables, exactly, through the command line."""
    out = tmp_path / "out.onnx"
    command = ["convert", str(baseline), *arguments.split(), "-o", str(out)]
    command += ["--allow-costlier", "--json", "--no-bench"]
    assert squeeze_cli(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["before"]["macs"] == 39_559_168
    assert report["after"]["macs"] == CIFAR_TABLE[arguments]
    assert squeeze.profile(out).totals.macs == CIFAR_TABLE[arguments]
    assert run(out, x=images(3, 3, 32, 32))[0].shape == (3, 10)


def test_mobilenet_table_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The full network at 4,867,293,184 MACs becomes MobileNet at 568,740,352."""
    path = standard_mobilenet().save(tmp_path / "full.onnx")
    command = ["convert", str(path), "--to", "depthwise-separable", "--json"]
    assert squeeze_cli([*command, "--no-bench", "--no-simplify"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["before"]["macs"] == 4_867_293_184
    assert report["after"]["macs"] == 568_740_352
    kept = [c for c in report["changes"] if not c["applied"]]
    assert [c["reason"].split(";")[0] for c in kept] == ["first layer kept"]
    made = squeeze.profile(report["output"])
    biases = sum(cout for cout, _ in MOBILENET)  # the paper counts weights alone
    assert made.totals.params - biases == 4_210_088


@pytest.mark.parametrize("block", rules.names("blocks"))
@pytest.mark.parametrize("opset", [9, 13, 21])
def test_every_block_runs_at_every_opset(
    block: str, opset: int, tmp_path: Path
) -> None:
    """What a block writes is valid at the model's own opset, at any batch size."""
    net = Net(["N", 8, 12, 12])
    net.conv(8, 16, strides=[2, 2])
    net.node("LeakyRelu", alpha=0.1)
    net.conv(16, 16)
    net.batch_norm(16)
    net.node("Relu")
    net.conv(16, 32)
    net.node("Relu")
    net.node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    path = net.save(
        tmp_path / "a.onnx", opset=opset, ir_version=8 if opset < 21 else 10
    )
    out = tmp_path / "b.onnx"
    result = squeeze.convert(
        path, block, out, keep_first=False, allow_costlier=True, options=QUICK
    )
    assert result.applied == 3, [c.reason for c in result.changes]
    assert onnx.load(out).opset_import[0].version == opset
    for batch in (1, 4):
        x = images(batch, 8, 12, 12)
        assert run(out, x=x)[0].shape == run(path, x=x)[0].shape


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution with anything ONNX allows, and what may stand behind it."""
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    kernel = [draw(st.integers(1, 5)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return {
        "cin": draw(st.sampled_from([1, 4, 6, 8])),
        "cout": draw(st.sampled_from([1, 4, 8, 12])),
        "size": [draw(st.integers(s + 2, s + 9)) for s in spans],
        "kernel": kernel,
        "dilations": dilations,
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
        "padding": draw(
            st.one_of(
                st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
                st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank),
            )
        ),
        "activation": draw(st.sampled_from(["", "Relu", "Sigmoid", "silu"])),
        "pool": draw(
            st.sampled_from(
                [None, (2, 2, 0, 0), (3, 2, 1, 0), (2, 2, 0, 1), (3, 3, 0, 0)]
            )
        ),
        "dynamic": draw(st.booleans()),
    }


def _site_net(site: dict[str, Any]) -> Net:
    rank = len(site["kernel"])
    dims = [f"d{i}" for i in range(rank)] if site["dynamic"] else site["size"]
    net = Net(["N", site["cin"], *dims])
    padding = site["padding"]
    padded = {"auto_pad": padding} if isinstance(padding, str) else {"pads": padding}
    net.conv(
        site["cin"],
        site["cout"],
        site["kernel"],
        strides=site["strides"],
        dilations=site["dilations"],
        name="site",
        **padded,
    )
    value = net.value
    if site["activation"] == "silu":
        net.node("Mul", value, net.node("Sigmoid", value))
    elif site["activation"]:
        net.node(site["activation"])
    if site["pool"]:
        kernel, stride, pad, ceil = site["pool"]
        net.node(
            "MaxPool",
            kernel_shape=[kernel] * rank,
            strides=[stride] * rank,
            pads=[pad] * 2 * rank,
            ceil_mode=ceil,
        )
    return net


@pytest.mark.parametrize("block", rules.names("blocks"))
@given(site=sites())
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_same_shape_or_a_refusal(
    block: str, site: dict[str, Any], tmp_path: Path
) -> None:
    """At any stride, pad, dilation and odd size: the original's shape, or a reason."""
    net = _site_net(site)
    path = net.save(tmp_path / "a.onnx")
    x = images(2, site["cin"], *site["size"])
    try:
        expected = run(path, x=x)[0].shape
    except Exception:  # a pool larger than what is left of the input
        return
    given_shapes = {"": (1, *x.shape[1:])} if site["dynamic"] else {}
    options = squeeze.Options(bench=False, simplify=False, input_shapes=given_shapes)
    out = tmp_path / "b.onnx"
    for pool in ("keep", "absorb"):
        result = squeeze.convert(
            path,
            block,
            out,
            keep_first=False,
            pool=pool,
            allow_costlier=True,
            options=options,
        )
        (change,) = result.changes
        assert change.applied != bool(change.reason)
        assert run(out, x=x)[0].shape == expected
        if site["dynamic"] and change.applied:
            for more in (1, 2, 3, 7):
                larger = images(1, site["cin"], *(n + more for n in site["size"]))
                assert run(out, x=larger)[0].shape == run(path, x=larger)[0].shape


@pytest.mark.parametrize("to", ["depthwise-separable", "effnet"])
@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sorted(LIGHT.glob("*.onnx"))
        if "vgg" not in p.name and "alex" not in p.name
    ],
    ids=lambda p: p.stem,
)
def test_light_models_convert_or_refuse(path: Path, to: str, tmp_path: Path) -> None:
    """Real graphs run after conversion; what is left alone has its reason."""
    out = tmp_path / "out.onnx"
    result = squeeze.convert(path, to, out, options=QUICK)
    assert all(change.applied or change.reason for change in result.changes)
    assert result.after.macs <= result.before.macs
    assert out.exists()


# -- what is refused, and why -------------------------------------------------------


def _reasons(path: Path, **options: Any) -> dict[str, str]:
    result = squeeze.convert(path, "depthwise-separable", options=PLAN, **options)
    return {change.site: change.reason for change in result.changes}


def test_convolutions_that_are_no_sites(tmp_path: Path) -> None:
    """Grouped, 1×1, quantised, with computed weights: listed with the reason."""
    net = Net([1, 4, 8, 8])
    net.conv(4, 8, name="standard")
    net.conv(8, 8, group=8, name="depthwise")
    net.conv(8, 8, (1, 1), name="pointwise")
    computed = net.node(
        "Mul", net.weight(np.ones((4, 8, 3, 3))), net.weight(np.array(2.0))
    )
    net.node("Conv", "pointwise_out", computed, name="computed", kernel_shape=[3, 3])
    scale, zero = net.weight(np.array(0.1)), net.weight(np.array(0.0), "zero")
    net.weights[-1].CopyFrom(numpy_helper.from_array(np.int8(0), "zero"))
    quantised = net.weight(np.zeros((4, 4, 3, 3)), "q")
    net.weights[-1].CopyFrom(
        numpy_helper.from_array(np.ones((4, 4, 3, 3), np.int8), "q")
    )
    weight = net.node("DequantizeLinear", quantised, scale, zero)
    net.node("Conv", "computed_out", weight, name="quantised", kernel_shape=[3, 3])
    reasons = _reasons(net.save(tmp_path / "a.onnx"), keep_first=False)
    assert reasons["standard"] == ""
    assert "grouped, depthwise or 1×1" in reasons["depthwise"]
    assert "grouped, depthwise or 1×1" in reasons["pointwise"]
    assert "not constant" in reasons["computed"]
    assert "quantised" in reasons["quantised"]


def test_convolution_in_a_subgraph_is_refused(tmp_path: Path) -> None:
    """A convolution in a branch of If is listed and left alone."""
    info = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.ones((2, 2, 3, 3), np.float32), "w")

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("Conv", ["x", "w"], [name], name=f"conv_{name}")
        return helper.make_graph(
            [node], name, [], [info(name, TensorProto.FLOAT, [1, 2, 6, 6])], [weight]
        )

    node = helper.make_node(
        "If", ["flag"], ["y"], then_branch=branch("t"), else_branch=branch("e")
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            info("x", TensorProto.FLOAT, [1, 2, 8, 8]),
            info("flag", TensorProto.BOOL, []),
        ],
        [info("y", TensorProto.FLOAT, [1, 2, 6, 6])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "a.onnx")
    reasons = _reasons(tmp_path / "a.onnx")
    assert set(reasons) == {"conv_t", "conv_e"}
    assert all("subgraph" in reason for reason in reasons.values())


def test_first_layers_are_kept_unless_named(tmp_path: Path) -> None:
    """Every Conv that no layer with weights precedes is first; --only overrides."""
    net = Net([1, 4, 16, 16])
    one = net.conv(4, 16, name="one")
    two = net.conv(4, 16, name="two", source="x")
    net.node("Add", one, two)
    net.node("Relu")
    net.conv(16, 16, name="three")
    path = net.save(tmp_path / "a.onnx")
    reasons = _reasons(path)
    assert [name for name, why in reasons.items() if "first layer" in why] == [
        "one",
        "two",
    ]
    assert _reasons(path, only=["one"]) == {
        "one": "",
        "two": "not in --only",
        "three": "not in --only",
    }
    assert _reasons(path, skip=["re:^t"], keep_first=False)["three"] == "in --skip"


def test_costlier_block_is_refused_with_what_would_pay(tmp_path: Path) -> None:
    """The refusal names the largest value of the parameter that pays; it does pay."""
    net = Net([1, 8, 16, 16])
    net.conv(8, 32)
    net.conv(32, 32, name="site")
    path = net.save(tmp_path / "a.onnx")
    plan = lambda value: squeeze.convert(  # noqa: E731
        path, "inverted-residual", settings={"expansion": value}, options=PLAN
    ).changes[1]
    refused = plan("6")
    assert not refused.applied
    assert "it would pay with expansion=3" in refused.reason
    assert plan("3").applied
    assert not plan("4").applied


def test_linear_sites_stay_linear(tmp_path: Path) -> None:
    """A convolution before a residual Add gets a block without a last activation."""
    net = Net([1, 8, 10, 10])
    start = net.conv(8, 16)
    net.conv(16, 16, name="branch")
    net.node("Add", net.value, start)
    path = net.save(tmp_path / "a.onnx")
    out = tmp_path / "b.onnx"
    squeeze.convert(path, "effnet", out, only=["branch"], options=QUICK)
    ops = [node.op_type for node in squeeze.load(out).graph]
    assert ops == ["Conv", "Conv", "Relu", "Conv", "Conv", "Relu", "Conv", "Add"]


def test_shared_activation_stays_outside(tmp_path: Path) -> None:
    """A value that others read too is not taken into the block."""
    net = Net([1, 8, 10, 10])
    net.conv(8, 16, name="first")
    value = net.conv(16, 16, name="site")
    net.node("Add", net.node("Relu", value), value)
    path = net.save(tmp_path / "a.onnx")
    out = tmp_path / "b.onnx"
    squeeze.convert(path, "depthwise-separable", out, only=["site"], options=QUICK)
    model = squeeze.load(out)
    assert [n.op_type for n in model.graph] == ["Conv", "Conv", "Conv", "Relu", "Add"]
    assert any(v.name == "site_out" for n in model.graph for v in n.outputs)


def test_same_seed_same_bytes(baseline: Path, tmp_path: Path) -> None:
    """Input, options and seed fix every byte; another seed gives other weights."""
    outs = [tmp_path / f"{i}.onnx" for i in range(3)]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        options = squeeze.Options(bench=False, seed=seed)
        squeeze.convert(baseline, "effnet", out, options=options)
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()


def test_activations_keep_their_scale(baseline: Path, tmp_path: Path) -> None:
    """New weights neither blow up nor silence what follows."""
    out = tmp_path / "out.onnx"
    squeeze.convert(baseline, "effnet", out, options=QUICK)
    logits = run(out, x=images(64, 3, 32, 32))[0]
    assert 0.02 < logits.std() < 50


def test_latency_and_report_of_the_sample(tmp_path: Path) -> None:
    """With measuring on, the report holds medians and an interval around the ratio."""
    out = tmp_path / "out.onnx"
    result = squeeze.convert(SAMPLES / "cifar10_cnn.onnx", "effnet", out, fit="none")
    assert result.latency is not None
    assert result.latency.ratio_low <= result.latency.ratio <= result.latency.ratio_high
    assert result.latency.before_ms > 0
    assert "new weights are not fitted" in result.notes


# -- rules --------------------------------------------------------------------------

RULE = """
summary = "a block"
[params]
width = { default = 2, min = 1 }
[[accept]]
when = "group == 1"
because = "grouped"
[[layer]]
op = "Conv"
out = "cout * width"
window = "all"
stride = "all"
[[layer]]
op = "Activation"
[[layer]]
op = "Conv"
out = "cout"
"""

BROKEN = {
    "window =": ("windoww =", r"layer 1\.windoww: unknown key; did you mean 'window'"),
    "cout * width": (
        "cout * widht",
        r"layer 1\.out: no name 'widht'; did you mean 'width'",
    ),
    'op = "Activation"': (
        'op = "Activate"',
        r"layer 2\.op: no op 'Activate'.*'Activation'",
    ),
    "group == 1": ("open('x')", r"accept 1\.when: .*uses what rules don't have"),
    "default = 2": ("default = 0", r"params\.width\.default: width must be ≥ 1"),
    'out = "cout"\n': ("", r"layer 3\.out: missing"),
    "summary": ("sumary", r"sumary: unknown key; did you mean 'summary'"),
    'stride = "all"': ('stride = "x"', r"layer 1\.stride: must be"),
    'out = "cout"': ('out = "cout / 7"', r"gives .*not a whole number"),
    "[params]": ("[params", "not valid TOML"),
    "cout * width ": ("", ""),
}


@pytest.mark.parametrize("old", [k for k in BROKEN if BROKEN[k][1]])
def test_errors_in_a_rule_name_file_key_and_remedy(old: str, tmp_path: Path) -> None:
    """A typo in a rule is found where it stands, by convert and by rules --check."""
    new, message = BROKEN[old]
    path = tmp_path / "mine.toml"
    path.write_text(RULE.replace(old, new, 1) if old in RULE else "")
    assert path.read_text() != RULE
    with pytest.raises(RuleError, match=message) as error:
        squeeze.convert(SAMPLES / "digits_cnn.onnx", str(path), options=PLAN)
    assert "mine.toml" in str(error.value)
    assert error.value.exit_status == 2
    assert squeeze_cli(["rules", "--check", str(path)]) == 2


def test_a_users_own_rule(tmp_path: Path) -> None:
    """One file adds a block."""
    path = tmp_path / "mine.toml"
    path.write_text(RULE)
    assert squeeze_cli(["rules", "--check", str(path)]) == 0
    out = tmp_path / "out.onnx"
    result = squeeze.convert(
        SAMPLES / "digits_cnn.onnx", str(path), out, allow_costlier=True, options=QUICK
    )
    assert result.applied == 2
    details = {"block": "mine", "params": {"width": 2}, "fit": "start weights"}
    assert result.changes[1].details == details


def test_a_rule_with_the_wrong_output_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule that forgets the stride fails its check; convert refuses such sites."""
    path = tmp_path / "mine.toml"
    path.write_text(RULE.replace('stride = "all"\n', ""))
    assert squeeze_cli(["rules", "--check", str(path)]) == 2
    assert "differs from the site's" in capsys.readouterr().err
    net = Net([1, 8, 16, 16])
    net.conv(8, 16, strides=[2, 2])
    model = net.save(tmp_path / "a.onnx")
    (change,) = squeeze.convert(
        model, str(path), keep_first=False, allow_costlier=True, options=PLAN
    ).changes
    assert "16×16×16 differs from the site's 16×8×8" in change.reason


def test_unknown_block_and_parameter_name_the_nearest() -> None:
    """A misspelt name is bad usage."""
    model = SAMPLES / "digits_cnn.onnx"
    with pytest.raises(UsageError, match="did you mean 'effnet'"):
        squeeze.convert(model, "efnet")
    with pytest.raises(UsageError, match="did you mean 'bottleneck'"):
        squeeze.convert(model, "effnet", settings={"botleneck": 1})
    with pytest.raises(UsageError, match="bottleneck must be ≤ 1, not 2"):
        squeeze.convert(model, "effnet", settings={"bottleneck": 2})


def test_parameters_are_exact_decimals(tmp_path: Path) -> None:
    """floor(100 · 0.29) is 29, which binary fractions get wrong."""
    net = Net([1, 8, 8, 8])
    net.conv(8, 100)
    path = net.save(tmp_path / "a.onnx")
    out = tmp_path / "b.onnx"
    options = dict(settings={"bottleneck": "0.29"}, allow_costlier=True, options=QUICK)
    squeeze.convert(path, "effnet", out, **options)
    first = next(iter(squeeze.load(out).graph))
    assert first.inputs[1].shape[0] == 29
