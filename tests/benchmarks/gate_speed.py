"""Time and memory of the gate: `python -m tests.benchmarks.gate_speed --zoo FOLDER`.

The gate of a ResNet-50 without latency (asked for: under 1.5 s and 500 MB), and of
folders of 5, 10 and 20 models (asked for: linear in their number), each a process of
its own; the least of five runs. `FOLDER` holds the graphs with their weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

SQUEEZE = [sys.executable, "-m", "squeeze"]
LIMITS = "macs={max='99T'}\nparams={max='9T'}\nfile_size={max='9TB'}\n"


def timed(folder: Path, *arguments: str) -> tuple[float, float, float]:
    """Seconds on the clock, seconds of processor time, peak megabytes of one run."""
    start = time.perf_counter()
    command = [*SQUEEZE, "check", *arguments]
    child = os.fork()
    if not child:
        os.chdir(folder)
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
        os.execv(command[0], command)
    _, status, usage = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, command
    processor = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, processor, usage.ru_maxrss / 1024


def best(folder: Path, *arguments: str) -> str:
    runs = [timed(folder, *arguments) for _ in range(5)]
    clock, processor, _ = (min(column) for column in zip(*runs, strict=True))
    memory = max(run[2] for run in runs)
    return f"{clock:6.2f} s  ({processor:.2f} s of processor time)  {memory:5.0f} MB"


def main() -> None:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "zoo"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=default)
    zoo: Path = parser.parse_args().zoo.resolve()
    print(f"load average {os.getloadavg()[0]:.1f}")
    (resnet,) = zoo.glob("resnet50*.onnx")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limits = ["--max-macs", "5G", "--max-params", "30M", "--max-peak-memory", "1GB"]
        print(f"{resnet.stem:26}", best(folder, str(resnet), *limits))
        small = Path(__file__).resolve().parents[2] / "sample_models/cifar10_cnn.onnx"
        sources = {"mobilenet_v2": next(zoo.glob("mobilenet_v2*")), "cifar10": small}
        for title, source in sources.items():
            for count in (1, 5, 10, 20):
                place = folder / f"{title}{count}"
                place.mkdir()
                for index in range(count):
                    shutil.copy(source, place / f"m{index}.onnx")
                (place / "squeeze.toml").write_text(
                    f"[[check]]\nmodel='*.onnx'\n{LIMITS}"
                )
                print(f"{count:3} × {title:20}", best(place))


if __name__ == "__main__":
    main()
