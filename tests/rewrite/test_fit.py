"""Closed forms, least squares and factorize, through onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import squeeze
from squeeze.errors import SqueezeError, UsageError
from squeeze.rewrite.allocate import Option, allocate
from squeeze.rewrite.convert import convert
from squeeze.rewrite.factorize import factorize
from squeeze.rewrite.fit import forms, ranks
from squeeze.rewrite.fit.read import write
from squeeze.rewrite.fit.source import FitData
from squeeze.rewrite.run import Options
from tests.layers import (
    conv_model,
    factor_error,
    known_spectrum,
    model_of,
    outputs,
    relative,
)

SAMPLES = Path(__file__).parents[2] / "sample_models"
QUICK = Options(bench=False, simplify=False)
RNG = np.random.default_rng(0)


def test_full_rank_stays_exact_on_data() -> None:
    """Least squares on data leaves what is exact alone."""
    proto = conv_model((4, 9, 9), (6, 4, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1])
    x = RNG.normal(size=(64, 4, 9, 9)).astype(np.float32)
    result = factorize(
        ir.from_proto(proto),
        rank=6,
        method="pca",
        allow_costlier=True,
        data=FitData({"x": x}, samples=40),
        options=QUICK,
    )
    assert result.changes[0].fit_error is not None
    assert result.changes[0].fit_error < 1e-9
    assert relative(outputs(result.model, x=x), outputs(proto, x=x)) < 1e-5


# -- fully connected ----------------------------------------------------------------


def test_known_spectrum_of_a_large_layer() -> None:
    """The error is the spectrum's tail, the rank the smallest there is."""
    size = 1024  # tests/benchmarks/fit_cifar.py --fc does 4096
    weight, squared = known_spectrum(size)
    rank = int(np.argmax(np.cumsum(squared) >= 0.9 * squared.sum())) + 1
    error = factor_error(weight, 0.9)
    assert error.rank == rank
    theory = squared[rank:].sum() / squared.sum()
    assert error.relative == pytest.approx(theory, abs=1e-6)


@pytest.mark.parametrize("op", ["gemm", "gemm-transposed", "matmul", "batched"])
def test_fully_connected_layers(op: str) -> None:
    """Gemm, MatMul + Add and batched MatMul: exact at the weight's own rank."""
    low = RNG.normal(size=(12, 3)) @ RNG.normal(size=(3, 10))
    arrays = {"w": low, "b": RNG.normal(size=10)}
    x = RNG.normal(size=(5, 12)).astype(np.float32)
    shape: tuple[int, ...] = (12,)
    if op.startswith("gemm"):
        transposed = op == "gemm-transposed"
        arrays["w"] = low.T if transposed else low
        nodes = [
            helper.make_node(
                "Gemm", ["x", "w", "b"], ["y"], "fc", transB=int(transposed), alpha=0.5
            )
        ]
    else:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["m"], "fc"),
            helper.make_node("Add", ["m", "b"], ["y"], "add"),
        ]
    if op == "batched":
        arrays["w"] = np.stack([low, 2 * low])
        shape, x = (2, 4, 12), RNG.normal(size=(5, 2, 4, 12)).astype(np.float32)
    proto = model_of(nodes, arrays, {"x": shape}, "y")
    data = None if op == "batched" else FitData({"x": np.tile(x, (8, 1))}, samples=30)
    for given_data in (None, data):
        result = factorize(ir.from_proto(proto), rank=3, options=QUICK, data=given_data)
        assert result.applied == 1
        assert relative(outputs(result.model, x=x), outputs(proto, x=x)) < 1e-5


# -- ranks and budgets --------------------------------------------------------------


