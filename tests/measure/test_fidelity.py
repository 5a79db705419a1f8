"""Outputs compared: against numpy, with labels, and where they can't be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from squeeze.calibrate.data import open_data
from squeeze.errors import SqueezeError
from squeeze.measure import cases, fidelity, trace
from tests.builders import SAMPLES, Net

DIGITS = SAMPLES / "digits_cnn.onnx"
TEST = SAMPLES / "digits_test.npz"


def _changed(source: Path, target: Path, weight: str, change: float) -> Path:
    """A copy with one weight multiplied by 1 + change, which may be NaN."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == weight:
            array = numpy_helper.to_array(tensor) * np.float32(1 + change)
            tensor.CopyFrom(numpy_helper.from_array(array, weight))
    onnx.save(model, target)
    return target


def _weight(path: Path) -> str:
    model = onnx.load(path)
    return next(
        i for n in model.graph.node if n.op_type == "Conv" for i in n.input[1:2]
    )


def _data(path: Path = DIGITS):  # type: ignore[no-untyped-def]
    case = cases.load(path)
    return open_data(str(TEST), case.model, case.shapes)


def test_a_model_equals_itself() -> None:
    """No error, everything agrees, and the accuracy differs by nothing."""
    found = fidelity.compare_outputs(DIGITS, DIGITS, _data())
    (output,) = found.outputs
    assert output.equal
    assert (output.relative, output.top1, output.snr_db) == (0.0, 1.0, None)
    assert output.cosine == pytest.approx(1)
    assert found.accuracy is not None
    assert found.accuracy.difference == 0
    assert found.accuracy.low < 0 < found.accuracy.high
    assert found.samples == len(_data())


def test_figures_are_numpys(tmp_path: Path) -> None:
    """Streamed over batches, the figures are those of all outputs at once."""
    new = _changed(DIGITS, tmp_path / "new.onnx", _weight(DIGITS), 0.5)
    found = fidelity.compare_outputs(DIGITS, new, _data())
    (output,) = found.outputs
    archive = np.load(TEST)
    x = np.concatenate(
        [batch.inputs[s.name] for batch in _data() for s in _data().specs]
    )
    labels = np.concatenate([b.labels for b in _data() if b.labels is not None])
    del archive
    name = ort.InferenceSession(str(DIGITS)).get_inputs()[0].name
    a, b = (
        ort.InferenceSession(str(p)).run(None, {name: x})[0].astype(np.float64)
        for p in (DIGITS, new)
    )
    assert output.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-4)
    assert output.mean_abs == pytest.approx(np.abs(a - b).mean(), rel=1e-4)
    relative = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert output.relative == pytest.approx(relative, rel=1e-4)
    assert output.snr_db == pytest.approx(-20 * np.log10(relative), rel=1e-3)
    assert output.top1 == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert found.accuracy is not None
    assert found.accuracy.base == pytest.approx((a.argmax(1) == labels).mean())
    assert found.accuracy.new == pytest.approx((b.argmax(1) == labels).mean())
    summary = fidelity.summary(found, "held out")
    assert summary.relative_error == pytest.approx(relative, rel=1e-4)
    assert summary.accuracy_after == found.accuracy.new


def test_nan_is_never_similar(tmp_path: Path) -> None:
    """NaN in the new model is counted, and no error figure is given."""
    new = _changed(DIGITS, tmp_path / "new.onnx", _weight(DIGITS), float("nan"))
    found = fidelity.compare_outputs(DIGITS, new, _data())
    (output,) = found.outputs
    assert output.nonfinite_base == 0
    assert output.nonfinite_new == output.elements
    assert output.max_abs is output.relative is output.top1 is None
    assert np.isnan(found.relative_error)


def test_different_models_are_refused(tmp_path: Path) -> None:
    """Inputs or outputs that differ are named with both files."""
    other = Net([1, 3, 8, 8])
    other.conv(3, 4)
    path = other.save(tmp_path / "other.onnx")
    with pytest.raises(SqueezeError, match=r"inputs .* differ.*other\.onnx"):
        fidelity.compare_outputs(DIGITS, path, _data())


def test_random_inputs_are_said_to_be_random() -> None:
    """Without data the source names the seed, and the same seed gives the same."""
    case = cases.load(DIGITS)
    pair = [
        fidelity.compare_outputs(DIGITS, DIGITS, shapes=case.shapes, seed=3, batches=2)
        for _ in range(2)
    ]
    assert pair[0] == pair[1]
    assert "random" in pair[0].source
    assert pair[0].accuracy is None


def test_the_layer_where_the_error_arises_is_found(tmp_path: Path) -> None:
    """Values before the changed convolution are equal; it adds the first error."""
    model = onnx.load(DIGITS)
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    new = _changed(DIGITS, tmp_path / "new.onnx", convs[-1].input[1], 0.3)
    found = trace.differences(cases.load(DIGITS), cases.load(new))
    wrong = [d for d in found if d.relative]
    assert wrong[0].layer == convs[-1].name
    assert wrong[0].added == wrong[0].relative
    assert all(d.added == d.relative == 0 for d in found[: found.index(wrong[0])])
