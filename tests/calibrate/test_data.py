"""--data in all its forms, and data that doesn't fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import squeeze
from squeeze.calibrate.data import Data, Images, open_data, split
from squeeze.errors import SqueezeError, UsageError
from squeeze.shapes import infer
from tests.builders import SAMPLES, Net, images

X = images(70, 3, 6, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with one image input of 3×6×5."""
    net = Net(["N", 3, 6, 5])
    net.conv(3, 4)
    return net.save(tmp_path_factory.mktemp("data") / "m.onnx")


def _open(spec: object, model: Path, **options: object) -> Data:
    loaded = squeeze.load(model)
    return open_data(spec, loaded, infer(loaded), **options)  # type: ignore[arg-type]


def _all(data: Data) -> np.ndarray:
    return np.concatenate([batch.inputs["x"] for batch in data])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archive(save, model: Path, tmp_path: Path) -> None:
    """An .npz with x, or the input's name, and labels; streamed in batches."""
    for key in ("x", "labels", "y"):
        arrays = {"x": X} if key == "x" else {"x": X, key: np.arange(70)}
        save(tmp_path / "d.npz", **arrays)
        data = _open(tmp_path / "d.npz", model)
        assert np.array_equal(_all(data), X)
        assert max(len(batch) for batch in data) == data.batch_size < 70
        if key != "x":
            labels = np.concatenate([batch.labels for batch in data])
            assert np.array_equal(labels, np.arange(70))


def test_folder_of_archives(model: Path, tmp_path: Path) -> None:
    """Several archives are one set, in the order of their names."""
    for index, part in enumerate((X[:10], X[10:33], X[33:])):
        np.savez(tmp_path / f"{index}.npz", x=part)
    assert np.array_equal(_all(_open(tmp_path, model)), X)


def test_arrays_from_python(model: Path) -> None:
    """The library takes arrays by name."""
    assert np.array_equal(_all(_open({"x": X}, model)), X)


def test_onnx_test_sets(model: Path, tmp_path: Path) -> None:
    """test_data_set_N folders, as the ONNX model zoo has them."""
    for index in range(3):
        folder = tmp_path / f"test_data_set_{index}"
        folder.mkdir()
        tensor = numpy_helper.from_array(X[index : index + 1])
        onnx.save_tensor(tensor, str(folder / "input_0.pb"))
    assert np.array_equal(_all(_open(tmp_path, model)), X[:3])


def test_onnx_test_sets_of_several_samples(model: Path, tmp_path: Path) -> None:
    """Samples are found across the sets, in any order, by index."""
    for index, part in enumerate((X[:4], X[4:5], X[5:11])):
        folder = tmp_path / f"test_data_set_{index}"
        folder.mkdir()
        onnx.save_tensor(numpy_helper.from_array(part), str(folder / "input_0.pb"))
    data = _open(tmp_path, model)
    order = np.array([9, 0, 4, 3, 10])
    assert np.array_equal(_all(data.take(order)), X[order])


def test_image_folders(model: Path, tmp_path: Path) -> None:
    """Class folders give labels; size, mean, std and layout are applied."""
    image = pytest.importorskip("PIL.Image")
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / name).mkdir()
        for index in range(2):
            array = np.full((12, 10, 3), value, np.uint8)
            image.fromarray(array).save(tmp_path / name / f"{index}.png")
    data = _open(tmp_path, model, images=Images(mean=(0.5,) * 3, std=(0.25,) * 3))
    (batch,) = data
    assert sorted(batch.labels) == [0, 0, 1, 1]
    assert batch.inputs["x"].shape == (4, 3, 6, 5)
    assert np.allclose(batch.inputs["x"][:, 0, 0, 0], 4 * batch.labels - 2)


def test_generator(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """python:module:function yields dicts; it is read anew for every pass."""
    (tmp_path / "feed.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for i in range(5):\n"
        "        yield {'x': np.full((7, 3, 6, 5), i, np.float32)}\n"
        "def broken():\n"
        "    yield {'x': 1 / 0}\n"
    )
    monkeypatch.chdir(tmp_path)
    data = _open("python:feed:batches", model)
    assert len(data) == 35
    for _ in range(2):
        assert np.array_equal(_all(data)[:, 0, 0, 0], np.repeat(np.arange(5), 7))
    with pytest.raises(SqueezeError, match="ZeroDivisionError"):
        _open("python:feed:broken", model)
    with pytest.raises(UsageError, match="nothing"):
        _open("python:feed:nothing", model)


def test_split_holds_the_last_fifth_out(model: Path) -> None:
    """Calibration and evaluation share no sample; the split is by seed."""
    x = np.arange(500, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 6, 5))
    data = _open({"x": x.astype(np.float32)}, model)
    parts = split(data, samples=100, seed=3)
    fitted = set(_all(parts.calibration)[:, 0, 0, 0])
    held = set(_all(parts.evaluation)[:, 0, 0, 0])
    assert len(fitted) == 100
    assert not fitted & held
    assert min(held) > 400 - 32
    assert str(len(held)) in parts.described
    again = split(data, samples=100, seed=3)
    assert set(_all(again.calibration)[:, 0, 0, 0]) == fitted


def test_data_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    """Wrong names, shapes, types, NaN, lengths: each named."""
    cases = {
        "no array for input 'x'": {"images": X},
        "don't fit input 'x'": {"x": X[:, :2]},
        "NaN or Inf": {"x": np.where(X > 2, np.nan, X)},
        "different lengths": {"x": X, "labels": np.zeros(3, int)},
        "one integer class": {"x": X, "labels": np.zeros(70)},
        "holds no samples": {"x": X[:0]},
    }
    for message, arrays in cases.items():
        with pytest.raises(SqueezeError, match=message):
            _all(_open(arrays, model))
    with pytest.raises(UsageError, match="no such file"):
        _open(tmp_path / "none", model)
    with pytest.raises(SqueezeError, match=r"no \.npz files, images"):
        _open(tmp_path, model)
    (tmp_path / "d.npz").write_bytes(b"PK nonsense")
    with pytest.raises(SqueezeError, match="not a readable"):
        _open(tmp_path / "d.npz", model)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(UsageError, match=r"not \.npz"):
        _open(tmp_path / "d.csv", model)


def test_sample_data_fits_the_sample_network() -> None:
    """The shipped digits feed the shipped network, with labels."""
    data = _open(SAMPLES / "digits.npz", SAMPLES / "digits_cnn.onnx")
    assert len(data) == 1297
    assert next(iter(data)).labels is not None
