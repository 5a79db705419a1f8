"""Distillation: what is learned, kept, resumed, and refused."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from squeeze import load, shapes  # noqa: E402
from squeeze.calibrate.data import Data, open_data  # noqa: E402
from squeeze.errors import SqueezeError, UsageError  # noqa: E402
from squeeze.recover import (  # noqa: E402
    Files,
    Options,
    checkpoint,
    distill,
    distill_files,
    to_torch,
)
from squeeze.recover.optimizer import LARGEST, Optimizer, orthogonal  # noqa: E402
from squeeze.recover.options import Progress  # noqa: E402
from squeeze.rewrite.convert import convert  # noqa: E402
from squeeze.rewrite.run import Options as RewriteOptions  # noqa: E402
from tests.builders import SAMPLES, Net, run  # noqa: E402

DIGITS = SAMPLES / "digits_cnn.onnx"


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Small networks gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _data(teacher: ir.Model, name: str = "digits.npz") -> Data:
    return open_data(SAMPLES / name, teacher, shapes.infer(teacher))


def _student(block: str = "depthwise-separable") -> ir.Model:
    return convert(DIGITS, block, options=RewriteOptions(bench=False)).model


def _weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def _accuracy(model: ir.Model | Path) -> float:
    test = np.load(SAMPLES / "digits_test.npz")
    given = model if isinstance(model, Path) else ir.to_proto(model)
    return float((run(given, x=test["x"])[0].argmax(1) == test["labels"]).mean())


def _pair(outputs: int = 4, seed: int = 1, size: int = 8) -> ir.Model:
    """A tiny image classifier; two seeds make a teacher and a student."""
    net = Net(["N", 3, size, size], seed=seed)
    net.conv(3, 8)
    net.node("Relu", name="act")
    net.conv(8, 8)
    net.node("Relu", name="act2")
    net.node("GlobalAveragePool")
    net.node("Flatten")
    net.gemm(8, outputs)
    return ir.from_proto(net.model())


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _noise(
    teacher: ir.Model, count: int = 200, labels: bool = False, seed: int = 3
) -> Data:
    rng = np.random.default_rng(seed)
    shape = [count, *teacher.graph.inputs[0].shape[1:]]
    arrays = {"x": rng.standard_normal(shape).astype(np.float32)}
    if labels:
        arrays["labels"] = rng.integers(0, 4, count)
    return open_data(arrays, teacher, shapes.infer(teacher))


def test_digits_within_half_a_point_in_a_minute() -> None:
    """No labels, fewer MACs, the teacher's accuracy."""
    teacher = load(DIGITS)
    started = time.process_time()  # other processes' time is not ours
    done = distill(_student(), teacher, _data(teacher))
    assert time.process_time() - started < 60
    assert _accuracy(done.model) > _accuracy(DIGITS) - 0.005
    assert done.before.agreement is not None
    assert done.before.agreement < 0.5 < 0.95 < (done.after.agreement or 0)


def test_names_opset_inputs_and_outputs_stay() -> None:
    """Only values change: every node and initializer keeps its name and type."""
    teacher, student = load(DIGITS), _student()
    before = ir.to_proto(student)
    done = distill(student, teacher, _data(teacher), Options(epochs=2))
    after = ir.to_proto(done.model)
    assert after.graph.node == before.graph.node
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert after.opset_import == before.opset_import
    old = {t.name: (t.data_type, t.dims) for t in before.graph.initializer}
    assert old == {t.name: (t.data_type, t.dims) for t in after.graph.initializer}
    onnx.checker.check_model(after, full_check=True)
    assert ir.to_proto(student) == before


def test_the_written_model_scores_as_reported() -> None:
    """The agreement of the report is that of the model in onnxruntime."""
    teacher = load(DIGITS)
    evaluation = _data(teacher, "digits_test.npz")
    done = distill(
        _student(), teacher, _data(teacher), Options(epochs=3), evaluation=evaluation
    )
    x = np.load(SAMPLES / "digits_test.npz")["x"]
    ours = run(ir.to_proto(done.model), x=x)[0].argmax(1)
    theirs = run(DIGITS, x=x)[0].argmax(1)
    assert done.after.agreement == pytest.approx((ours == theirs).mean(), abs=0.003)
    assert done.after.accuracy == pytest.approx(_accuracy(done.model), abs=0.003)


