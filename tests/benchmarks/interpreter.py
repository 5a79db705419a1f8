"""The PyTorch interpreter on whole networks.

    python -m tests.benchmarks.interpreter [--zoo FOLDER] [MODEL …]

For every graph of the zoo and onnx's own light models: the largest difference from
onnxruntime's outputs, nodes that run in onnxruntime, and whether one step of
training reaches every weight and lowers the loss. Baseline: 1e-4, none, all. (The
light models' weights are all equal, so their classes are too, and nothing moves.)
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from squeeze import load, shapes
from squeeze.errors import SqueezeError
from squeeze.recover import GraphModule, to_torch, verify
from tests.benchmarks import zoo


def main() -> None:
    given = zoo.arguments(__doc__).parse_args()
    light = [] if given.models else zoo.light()
    print(
        "| graph | difference | weights | in onnxruntime | reached | step | seconds |"
    )
    print("|---|---:|---:|---|---:|---:|---:|")
    for path in [*zoo.paths(given), *light]:
        started = time.perf_counter()
        try:
            cells = row(path)
        except SqueezeError as error:
            cells = [f"refused: {error}"]
        seconds = time.perf_counter() - started
        print(f"| {path.stem} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def row(path: Path) -> list[str]:
    model = load(path)
    module = to_torch(model)
    rng = np.random.default_rng(0)
    sizes = shapes.infer(model).inputs
    feeds = {k: rng.standard_normal(s, dtype=np.float32) for k, s in sizes.items()}
    error = verify(model, module, feeds).error
    islands = sorted({step.op.kind for step in module.steps if step.island})
    reached, change = step_once(module, feeds)
    weights = sum(p.numel() for p in module.parameters())
    return [
        f"{error:.1e}",
        f"{weights:,}",
        ", ".join(islands) or "none",
        reached,
        f"{change:+.1e}",
    ]


def step_once(module: GraphModule, feeds: dict[str, np.ndarray]) -> tuple[str, float]:
    """Weights that the gradient reaches, and the change of the loss by one step.

    The step is small and along the gradient, in evaluation mode: the loss must fall.
    """
    inputs = {k: torch.from_numpy(v) for k, v in feeds.items()}
    with torch.no_grad():
        target = {k: v + v.std() + 1e-3 for k, v in module.run(inputs).items()}

    def loss() -> torch.Tensor:
        found = module.run(inputs)
        return sum((found[k] - target[k]).square().mean() for k in found)

    before = loss()
    before.backward()
    found = [p for p in module.parameters() if p.grad is not None]
    squares = sum(float(p.grad.double().square().sum()) for p in found)
    size = sum(float(p.detach().double().square().sum()) for p in found) ** 0.5
    rate = 1e-3 * before.item() / max(squares, 1e-24)
    rate = min(rate, 1e-4 * size / max(squares, 1e-24) ** 0.5)
    with torch.no_grad():
        for p in found:
            p -= rate * p.grad
        after = loss()
    total = sum(1 for _ in module.parameters())
    return f"{len(found)} of {total}", float(after - before.detach()) / before.item()


if __name__ == "__main__":
    main()
