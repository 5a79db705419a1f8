"""The interpreter's table of ops, op by op."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from squeeze import session  # noqa: E402
from squeeze.model import normalize  # noqa: E402
from squeeze.recover import to_torch  # noqa: E402
from squeeze.recover.objective import mean_squared  # noqa: E402
from squeeze.recover.ops import TABLE, Op  # noqa: E402

from .op_cases import CASES, Case  # noqa: E402

RUNNABLE = {"Swish"}  # in the opset, not yet in onnxruntime


def module_of(case: Case):
    module = to_torch(normalize(ir.from_proto(case.model())))
    assert not any(step.island for step in module.steps)
    return module


def feeds_of(case: Case) -> dict[str, np.ndarray]:
    return {
        f"x{i}": x
        for i, x in enumerate(case.inputs)
        if x is not None and i not in case.fixed
    }


def test_every_op_has_a_case():
    """No row of the table goes without a comparison with onnxruntime."""
    assert set(TABLE) - {case.op for case in CASES} == RUNNABLE


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_equals_onnxruntime(case):
    """Every case gives onnxruntime's values, shapes and kinds of number."""
    feeds = feeds_of(case)
    runner = session.create(case.model().SerializeToString(), optimize=False)
    expected = runner.run(None, feeds)
    module = module_of(case)
    with torch.no_grad():
        found = module.run(
            {k: torch.from_numpy(np.asarray(v)) for k, v in feeds.items()}
        )
    for name, wanted in zip(module.output_names, expected, strict=True):
        own = found[name].numpy()
        assert own.shape == np.shape(wanted)
        assert (own.dtype.kind == "f") == (wanted.dtype.kind == "f")
        np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=case.tolerance)


@pytest.mark.parametrize("case", [c for c in CASES if c.gradient], ids=lambda c: c.id)
def test_gradient_equals_finite_differences(case):
    """The gradient of every case with one is that of finite differences."""
    module = module_of(case).double()
    feeds = {k: torch.from_numpy(np.asarray(v)) for k, v in feeds_of(case).items()}
    smooth = {
        k: v.double().requires_grad_()
        for k, v in feeds.items()
        if v.is_floating_point()
    }
    fixed = {k: v for k, v in feeds.items() if k not in smooth}
    names = list(smooth)

    def function(*xs):
        found = module.run({**fixed, **dict(zip(names, xs, strict=True))})
        return tuple(v for v in found.values() if v.is_floating_point())

    assert torch.autograd.gradcheck(
        function, tuple(smooth.values()), eps=1e-6, atol=1e-4
    )


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2)]
)
def test_depthwise_in_bfloat16_is_what_float32_gives(
    multiplier: int, kernel: int, stride: int, dilation: int
):
    """Every form of a depthwise convolution, and its gradients, in half the bits."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(4, 8, 9, 9)).astype(np.float32))
    w = rng.normal(size=(8 * multiplier, 1, kernel, kernel)).astype(np.float32)
    settings = {"group": 8, "strides": [stride] * 2, "dilations": [dilation] * 2}

    def run(narrow: bool) -> list[torch.Tensor]:
        own = [x.clone().requires_grad_(), torch.tensor(w, requires_grad=True)]
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = TABLE["Conv"](Op("Conv", 18, settings, 1), *own)
        return [y, *torch.autograd.grad(y.float().square().sum(), own)]

    for narrow, wide in zip(run(True), run(False), strict=True):
        assert (narrow.float() - wide).norm() < 0.02 * wide.norm()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_the_feature_loss_is_squared_error_over_variance(kind: torch.dtype):
    """Its value and its gradient, with the sums in float32 at least."""
    rng = np.random.default_rng(0)
    own = torch.tensor(rng.normal(size=(8, 4, 5, 5)), dtype=kind, requires_grad=True)
    target = torch.tensor(rng.normal(3, 2, size=(8, 4, 5, 5)), dtype=kind)
    wide = own.detach().double().requires_grad_()
    expected = (wide - target).square().mean() / target.double().var(correction=0)
    expected.backward()
    found = mean_squared(own, target)
    found.backward()
    tolerance = 1e-6 if kind == torch.float64 else 1e-2
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (own.grad - wide.grad).norm() < tolerance * wide.grad.norm()