def test_replaced_sites_are_found_and_learn_first() -> None:
    """Sites are shared values behind new weights; their phase trains only these."""
    teacher, student = load(DIGITS), _student()
    done = distill(
        student, teacher, _data(teacher), Options(epochs=3, block_share=0.34)
    )
    assert len(done.sites) == 2
    assert [e.phase for e in done.history] == ["blocks", "whole", "whole"]
    blocks = distill(
        student, teacher, _data(teacher), Options(epochs=1, block_share=1.0)
    )
    old, new = _weights(student), _weights(blocks.model)
    changed = {n for n in old if not np.array_equal(old[n], new[n])}
    assert changed
    assert changed <= {n for n in old if "depthwise-separable" in n}


def test_the_same_seed_gives_the_same_weights() -> None:
    """Two runs on the CPU agree bit for bit; another seed does not."""
    teacher, student = _pair(seed=1), _pair(seed=2)
    data = _noise(teacher)
    first, second, other = (
        _weights(distill(student, teacher, data, Options(epochs=2, seed=s)).model)
        for s in (0, 0, 1)
    )
    assert all(np.array_equal(first[n], second[n]) for n in first)
    assert not all(np.array_equal(first[n], other[n]) for n in first)


class _Killed(BaseException):
    """As abrupt as a signal: no handler of ours catches it."""


def _kill_after(updates: int) -> Callable[[Progress], None]:
    seen = [0]

    def progress(_: Progress) -> None:
        seen[0] += 1
        if seen[0] == updates:
            raise _Killed

    return progress


