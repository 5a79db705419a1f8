"""How long and how much memory whole commands take, against their targets.

`python -m tests.benchmarks.speed [--runs 5] [--zoo FOLDER]`. Baselines: the import of
onnx and onnx_ir for `profile`, the model's own size for memory. ResNet-50 comes from
the zoo with random weights; the large models are made here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

SQUEEZE = [sys.executable, "-m", "squeeze"]


def measure(command: list[str], runs: int) -> tuple[list[float], int]:
    """Seconds of each run, and the peak resident bytes of the largest."""
    seconds, peak = [], 0
    for _ in range(runs + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - start)
        peak = max(peak, usage.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
    return seconds[1:], peak  # the first one warms the file cache


def text(seconds: list[float]) -> str:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle:.3f} s ({low:.3f}–{high:.3f})"


def big_external(folder: Path, gigabytes: float) -> Path:
    """An MLP whose weights lie in one data file, sparse on disk."""
    width = 16384
    count = int(gigabytes * 1e9 / (4 * width * width)) + 1
    path, size = folder / "big.onnx", 4 * width * width
    nodes, weights = [], []
    for i in range(count):
        nodes.append(
            helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"m{i}")
        )
        weight = TensorProto(
            name=f"w{i}", dims=[width, width], data_type=TensorProto.FLOAT
        )
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "big.data"),
            ("offset", i * size),
            ("length", size),
        ):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    info = helper.make_tensor_value_info
    ends = [info("v0", 1, [1, width])], [info(f"v{count}", 1, [1, width])]
    model = helper.make_model(
        helper.make_graph(nodes, "big", *ends, weights), ir_version=8
    )
    model.opset_import[0].version = 17
    onnx.save(model, path)
    with (folder / "big.data").open("wb") as data:
        data.truncate(count * size)
    return path


def big_inline(folder: Path, megabytes: int) -> Path:
    """Convolutions of 2048 channels, weights inside the file."""
    width = 1024
    count = round(megabytes * 1e6 / (4 * 9 * width * width))
    nodes, weights = [], []
    for i in range(count):
        array = np.random.default_rng(i).standard_normal(
            (width, width, 3, 3), np.float32
        )
        weights.append(onnx.numpy_helper.from_array(array * 0.01, f"w{i}"))
        nodes.append(
            helper.make_node(
                "Conv", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"c{i}", pads=[1] * 4
            )
        )
    info = helper.make_tensor_value_info
    ends = [[info(f"v{i}", 1, ["N", width, 7, 7])] for i in (0, count)]
    model = helper.make_model(
        helper.make_graph(nodes, "big", *ends, weights), ir_version=8
    )
    model.opset_import[0].version = 17
    onnx.save(model, folder / "inline.onnx")
    return folder / "inline.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--zoo", type=Path, default=Path("../shared/zoo"))
    options = parser.parse_args()
    runs = options.runs
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _, floor = measure([sys.executable, "-c", "pass"], 1)
        helped, _ = measure([*SQUEEZE, "--help"], runs)
        print(f"squeeze --help                    {text(helped)}   target about 0.1 s")

        resnet = folder / "resnet50.onnx"
        light = [sys.executable, str(options.zoo / "light.py"), "fill"]
        subprocess.run(
            [*light, str(options.zoo / "resnet50.dynamo.onnx"), str(resnet)], check=True
        )
        imports = [sys.executable, "-c", "import onnx, onnx_ir"]
        profile = [*SQUEEZE, "profile", str(resnet)]
        pairs = [
            (measure(profile, 1)[0][0], measure(imports, 1)[0][0]) for _ in range(runs)
        ]
        ratios = [a / b for a, b in pairs]
        print(f"profile ResNet-50                 {text([a for a, _ in pairs])}")
        print(f"  import onnx, onnx_ir            {text([b for _, b in pairs])}")
        print(
            f"  ratio, pair by pair             {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f})   target ≤ 2"
        )

        seconds, peak = measure([*SQUEEZE, "profile", str(big_external(folder, 3))], 1)
        print(f"profile 3 GB of external data     {text(seconds)}")
        print(
            f"  peak resident memory            {peak / 1e6:.0f} MB   target < 400 MB"
        )

        # made in a process of its own: a child's peak counts what its parent had
        maker = multiprocessing.get_context("spawn").Process(
            target=big_inline, args=(folder, 500)
        )
        maker.start()
        maker.join()
        inline = folder / "inline.onnx"
        size = inline.stat().st_size
        convert = [*SQUEEZE, "convert", str(inline), "--to", "depthwise-separable"]
        convert += ["--no-simplify", "-o", str(folder / "out.onnx")]
        for label, extra in (("", []), (", --no-bench", ["--no-bench"])):
            seconds, peak = measure([*convert, *extra], 1)
            print(f"convert {size / 1e6:.0f} MB{label:21} {text(seconds)}")
            print(
                f"  peak resident memory            {peak / 1e6:.0f} MB, "
                f"{peak / size:.2f} × its size   target ≤ 3"
            )
        print(f"(an empty Python process takes {floor / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
