"""False alarms and catches of the latency limit.

`python -m tests.benchmarks.gate_latency [--load N]`

An unchanged model against itself, and one that takes 25 % longer (10 equal
convolutions for 8) against the original, each checked many times at the default
settings on this machine, as busy as it is. `--load N` keeps N more processes busy.
Asked for: at most 1 % false alarms of 200, and at least 95 of 100 slowdowns caught.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import squeeze

HERE = Path(__file__).parent
SAMPLE = HERE.parent.parent / "sample_models" / "cifar10_cnn.onnx"
BUSY = "while True: sum(i * i for i in range(100000))"


def chain(path: Path, count: int) -> Path:
    """`count` equal 3×3 convolutions of 32 channels on 32×32."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(count):
        array = rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17
        weights.append(numpy_helper.from_array(array, f"w{i}"))
        out = "y" if i == count - 1 else f"t{i}"
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [out], pads=[1] * 4))
        value = out
    shapes = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 32, 32, 32])
        for n in "xy"
    ]
    graph = helper.make_graph(nodes, "chain", shapes[:1], shapes[1:], weights)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def repeat(title: str, model: Path, reference: Path, times: int) -> None:
    """Check many times and print how often each verdict came."""
    limit = {"max_increase": "10%", "reference": str(reference), "level": "error"}
    start, verdicts, ratios = time.perf_counter(), Counter[str](), []
    for _ in range(times):
        (result,) = squeeze.check(model, {"latency": limit}).results
        verdicts[result.status] += 1
        ratios.append(result.value or np.nan)
    low, middle, high = np.quantile(ratios, [0.01, 0.5, 0.99])
    seconds = (time.perf_counter() - start) / times
    print(
        f"{title:34} {times:5} checks  over {verdicts['over']:4}"
        f"  not measured {verdicts['unmeasured']:3}"
        f"  ratio {middle:.3f} ({low:.3f} to {high:.3f})  {seconds:.2f} s each",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--same", type=int, default=200)
    parser.add_argument("--slower", type=int, default=100)
    parser.add_argument("--load", type=int, default=0)
    options = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.load)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            eight = chain(Path(folder) / "eight.onnx", 8)
            ten = chain(Path(folder) / "ten.onnx", 10)
            print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
            repeat("unchanged: sample_models", SAMPLE, SAMPLE, options.same)
            repeat("unchanged: 8 convolutions", eight, eight, options.same)
            repeat("25 % slower: 10 for 8", ten, eight, options.slower)
            print(f"load average {os.getloadavg()[0]:.1f}")
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()