@pytest.mark.parametrize("updates", [3, 9, 16, 23])
def test_resumed_equals_uninterrupted(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any update and resumed, training ends in the same weights."""
    monkeypatch.setattr("squeeze.recover.train.CHECKPOINT_SECONDS", 0.0)
    teacher, student = load(DIGITS), _student()
    data = _data(teacher).take(np.arange(400))
    options = Options(epochs=4, batch=64, block_share=0.25)
    whole = distill(student, teacher, data, options)
    file = tmp_path / "state"
    with pytest.raises(_Killed):
        distill(
            student,
            teacher,
            data,
            options,
            checkpoint=file,
            progress=_kill_after(updates),
        )
    resumed = distill(student, teacher, data, options, checkpoint=file, resume=True)
    first, second = _weights(whole.model), _weights(resumed.model)
    assert all(np.array_equal(first[n], second[n]) for n in first)
    assert [e.score for e in whole.history] == [e.score for e in resumed.history]
    assert resumed.before == whole.before


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """The message says what differs, or that there is nothing to resume."""
    teacher, student = _pair(seed=1), _pair(seed=2)
    file, data = tmp_path / "state", _noise(teacher)
    with pytest.raises(UsageError, match="no checkpoint"):
        distill(student, teacher, data, Options(epochs=1), checkpoint=file, resume=True)
    distill(student, teacher, data, Options(epochs=1), checkpoint=file)
    with pytest.raises(SqueezeError, match="seed was 0, is 5"):
        distill(
            student,
            teacher,
            data,
            Options(epochs=1, seed=5),
            checkpoint=file,
            resume=True,
        )
    with pytest.raises(SqueezeError, match="another student"):
        distill(
            _pair(seed=9),
            teacher,
            data,
            Options(epochs=1),
            checkpoint=file,
            resume=True,
        )
    other = _noise(teacher, seed=4)
    for given in ({"data": other}, {"data": data, "evaluation": other}):
        with pytest.raises(SqueezeError, match=r"another data.*delete it"):
            distill(
                student,
                teacher,
                options=Options(epochs=1),
                checkpoint=file,
                resume=True,
                **given,  # type: ignore[arg-type]
            )
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(SqueezeError, match="not a checkpoint"):
        distill(student, teacher, data, Options(epochs=1), checkpoint=file, resume=True)


def test_nan_stops_with_the_last_good_state() -> None:
    """A loss that is no number ends training, not the model."""
    teacher, student = _pair(seed=1), _pair(seed=2)
    done = distill(
        student,
        teacher,
        _noise(teacher),
        Options(epochs=5, learning_rate=1e30, batch_norm=False),
    )
    assert "the loss became" in done.stopped
    assert "learning-rate" in done.stopped
    assert done.after.loss <= done.before.loss
    assert all(np.isfinite(w).all() for w in _weights(done.model).values())


def test_the_best_state_is_kept() -> None:
    """However badly it goes, the result is never worse than what came in."""
    teacher, student = _pair(seed=1), _pair(seed=2)
    good = distill(student, teacher, _noise(teacher), Options(epochs=20)).model
    done = distill(
        good, teacher, _noise(teacher), Options(epochs=6, learning_rate=3.0, patience=2)
    )
    assert done.after.loss <= done.before.loss
    assert done.after.loss == pytest.approx(
        min([done.before.loss, *(e.score.loss for e in done.history)]), rel=1e-3
    )


def test_a_full_disk_costs_the_checkpoint_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that can't be written are a note; the result is there."""
    save = checkpoint.save

    def once(*arguments: Any) -> None:
        save(*arguments)
        monkeypatch.setattr(checkpoint, "save", _full)

    monkeypatch.setattr(checkpoint, "save", once)
    teacher = _pair(seed=1)
    done = distill(
        _pair(seed=2),
        teacher,
        _noise(teacher),
        Options(epochs=2),
        checkpoint=tmp_path / "state",
    )
    assert len(done.notes) == 1
    assert "No space left" in done.notes[0]
    assert done.after.loss < done.before.loss


def test_no_room_for_a_checkpoint_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained that could be lost."""
    monkeypatch.setattr(checkpoint, "save", _full)
    teacher, steps = _pair(seed=1), list[Progress]()
    with pytest.raises(SqueezeError, match=r"state: .*No space left.* another -o"):
        distill(
            *(_pair(seed=2), teacher, _noise(teacher), Options(epochs=2)),
            checkpoint=tmp_path / "state",
            progress=steps.append,
        )
    assert not steps


def test_a_full_disk_at_the_end_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the model can't be written, --resume writes it without training again."""
    onnx.save(ir.to_proto(_student()), tmp_path / "student.onnx")
    files = Files(tmp_path / "student.onnx", DIGITS, str(SAMPLES / "digits_test.npz"))

    with monkeypatch.context() as patch:
        patch.setattr(ir, "save", _full)
        with pytest.raises(SqueezeError, match=r"No space left.*--resume"):
            distill_files(files, Options(epochs=2))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "student.distilled.onnx.checkpoint",
        "student.onnx",
    ]
    with pytest.raises(UsageError, match="--resume"):
        distill_files(files, Options(epochs=2))
    done = distill_files(files, Options(epochs=2), resume=True)
    assert len(done.history) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "student.distilled.onnx",
        "student.onnx",
    ]


def test_minutes_take_the_place_of_epochs() -> None:
    """Training ends when its time is over, in the middle of an epoch if need be."""
    teacher = load(DIGITS)
    started = time.monotonic()
    done = distill(_student(), teacher, _data(teacher), Options(minutes=0.05))
    assert 2.5 < time.monotonic() - started < 15
    assert done.history[-1].epochs is None
    assert {e.phase for e in done.history} == {"blocks", "whole"}


def test_images_and_embeddings_learn_by_mean_squared_error() -> None:
    """An autoencoder's output is compared by value, and gets closer."""
    teacher = load(SAMPLES / "digits_autoencoder.onnx")
    student = load(SAMPLES / "digits_autoencoder.onnx")
    rng = np.random.default_rng(0)
    for name, value in student.graph.initializers.items():
        array = value.const_value.numpy()
        if array.ndim == 4:
            noisy = array + 0.3 * array.std() * rng.standard_normal(array.shape)
            value.const_value = ir.Tensor(noisy.astype(np.float32), name=name)
    done = distill(student, teacher, _data(teacher), Options(epochs=5))
    assert done.after.agreement is None
    assert done.after.error < 0.5 * done.before.error


def test_probabilities_are_soft_targets_too() -> None:
    """A network that ends in Softmax is distilled by its class probabilities."""

    def with_softmax(seed: int) -> ir.Model:
        net = Net(["N", 6], seed=seed)
        net.gemm(6, 16)
        net.node("Relu")
        net.gemm(16, 4)
        net.node("Softmax", net.value_before, axis=-1)
        return ir.from_proto(net.model())

    teacher = with_softmax(1)
    done = distill(with_softmax(2), teacher, _noise(teacher, 600), Options(epochs=30))
    assert (done.after.agreement or 0) > 0.9 > (done.before.agreement or 1)


