"""squeeze, onnxsim and torch-pruning on the same networks, half of every layer.

    python -m tests.benchmarks.side_by_side [--zoo ../shared/zoo | --filled FOLDER]

Each tool removes half of the channels by the L2 norm of the weights, without training:
MACs left, whether the result passes the checker, runs in onnxruntime and keeps its
output shape, accuracy on the labelled digits or images where there are any, seconds.
torch-pruning (extra `benchmarks`) gets a twin of the graph made of torch.nn modules;
where the twin can't be built, or the extra is not installed, the line says so.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx

from squeeze import model as models
from squeeze import profile, session
from squeeze import shapes as shaping
from tests.benchmarks import cifar10, zoo
from tests.benchmarks.accuracy_cifar10 import archives
from tests.builders import run

GRAPHS = ["resnet18*", "mobilenet_v2*", "squeezenet1_1*", "densenet121*"]


@dataclass(frozen=True)
class Subject:
    """A network, images to fit to and labelled ones to judge on, where there are."""

    path: Path
    data: Path | None = None
    test: Path | None = None


# -- the tools: each writes its result to `out` ---------------------------------------


def squeezed(subject: Subject, out: Path, data: Path | None = None) -> None:
    from squeeze.rewrite.prune import Plan, prune
    from squeeze.rewrite.run import Options
    from squeeze.rewrite.samples import Samples

    by = "l2" if data is None else "energy"
    plan = Plan(by=by, ratio=Fraction(1, 2), refit=data is not None)
    prune(subject.path, plan, Samples(data), Options(output=out, bench=False))


def refitted(subject: Subject, out: Path) -> None:
    if subject.data is None:
        raise NotImplementedError("no data")
    squeezed(subject, out, subject.data)


def onnxsimmed(subject: Subject, out: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.apply_structured_pruning(onnx.load(subject.path), 0.5), out)


def torch_pruned(subject: Subject, out: Path) -> None:
    if find_spec("torch_pruning") is None:
        raise NotImplementedError("not installed: pip install -e .[benchmarks]")
    import torch
    import torch_pruning

    from tests.benchmarks.torch_twin import Twin

    model = models.simplify(models.load(subject.path))[0]
    twin = Twin(model).eval()
    ((_, shape),) = shaping.infer(model, {}).inputs.items()
    example = torch.zeros(shape)
    torch_pruning.pruner.MagnitudePruner(
        twin,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=twin.last(),
    ).step()
    torch.onnx.export(twin, (example,), str(out), dynamo=False, opset_version=17)


TOOLS: dict[str, Callable[[Subject, Path], None]] = {
    "squeeze": squeezed,
    "squeeze, refit": refitted,
    "onnxsim": onnxsimmed,
    "torch-pruning": torch_pruned,
}


# -- judging --------------------------------------------------------------------------


def judged(subject: Subject, out: Path) -> tuple[str, str, str]:
    """MACs left, validity, accuracy."""
    try:
        onnx.checker.check_model(str(out), full_check=True)
        ((_, shape),) = shaping.infer(models.load(subject.path), {}).inputs.items()
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        shapes = [tuple(a.shape for a in run(p, x=x)) for p in (subject.path, out)]
        valid = "valid" if shapes[0] == shapes[1] else f"shape {shapes[1]}"
    except Exception as error:
        valid = f"INVALID: {type(error).__name__}"
    left = profile(out).totals.macs / profile(subject.path).totals.macs
    return f"{left:.3f}", valid, accuracy(subject, out)


def accuracy(subject: Subject, out: Path) -> str:
    """On the labelled images, one at a time where the result fixes its batch."""
    if subject.test is None:
        return "–"
    test = np.load(subject.test)
    x, labels = test["x"], test["labels"]
    runner = session.create(out)
    given = runner.get_inputs()[0]
    size = given.shape[0] if isinstance(given.shape[0], int) else 250
    scores = [
        runner.run(None, {given.name: x[i : i + size]})[0]
        for i in range(0, len(x), size)
    ]
    return f"{(np.concatenate(scores).argmax(1) == labels).mean():.2%}"


def line(subject: Subject, tool: str, out: Path) -> str:
    start = time.perf_counter()
    out.unlink(missing_ok=True)
    try:
        TOOLS[tool](subject, out)
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        return f"{subject.path.stem:26} {tool:15} – {why[0][:60]}"
    seconds = time.perf_counter() - start
    left, valid, right = judged(subject, out)
    return (
        f"{subject.path.stem:26} {tool:15} {left} {valid:12} {right:>7} {seconds:6.1f}"
    )


def subjects(options: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    samples = cifar10.MODEL.parent
    digits = samples / "digits.npz"
    yield Subject(samples / "digits_cnn.onnx", digits, samples / "digits_test.npz")
    if options.cifar.exists():
        data, test = archives(options.cifar, folder, 512)
        yield Subject(samples / "cifar10_cnn.onnx", Path(data), Path(test))
    for pattern in options.graphs:
        if options.filled:
            yield from map(Subject, sorted(options.filled.glob(f"{pattern}.onnx")))
        else:
            yield from map(Subject, zoo.filled(options.zoo, pattern))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO)
    parser.add_argument("--filled", type=Path, help="graphs that have weights")
    parser.add_argument("--cifar", type=Path, default=cifar10.FOLDER)
    parser.add_argument("--graphs", nargs="*", default=GRAPHS)
    options = parser.parse_args()
    import onnxsim  # noqa: F401 (a second: not the first tool's)

    warnings.simplefilter("ignore", DeprecationWarning)  # of torch's older exporter
    print(f"{'network':26} {'tool':15} {'MACs':5} {'':12} {'right':>7} {'s':>6}")
    with tempfile.TemporaryDirectory() as made:
        for subject in subjects(options, Path(made)):
            for tool in TOOLS:
                print(line(subject, tool, Path(made) / "pruned.onnx"), flush=True)


if __name__ == "__main__":
    main()
