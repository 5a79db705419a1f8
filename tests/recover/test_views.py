"""Pictures that training sees: what they show, when they come again, what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from squeeze.calibrate.data import Data  # noqa: E402
from squeeze.recover import Options, distill  # noqa: E402
from squeeze.recover.feed import Fed  # noqa: E402
from squeeze.recover.module import GraphModule  # noqa: E402
from squeeze.recover.views import Views  # noqa: E402
from tests.recover.test_distill import (  # noqa: E402
    _kill_after,
    _Killed,
    _noise,
    _pair,
    _weights,
)

SIZE, REACH = 16, 2  # a shift is up to an eighth


def _numbered(channels: int, last: bool = False, count: int = 32) -> Fed:
    """Images whose pixels say where they are: 100 × row + column."""
    grid = torch.arange(SIZE)[:, None] * 100.0 + torch.arange(SIZE)
    x = grid.expand(count, channels, SIZE, SIZE).contiguous()
    x = x.permute(0, 2, 3, 1) if last else x
    return Fed({"x": x}, None, torch.arange(count))


def _views(fed: Fed, samples: int = 100_000, **options: object) -> Views:
    return Views(Options(**options), samples, fed.inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_a_picture_is_a_shifted_sample_mirrored_if_in_colour(
    channels: int, last: bool
) -> None:
    """Away from the edges, and with every shift and both directions among many."""
    fed = _numbered(channels, last)
    views, seen = _views(fed), set()
    for epoch in range(4):
        x = views.of(fed, 0, epoch).inputs["x"]
        assert x.shape == fed.inputs["x"].shape
        for image in x.permute(0, 3, 1, 2) if last else x:
            assert torch.equal(image[0], image[-1])
            inner = image[0, REACH:-REACH, REACH:-REACH]
            down, right = inner[1, 0] - inner[0, 0], inner[0, 1] - inner[0, 0]
            assert down == 100
            assert abs(right) == 1
            first = inner[0, 0] if right > 0 else inner[0, -1]
            seen.add((int(first // 100) - REACH, int(first % 100) - REACH, int(right)))
    shifts = range(-REACH, REACH + 1)
    directions = (1, -1) if channels == 3 else (1,)
    assert seen <= {(a, b, d) for a in shifts for b in shifts for d in directions}
    assert {a for a, _, _ in seen} == {b for _, b, _ in seen} == set(shifts)
    assert {d for *_, d in seen} == set(directions)


def test_epochs_take_turns_with_four_views() -> None:
    """Whatever the batch, the fifth epoch shows a sample as the first did."""
    fed = _numbered(3)
    views = _views(fed)
    first = [views.of(fed, 0, epoch) for epoch in range(4)]
    pictures = [f.inputs["x"] for f in first]
    assert not any(f.again for f in first)
    assert not any(
        torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i]
    )
    some = torch.tensor([7, 3, 30])
    part = Fed({"x": fed.inputs["x"][some]}, None, some)
    for epoch in range(4, 8):
        later = views.of(part, 1, epoch)
        assert later.again
        assert later.view == first[epoch - 4].view
        assert torch.equal(later.inputs["x"], pictures[epoch - 4][some])


@pytest.mark.parametrize(
    ("options", "samples"), [({"mix": True}, 100_000), ({"augment": False}, 1_000)]
)
def test_nothing_counts_as_seen(options: dict[str, object], samples: int) -> None:
    """Blends never come again, and too few pictures are no reason to save time."""
    fed = _numbered(3)
    found = _views(fed, samples, **options).of(fed, 1, 50)
    assert found.view is None
    assert not found.again


def test_inputs_that_are_no_images_stay() -> None:
    """A table, several inputs, integers, and images too small to move."""
    for x in (
        torch.randn(8, 3),
        torch.randn(8, 3, 8, 8),
        torch.ones(8, 3, 16, 16).int(),
    ):
        fed = Fed({"x": x}, None, torch.arange(8))
        assert torch.equal(_views(fed).of(fed, 0, 0).inputs["x"], x)
    two = _numbered(3)
    two = dataclasses.replace(
        two, inputs={**two.inputs, "y": torch.randn(32, 3, 16, 16)}
    )
    assert _views(two).of(two, 0, 0).inputs is two.inputs


def _task(monkeypatch: pytest.MonkeyPatch) -> tuple[ir.Model, ir.Model, Data, Options]:
    """A run in which every picture comes three times."""
    monkeypatch.setattr("squeeze.recover.views.VIEWS", 2)
    monkeypatch.setattr("squeeze.recover.views.PICTURES", 1)
    teacher, student = _pair(seed=1, size=SIZE), _pair(seed=2, size=SIZE)
    options = Options(epochs=6, batch=64, block_share=0.0, precision="float32")
    return student, teacher, _noise(teacher, 288), options


def test_what_is_kept_is_what_the_teacher_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without room the teacher runs every time; the student ends the same."""
    task = _task(monkeypatch)
    kept = distill(*task)
    monkeypatch.setattr("squeeze.recover.views.KEPT_BYTES", 0)
    again = distill(*task)
    first, second = _weights(kept.model), _weights(again.model)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_runs_once_for_every_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 24 batches in 6 epochs it sees the 8 of the first two."""
    task = _task(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr("squeeze.recover.views.KEPT_BYTES", 0)
        always = _runs(task, monkeypatch)
    teacher = _runs(task, monkeypatch)
    assert always[1] == teacher[1]
    assert always[0] - teacher[0] == 16


def _runs(task: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the teacher and the student ran, the rarer first."""
    runs: dict[int, int] = {}
    plain = GraphModule.run

    def run(module: GraphModule, *args: Any, **kw: Any) -> dict[str, torch.Tensor]:
        runs[id(module)] = runs.get(id(module), 0) + 1
        return plain(module, *args, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(GraphModule, "run", run)
        distill(*task)
    return sorted(runs.values())


@pytest.mark.parametrize("updates", [5, 11, 14, 21])
def test_resumed_where_pictures_come_again(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept is gone after an interruption, and its result is not changed."""
    monkeypatch.setattr("squeeze.recover.train.CHECKPOINT_SECONDS", 0.0)
    task = _task(monkeypatch)
    whole, file = distill(*task), tmp_path / "state"
    with pytest.raises(_Killed):
        distill(*task, checkpoint=file, progress=_kill_after(updates))
    resumed = distill(*task, checkpoint=file, resume=True)
    first, second = _weights(whole.model), _weights(resumed.model)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-6)
    assert len(whole.history) == len(resumed.history)