def test_labels_count_when_they_are_weighed() -> None:
    """A label weight puts them into the loss; without labels it is refused."""
    teacher, student = _pair(seed=1), _pair(seed=2)
    labelled = _noise(teacher, labels=True)
    plain = distill(student, teacher, labelled, Options(epochs=2))
    weighed = distill(student, teacher, labelled, Options(epochs=2, label_weight=1.0))
    assert plain.before.accuracy == weighed.before.accuracy
    assert weighed.before.loss > plain.before.loss + 0.5
    with pytest.raises(UsageError, match="no labels"):
        distill(student, teacher, _noise(teacher), Options(label_weight=1.0))


def test_a_student_of_lower_resolution_sees_smaller_images() -> None:
    """The teacher sees the data as it is, the student the same images resized."""
    teacher, student = _pair(seed=1, size=16), _pair(seed=1, size=8)
    done = distill(student, teacher, _noise(teacher), Options(epochs=3))
    assert done.after.loss < done.before.loss
    assert list(done.model.graph.inputs[0].shape)[1:] == [3, 8, 8]


def test_a_student_of_lower_resolution_is_written(tmp_path: Path) -> None:
    """The file is tried at its own size, with the teacher's data."""
    for name, size in (("teacher", 16), ("student", 8)):
        onnx.save(ir.to_proto(_pair(size=size)), tmp_path / f"{name}.onnx")
    x = np.random.default_rng(0).standard_normal((60, 3, 16, 16), np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    student, teacher, data = (
        tmp_path / name for name in ("student.onnx", "teacher.onnx", "d.npz")
    )
    files = Files(student, teacher, str(data))
    distill_files(files, Options(epochs=2))
    assert run(files.writes, x=x[:2, :, :8, :8])[0].shape == (2, 4)
    assert not files.checkpoint.exists()


def test_the_teacher_is_never_written_over(tmp_path: Path) -> None:
    """`-o` equal to the teacher would lose the original."""
    for name in ("teacher", "student"):
        onnx.save(ir.to_proto(_pair()), tmp_path / f"{name}.onnx")
    teacher = tmp_path / "teacher.onnx"
    files = Files(tmp_path / "student.onnx", teacher, "d.npz", output=teacher)
    with pytest.raises(UsageError, match="is the teacher"):
        distill_files(files, Options(epochs=1))
    files = dataclasses.replace(files, teacher=tmp_path / "gone.onnx")
    with pytest.raises(UsageError, match=r"gone.onnx: no such file"):
        distill_files(files, Options(epochs=1))


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_any_rank_are_trained(rank: int) -> None:
    """Series and volumes, with normalisation behind their convolutions."""

    def net(seed: int) -> ir.Model:
        made = Net(["N", 2, *[6] * rank], seed=seed)
        made.conv(2, 4, [3] * rank)
        made.node("Relu")
        made.node("GlobalAveragePool")
        made.node("Flatten")
        made.gemm(4, 3)
        return ir.from_proto(made.model())

    teacher = net(1)
    done = distill(net(2), teacher, _noise(teacher), Options(epochs=5))
    assert done.normalised == 1
    assert done.after.loss < done.before.loss


def test_an_offset_of_all_outputs_is_learned_and_reported() -> None:
    """Softmax does not see it, an embedding or a regression does."""
    teacher, student = _pair(), _pair()
    bias = student.graph.initializers["w5"]
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name="w5")
    done = distill(student, teacher, _noise(teacher), Options(epochs=40))
    assert done.before.error > 1
    assert done.after.error < 0.1 * done.before.error
    assert done.before.agreement == 1