@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    energy=st.floats(0.05, 1),
)
def test_rank_of_an_energy_is_the_smallest(values: list[float], energy: float) -> None:
    """One rank less keeps less than asked for."""
    spectrum = np.sort(values)[::-1] ** 2
    rank = ranks.by_energy(spectrum, energy)
    assert spectrum[:rank].sum() >= (energy - 1e-9) * spectrum.sum()
    assert rank == 1 or spectrum[: rank - 1].sum() < energy * spectrum.sum()


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (200, 200)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_evbmf_finds_the_rank_under_noise(shape: tuple[int, int], rank: int) -> None:
    """Nakajima et al.: signal well above the noise is counted, noise is not."""
    rows, columns = shape
    clean = RNG.normal(size=(rows, rank)) @ RNG.normal(size=(rank, columns))
    noisy = clean + 0.3 * RNG.normal(size=shape)
    assert ranks.evbmf(np.linalg.svd(noisy, compute_uv=False), rows, columns) == rank


@settings(deadline=None)
@given(st.data())
def test_allocation_is_feasible_and_good(data: st.DataObject) -> None:
    """Within the budget, and no worse than the best of all combinations by much."""
    menu = st.lists(
        st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=3
    )
    rows = data.draw(st.lists(menu, min_size=1, max_size=4))
    menus = {i: [Option(c, loss, None) for c, loss in m] for i, m in enumerate(rows)}
    floor = sum(min(o.cost for o in m) for m in menus.values())
    budget = floor + data.draw(st.integers(0, 30))
    taken = allocate(menus, budget)
    assert sum(o.cost for o in taken.values()) <= budget
    best = _best(list(menus.values()), budget)
    spread = max((o.loss for m in menus.values() for o in m), default=0)
    assert sum(o.loss for o in taken.values()) <= best + spread + 1e-9
    with pytest.raises(SqueezeError, match="out of reach"):
        allocate(menus, floor - 1)


def _best(menus: list[list[Option[None]]], budget: float) -> float:
    if not menus:
        return 0.0
    tries = [
        o.loss + _best(menus[1:], budget - o.cost) for o in menus[0] if o.cost <= budget
    ]
    return min(tries, default=float("inf"))


def test_never_costlier() -> None:
    """A rank past break-even is refused, with the largest one that pays."""
    proto = model_of(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "fc")],
        {"w": RNG.normal(size=(12, 10))},
        {"x": (12,)},
        "y",
    )
    result = factorize(ir.from_proto(proto), rank=6, options=QUICK)
    assert result.applied == 0
    assert "ranks up to 5 pay" in result.changes[0].reason


def test_budget_of_the_whole_network() -> None:
    """--macs is met, and missed with the least that can be reached."""
    path = SAMPLES / "digits_cnn.onnx"
    result = factorize(path, macs=0.5, options=QUICK)
    assert 0.3 * result.before.macs < result.after.macs <= 0.5 * result.before.macs
    with pytest.raises(SqueezeError, match="out of reach: low rank leaves at least"):
        factorize(path, macs=0.001, options=QUICK)


# -- data ---------------------------------------------------------------------------


def test_data_beats_weights_and_more_multipliers_fit_better() -> None:
    """On the digits, fitting to data keeps the accuracy that the weights alone lose."""
    digits = np.load(SAMPLES / "digits.npz")
    test = np.load(SAMPLES / "digits_test.npz")
    path = SAMPLES / "digits_cnn.onnx"

    def accuracy(model: ir.Model) -> float:
        found = outputs(model, input=test["x"]).argmax(1)
        return float((found == test["labels"]).mean())

    errors, scores = [], []
    for multiplier in (1, 2, 4):
        data = FitData({"input": digits["x"]}, samples=400)
        result = convert(
            path,
            "depthwise-separable",
            settings={"multiplier": multiplier},
            allow_costlier=True,
            data=data,
            options=QUICK,
        )
        errors.append(sum(c.fit_error or 0 for c in result.changes))
        scores.append(accuracy(result.model))
        assert any("fitted to" in note for note in result.notes)
    alone = convert(
        path,
        "depthwise-separable",
        settings={"multiplier": 1},
        allow_costlier=True,
        options=QUICK,
    )
    assert errors == sorted(errors, reverse=True)
    assert scores[0] > accuracy(alone.model) + 0.1
    assert scores[2] > accuracy(squeeze.load(path)) - 0.02


