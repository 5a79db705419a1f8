"""Accuracy after fitting without training: `python -m tests.benchmarks.fit_cifar`.

The CIFAR-10 sample network, 2,000 unlabelled training images to fit to, accuracy on
the 5,000 validation images, first layer kept. Baseline: a 60-line experiment with the
closed forms, least squares and no more (last column). `--plans N` adds the correlation
between the sum of held-out errors and the drop over N random plans, `--speed` what
gathering statistics costs against plain inference, `--memory` what it takes at 1,000
and at 10,000 images, `--resnet50 MODEL` how long a ResNet-50 (random weights will do)
takes to convert and to factorize with 500 random images, `--fc 4096` a fully connected
layer of known spectrum against the theory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from squeeze import model as models
from squeeze import session, shapes
from squeeze.calibrate.data import Data, open_data, specs_of
from squeeze.calibrate.stats import (
    Collector,
    Columns,
    Moments,
    Products,
    Wanted,
    Window,
)
from squeeze.rewrite.convert import convert
from squeeze.rewrite.factorize import factorize
from squeeze.rewrite.fit.source import SAMPLES, FitData
from squeeze.rewrite.plan import Result
from squeeze.rewrite.run import Options
from tests.benchmarks import cifar10
from tests.benchmarks.cifar10 import MODEL

QUICK = Options(bench=False, simplify=False)
Split = tuple[np.ndarray, np.ndarray]
KEPT = ["conv1", "fc*"]


def load(folder: Path) -> tuple[np.ndarray, Split]:
    """2,000 training images, and the validation split with labels."""
    train, _ = cifar10.split(folder / "train.npz")
    picked = np.random.default_rng(0).choice(len(train), 2000, replace=False)
    return train[np.sort(picked)], cifar10.split(folder / "validation.npz")


def accuracy(model: ir.Model, split: Split) -> float:
    runner = session.create(ir.to_proto(model).SerializeToString())
    x, labels = split
    found = [
        runner.run(None, {"input": part})[0].argmax(1)
        for part in np.array_split(x, len(x) // 250)
    ]
    return 100 * float((np.concatenate(found) == labels).mean())


def separable(multiplier: int, data: FitData) -> Result:
    return convert(
        MODEL,
        "depthwise-separable",
        settings={"multiplier": multiplier},
        data=data,
        options=QUICK,
    )


def ranked(share: float, data: FitData) -> Result:
    how = dict(method="pca", skip=KEPT, round_to=1)
    return factorize(MODEL, rank=share, data=data, options=QUICK, **how)


def budget(share: float, data: FitData) -> Result:
    return factorize(MODEL, macs=share, data=data, options=QUICK)


ROWS = (
    ("depthwise-separable m = 1", lambda d: separable(1, d), "−16.5"),
    ("m = 2", lambda d: separable(2, d), "−3.9"),
    ("m = 3", lambda d: separable(3, d), "−1.9"),
    ("output-PCA rank 50 %", lambda d: ranked(0.5, d), "−0.6"),
    ("rank 37.5 %", lambda d: ranked(0.375, d), "−1.0"),
    ("rank 25 %", lambda d: ranked(0.25, d), "−2.2"),
    ("whole network at 50 % (factorize)", lambda d: budget(0.5, d), "≤ −0.5"),
    ("whole network at 25 % (factorize)", lambda d: budget(0.25, d), "≤ −2.0"),
)


def table(images: np.ndarray, split: Split) -> None:
    whole = accuracy(models.load(MODEL), split)
    print(f"baseline {whole:.2f} %\n")
    print(
        "| | MACs of the network | sum of errors | drop, points | seconds | to reach |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for name, make, reach in ROWS:
        start = time.perf_counter()
        result = make(FitData({"input": images}, samples=len(images)))
        seconds = time.perf_counter() - start
        share = result.after.macs / result.before.macs
        errors = sum(c.fit_error or 0 for c in result.changes)
        drop = accuracy(result.model, split) - whole
        print(
            f"| {name} | {share:.1%} | {errors:.3f} | {drop:+.2f} | {seconds:.0f} "
            f"| {reach} |",
            flush=True,
        )


def plans(count: int, images: np.ndarray, split: Split) -> None:
    """Random methods and ranks per layer: do held-out errors predict the drop?"""
    rng = np.random.default_rng(0)
    whole = accuracy(models.load(MODEL), split)
    errors, drops = [], []
    for _ in range(count):
        model: ir.Model | Path = MODEL
        total = 0.0
        for layer in ("conv2", "conv3"):
            data = FitData({"input": images[:4000]}, samples=1000)
            share, method = (
                rng.uniform(0.08, 0.6),
                rng.choice(["pca", "tucker", "spatial"]),
            )
            how = dict(rank=float(share), method=str(method), only=[layer])
            result = factorize(
                model, data=data, options=QUICK, allow_costlier=True, round_to=1, **how
            )
            total += sum(c.fit_error or 0 for c in result.changes)
            model = result.model
        assert isinstance(model, ir.Model)
        errors.append(total)
        drops.append(whole - accuracy(model, split))
    ranks = [np.argsort(np.argsort(v)) for v in (errors, drops)]
    print(
        f"\n{count} random plans: correlation of the sum of errors with the drop "
        f"{np.corrcoef(errors, drops)[0, 1]:.3f}, of their ranks "
        f"{np.corrcoef(*ranks)[0, 1]:.3f}; drops {min(drops):.1f} to {max(drops):.1f}"
    )


def wanted(model: ir.Model) -> dict[str, dict[str, Wanted]]:
    """What fitting asks for, and what pruning does: by name, then by layer."""
    grams: dict[str, Wanted] = {}
    counts: dict[str, Wanted] = {}
    for node in model.graph:
        if node.op_type == "Conv":
            window = Window.of(node, node.inputs[1].shape[2:])
            columns = Columns(node.inputs[0].name, window=window)
            grams[node.name] = Products((columns, Columns(node.outputs[0].name)))
        if node.op_type == "Relu":
            counts[node.name] = Moments(node.outputs[0].name, kinds=("positive",))
    return {"Gram matrices": grams, "counts": counts}


def speed(images: np.ndarray, rounds: int = 9) -> None:
    """Gathering against plain inference at the same batch size, in turns.

    A round is one pass of each over the same images; its ratio is to its own plain
    pass, which is a session as onnxruntime makes it. Few images are as many as
    `--samples` takes by default: rows at 10 positions of each; many need fewer.
    """
    model = models.load(MODEL)
    known = shapes.infer(model)
    runner = session.create(MODEL)
    for count in (SAMPLES, 4000):
        data = open_data({"input": images[:count]}, model, known)
        work = {"plain": lambda data=data: [runner.run(None, b.inputs) for b in data]}
        for name, asked in wanted(model).items():
            collector = Collector(model, known, asked, samples=len(data))
            work[name] = lambda c=collector, data=data: c.over(data)
        times = in_turns(work, rounds)
        plain = times.pop("plain")
        print(f"{count:,} images, plain inference {np.median(plain):.2f} s")
        for name, found in times.items():
            low, middle, high = np.quantile(found / plain, (0.25, 0.5, 0.75))
            print(f"  {name}: {middle:.2f} × plain ({low:.2f}–{high:.2f})", flush=True)


def in_turns(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Wall times in seconds (rounds,) by name, after one round that doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            time.sleep(0.1)  # until the threads of the one before are at rest
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(found[1:]) for name, found in times.items()}


def memory(counts: tuple[int, ...] = (1_000, 10_000)) -> None:
    """Peak of a process that gathers over so many random images, streamed."""
    for count in counts:
        command = [sys.executable, "-m", __spec__.name, "--gather", str(count)]
        print(f"{count:,} images: ", end="", flush=True)
        subprocess.run(command, check=True)


@dataclass(frozen=True)
class Noise:
    """Random images that are made when they are read."""

    count: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> tuple[dict[str, np.ndarray], None]:
        rng = np.random.default_rng(int(indices[0]))
        x = rng.standard_normal((len(indices), *self.shape), np.float32)
        return {"input": x}, None


def gather_random(count: int) -> None:
    """Gram matrices and counts over random images, and the process' peak."""
    model = models.load(MODEL)
    known = shapes.infer(model)
    specs = specs_of(model, known)
    data = Data("noise", Noise(count, specs[0].shape[1:]), specs, np.arange(count))
    for asked in wanted(model).values():
        Collector(model, known, asked, samples=len(data)).over(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak {peak:.0f} MB")


RESNET_RUNS = (
    ("convert", "--to", "depthwise-separable"),
    ("factorize", "--macs", "50%"),
)


def resnet50(model: Path, count: int = 500) -> None:
    """Both commands on ResNet-50 with random images, each in a process of its own.

    Everything is in the time, from the start of the command to its report. Limit: five
    minutes on two cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images.npz"
        rng = np.random.default_rng(0)
        np.savez(data, x=rng.standard_normal((count, 3, 224, 224), np.float32))
        for command, *how in RESNET_RUNS:
            output = Path(folder) / f"{command}.onnx"
            arguments = [command, str(model), *how, "--data", str(data)]
            arguments += ["-o", str(output), "--json"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "squeeze", *arguments],
                stdout=subprocess.PIPE,
                check=True,
            )
            wall = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            report = json.loads(done.stdout)
            taken = sum(c["applied"] for c in report["changes"])
            left = report["after"]["macs"] / report["before"]["macs"]
            print(
                f"{command} {' '.join(how)}: {taken} layers, {left:.1%} of the MACs, "
                f"{wall:.0f} s ({used:.0f} s of processor time), "
                f"peak so far {after.ru_maxrss / 2**20:.1f} GB",
                flush=True,
            )


def fully_connected(size: int, energy: float = 0.9) -> None:
    """A layer with known singular values: rank and error against the theory."""
    from tests.layers import factor_error, known_spectrum

    weight, squared = known_spectrum(size)
    rank = int(np.argmax(np.cumsum(squared) >= energy * squared.sum())) + 1
    start = time.perf_counter()
    found = factor_error(weight, energy)
    seconds = time.perf_counter() - start
    theory = squared[rank:].sum() / squared.sum()
    print(
        f"{size} × {size}, energy {energy}: rank {found.rank} (theory {rank}), error "
        f"{found.relative:.7f} (theory {theory:.7f}), {seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=cifar10.FOLDER, help="train, validation .npz"
    )
    parser.add_argument("--plans", type=int, default=0, help="random plans, as 30")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--resnet50", type=Path, metavar="MODEL", help="time both commands on it"
    )
    parser.add_argument("--fc", type=int, metavar="SIZE", help="such as 4096")
    parser.add_argument("--gather", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gather:
        gather_random(options.gather)
        return
    if options.fc:
        fully_connected(options.fc)
        return
    if options.resnet50:
        resnet50(options.resnet50)
        return
    if options.memory:
        memory()
        return
    images, split = load(options.data)
    if options.speed:
        speed(images)
        return
    table(images, split)
    if options.plans:
        plans(options.plans, images, split)


if __name__ == "__main__":
    main()