@pytest.mark.parametrize("softmax", [True, False])
def test_classes_lie_on_the_axis_of_the_softmax(softmax: bool) -> None:
    """Segmentation, or `--loss soft`: each position has its class."""

    def net(seed: int) -> ir.Model:
        made = Net(["N", 3, 6, 5], seed=seed)
        made.conv(3, 4)
        if softmax:
            made.node("Softmax", axis=1)
        return ir.from_proto(made.model())

    teacher, student = net(1), net(2)
    evaluation = _noise(teacher, 64, seed=8)
    options = Options(epochs=5, loss="auto" if softmax else "soft")
    done = distill(student, teacher, _noise(teacher), options, evaluation=evaluation)
    x = np.concatenate([b.inputs["x"] for b in evaluation])
    scores = [run(ir.to_proto(m), x=x)[0] for m in (teacher, student, done.model)]
    theirs, before, after = (s.argmax(1) for s in scores)
    assert done.before.agreement == pytest.approx((before == theirs).mean(), abs=1e-3)
    assert done.after.agreement == pytest.approx((after == theirs).mean(), abs=1e-3)
    assert done.after.loss < 0.5 * done.before.loss


def test_names_like_those_of_the_normalisation_are_kept_apart(tmp_path: Path) -> None:
    """A resumed run restores every weight, whatever it is called."""

    def net(seed: int) -> ir.Model:
        proto = ir.to_proto(_pair(seed=seed))
        weight = next(t for t in proto.graph.initializer if t.name == "w0")
        weight.name = "norms.0.weight"
        first = next(n for n in proto.graph.node if "w0" in n.input)
        first.input[1] = "norms.0.weight"
        return ir.from_proto(proto)

    teacher, student = net(1), net(2)
    data, options = _noise(teacher), Options(epochs=4)
    whole = distill(student, teacher, data, options)
    assert whole.normalised == 2
    file = tmp_path / "state"
    with pytest.raises(_Killed):
        distill(
            *(student, teacher, data, options),
            checkpoint=file,
            progress=_kill_after(25),
        )
    resumed = distill(student, teacher, data, options, checkpoint=file, resume=True)
    first, second = _weights(whole.model), _weights(resumed.model)
    assert all(np.array_equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": float("nan")}, "--minutes: nan"),
        ({"learning_rate": float("inf")}, "--learning-rate: inf"),
        ({"mix": True, "augment": False}, "--mix"),
        ({"mix": True, "label_weight": 1.0}, "--mix"),
        ({"batch": 1, "batch_norm": True}, "--batch-norm"),
    ],
)
def test_settings_that_do_nothing_are_refused(
    options: dict[str, Any], message: str
) -> None:
    """A setting without effect is an error that names it."""
    teacher = _pair(seed=1)
    data = _noise(teacher, labels=True)
    with pytest.raises(UsageError, match=message):
        distill(_pair(seed=2), teacher, data, Options(epochs=1, **options))


def test_a_label_beyond_the_classes_is_named() -> None:
    """Four outputs, labels up to 6."""
    teacher = _pair(seed=1)
    x = np.random.default_rng(0).standard_normal((50, 3, 8, 8), np.float32)
    arrays = {"x": x, "labels": np.arange(50) % 7}
    data = open_data(arrays, teacher, shapes.infer(teacher))
    with pytest.raises(SqueezeError, match=r"a label is 6, .* classes 0 to 3"):
        distill(_pair(seed=2), teacher, data, Options(epochs=1, label_weight=1.0))


def test_large_samples_are_read_in_smaller_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every sample comes once, whatever fits."""
    from squeeze.recover import feed

    monkeypatch.setattr(feed, "CACHE_BYTES", 0)
    monkeypatch.setattr(feed, "CHUNK_BYTES", 100 * 3 * 8 * 8 * 4)
    counts, read = list[int](), feed.read

    def counted(data: Data) -> feed.Fed:
        counts.append(len(data))
        return read(data)

    monkeypatch.setattr(feed, "read", counted)
    fed = feed.Feed(_noise(_pair(), 320), 32, 0)
    batches = [b.samples for b in fed.epoch(0) if b.samples is not None]
    assert sorted(torch.cat(batches).tolist()) == list(range(320))
    assert max(counts) == 96


def test_held_out_samples_fit_the_memory_they_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The report says how many there were; an eighth of a fifth is the least."""
    teacher = _pair(seed=1)
    counts = []
    for allowed in (10**9, 16 * 800, 1):
        monkeypatch.setattr("squeeze.recover.run.HELD_BYTES", allowed)
        options = Options(epochs=1, batch=8)
        done = distill(_pair(seed=2), teacher, _noise(teacher, 400), options)
        counts.append(done.held_out)
    assert counts == [64, 16, 8]