@pytest.mark.parametrize("block", ["effnet", "inverted-residual", "effnet-v2"])
def test_blocks_with_activations_inside_are_fitted(block: str) -> None:
    """Least squares of the last layer on the block's own features explains most."""
    digits = np.load(SAMPLES / "digits.npz")
    data = FitData({"input": digits["x"]}, samples=400)
    result = convert(
        SAMPLES / "digits_cnn.onnx",
        block,
        allow_costlier=True,
        data=data,
        options=QUICK,
    )
    errors = [c.fit_error for c in result.changes if c.applied]
    assert errors
    assert all(e is not None and e < 0.9 for e in errors)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """Fitting on data is reproducible."""
    digits = np.load(SAMPLES / "digits.npz")["x"][:100]
    made = []
    for name in ("a", "b"):
        data = FitData({"input": digits}, samples=50)
        path = tmp_path / f"{name}.onnx"
        factorize(SAMPLES / "digits_cnn.onnx", path, rank=0.5, data=data, options=QUICK)
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_a_layer_that_never_varies() -> None:
    """Constant data is fitted to without a crash, and its outputs are kept."""
    proto = conv_model((4, 6, 6), (8, 4, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1])
    x = np.zeros((20, 4, 6, 6), np.float32)
    result = factorize(
        ir.from_proto(proto), rank=2, data=FitData({"x": x}), options=QUICK
    )
    assert relative(outputs(result.model, x=x), outputs(proto, x=x)) < 1e-5


def test_ranks_are_judged_where_rounding_left_no_positive_matrix() -> None:
    """A covariance of few rows, indefinite by a thousandth: errors stay errors."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 5 * 9))
    noise = rng.standard_normal((45, 45))
    inputs = rows.T @ rows - 0.1 * noise @ noise.T
    weight = rng.standard_normal((8, 5, 3, 3))
    flat = weight.reshape(8, -1)
    target = forms.Target(
        inputs, inputs @ flat.T, float(np.trace(flat @ inputs @ flat.T))
    )
    errors = forms.nested_errors(forms.spatial(weight, 6), target)
    assert np.isfinite(errors).all()
    assert (np.diff(errors) <= 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_weights_that_are_no_numbers_are_not_written(value: float) -> None:
    """The message names the weight; it keeps the values that it had."""
    weight = ir.Value(
        name="conv/2.weight", const_value=ir.tensor(np.ones(3, np.float32))
    )
    with pytest.raises(SqueezeError, match=r"'conv/2\.weight' are not finite in float"):
        write({weight: np.array([1.0, value, 2.0])})
    assert weight.const_value is not None
    assert (weight.const_value.numpy() == 1).all()


def test_fit_data_needs_data() -> None:
    """--fit data without --data says what to pass."""
    with pytest.raises(UsageError, match="--data"):
        convert(SAMPLES / "digits_cnn.onnx", "bottleneck", fit="data", options=QUICK)


def test_sweeps_lower_the_error_of_every_form() -> None:
    """Alternating least squares beats the closed form on correlated inputs."""
    weight = RNG.normal(size=(12, 8, 3, 3))
    x = RNG.normal(size=(4000, 10)) @ RNG.normal(size=(10, 72))
    x += 0.1 * RNG.normal(size=x.shape)
    gram = x.T @ x / len(x)
    flat = weight.reshape(12, -1)
    target = forms.Target(gram, gram @ flat.T, float(np.trace(flat @ gram @ flat.T)))
    for start in (
        forms.grouped_pointwise(weight, 8, 1),
        forms.pointwise_grouped(weight, 12, 1),
        forms.spatial(weight, 6),
        forms.tucker(weight, 4, 6),
    ):
        before = target.error(start.kernel())
        after = target.error(forms.sweep(start, target).kernel())
        assert after < 0.8 * before