def test_a_graph_bound_to_its_batch_accumulates_gradients() -> None:
    """A batch that is written into the graph is used as it is, several per update."""

    def bound(seed: int) -> ir.Model:
        net = Net([2, 6], seed=seed)
        net.gemm(6, 5)
        net.node("Transpose", net.value_before, perm=[1, 0])
        net.node("MatMul", net.value_before, net.weight(np.eye(2)))
        net.node("Transpose", net.value_before, perm=[1, 0])
        return ir.from_proto(net.model())

    teacher = bound(1)
    done = distill(bound(2), teacher, _noise(teacher), Options(epochs=40, loss="mse"))
    assert done.after.error < 0.5 * done.before.error


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: _pair(outputs=5), r"output .* is 2×5 in the student and 2×4"),
        (lambda: load(SAMPLES / "adder_mlp.onnx"), "inputs are input, the teacher's x"),
    ],
)
def test_networks_that_do_not_fit_are_refused(student: Any, message: str) -> None:
    """Other inputs or outputs are an error that names both sides."""
    teacher = _pair(seed=1)
    with pytest.raises(SqueezeError, match=message):
        distill(student(), teacher, _noise(teacher))


def test_nothing_to_train_names_the_op_in_the_way() -> None:
    """Weights that only an op without gradient leads to can't be trained."""

    def pooled(channels: int, seed: int) -> ir.Model:
        net = Net(["N", 2, 6, 6], seed=seed)
        net.conv(2, channels)
        net.node("LpPool", name="pool", kernel_shape=[2, 2])
        net.node("ReduceMean", net.value_before, axes=[1])
        return ir.from_proto(net.model())

    teacher = pooled(channels=3, seed=0)
    # with the same channels, the value before the unknown op can be learned instead
    done = distill(pooled(3, 5), teacher, _noise(teacher), Options(epochs=5))
    assert done.after.loss < done.before.loss
    with pytest.raises(SqueezeError, match="LpPool 'pool'"):
        distill(pooled(4, 5), teacher, _noise(teacher), Options(epochs=1))


def test_too_few_samples_say_so() -> None:
    """Four samples leave none to judge by."""
    teacher = _pair(seed=1)
    with pytest.raises(SqueezeError, match="too few"):
        distill(_pair(seed=2), teacher, _noise(teacher, 4))


def test_l1_shrinks_activations() -> None:
    """The L1 term leaves smaller activations than training without it."""
    teacher = load(DIGITS)
    data = _data(teacher).take(np.arange(400))
    x = torch.from_numpy(np.load(SAMPLES / "digits_test.npz")["x"])
    sizes = []
    for weight in (0.0, 1.0):
        options = Options(epochs=4, l1=weight, batch_norm=False)
        module = to_torch(distill(load(DIGITS), teacher, data, options).model)
        values = module.run({"input": x}, ["relu1_out", "relu2_out", "relu3_out"])
        sizes.append(sum(v.detach().mean().item() for v in values.values()))
    assert sizes[1] < 0.8 * sizes[0]


def test_an_update_of_a_matrix_has_singular_values_of_about_one() -> None:
    """Muon's update keeps the gradient's directions, whatever their sizes."""
    rng = np.random.default_rng(0)
    for shape in ((6, 20), (20, 6), (1, 9)):
        x = torch.tensor(rng.normal(size=shape) @ np.diag(2.0 ** -np.arange(shape[1])))
        u, _, v = np.linalg.svd(x.numpy(), full_matrices=False)
        found = orthogonal(x).numpy()
        values = np.diag(u.T @ found @ v.T)
        assert np.all((values[:4] > 0.6) & (values[:4] < 1.3))
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_matrices_too_large_to_make_orthogonal_are_trained_all_the_same() -> None:
    """Every parameter has an update, be it a matrix, a kernel or a bias."""
    shapes_ = [(8, 4), (8, 1, 3, 3), (8,), (LARGEST + 1, LARGEST + 1)]
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes_]
    optimizer = Optimizer(parameters, rate=0.01, decay=0.0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool((p != 0).all()) for p in parameters)
