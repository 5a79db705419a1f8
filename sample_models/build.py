"""Train the sample networks and write them: `python sample_models/build.py digits`.

Needs `squeeze[train]`; the digits need scikit-learn. `cifar10` also needs Pillow and
the path of a folder with `train.npz` and `validation.npz` (`jpeg`, `offsets`, `labels`:
concatenated JPEG files). Each network is a `torch.nn.Sequential`; `export` writes one
ONNX node per layer.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

HERE = Path(__file__).parent
CIFAR_MEAN = np.float32([0.491, 0.482, 0.447])
CIFAR_STD = np.float32([0.247, 0.243, 0.262])


# -- writing ------------------------------------------------------------------------


def fold_batch_norm(net: nn.Sequential) -> nn.Sequential:
    """A copy of `net` with each BatchNorm2d folded into the Conv2d before it."""
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(net).eval():
        if isinstance(layer, nn.BatchNorm2d) and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = nn.utils.fusion.fuse_conv_bn_eval(layers[-1], layer)
        elif not isinstance(layer, nn.Dropout):
            layers.append(layer)
    return nn.Sequential(*layers)


def node_for(layer: nn.Module) -> tuple[str, dict[str, object], list[Tensor | None]]:
    """The ONNX op, attributes and weights of one torch layer."""
    match layer:
        case nn.Conv2d():
            p, k = list(layer.padding), list(layer.kernel_size)
            attributes = dict(kernel_shape=k, strides=list(layer.stride), pads=p + p)
            return "Conv", attributes, [layer.weight, layer.bias]
        case nn.ConvTranspose2d():
            p, k = list(layer.padding), list(layer.kernel_size)
            attributes = dict(kernel_shape=k, strides=list(layer.stride), pads=p + p)
            return "ConvTranspose", attributes, [layer.weight, layer.bias]
        case nn.BatchNorm2d():
            weights = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
            return "BatchNormalization", dict(epsilon=layer.eps), weights
        case nn.Linear():
            return "Gemm", dict(transB=1), [layer.weight, layer.bias]
        case nn.MaxPool2d():
            k = [layer.kernel_size] * 2
            return "MaxPool", dict(kernel_shape=k, strides=k), []
        case nn.ReLU() | nn.Sigmoid() | nn.Flatten():
            op = {"ReLU": "Relu"}.get(type(layer).__name__, type(layer).__name__)
            return op, {}, []
    raise TypeError(f"no ONNX op for {layer}")


WEIGHT_NAMES = ("weight", "bias", "mean", "var")


def export(net: nn.Sequential, shape: list[int], output: str, path: Path) -> None:
    """Write `net` for inputs [N, *shape], named by op: conv1, relu1, pool1, fc…"""
    short = {"BatchNormalization": "bn", "MaxPool": "pool", "Gemm": "fc"}
    nodes, initializers, count, value = [], [], {}, "input"
    for index, layer in enumerate(net.eval()):
        op, attributes, weights = node_for(layer)
        stem = short.get(op, op.lower().replace("convtranspose", "deconv"))
        count[stem] = count.get(stem, 0) + 1
        name, inputs = f"{stem}{count[stem]}", [value]
        for role, weight in zip(WEIGHT_NAMES, weights, strict=False):
            if weight is not None:
                array = np.ascontiguousarray(weight.detach().float().numpy())
                inputs.append(f"{name}.{role}")
                initializers.append(numpy_helper.from_array(array, inputs[-1]))
        value = output if index == len(net) - 1 else f"{name}_out"
        nodes.append(helper.make_node(op, inputs, [value], name=name, **attributes))
    with torch.no_grad():
        result = net(torch.zeros(1, *shape)).shape[1:]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", *result])],
        initializers,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, producer_name="squeeze")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    print(f"wrote {path} ({path.stat().st_size:,} bytes)")


# -- training -----------------------------------------------------------------------


def crop_and_flip(x: Tensor, rng: torch.Generator, pad: int = 4) -> Tensor:
    """Shift every image by up to `pad` pixels and mirror half of them."""
    n, _, h, w = x.shape
    padded = nn.functional.pad(x, [pad] * 4)
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=rng)
    columns = torch.arange(w).repeat(n, 1)
    mirrored = torch.rand(n, generator=rng) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    rows, columns = torch.arange(h) + dy, columns + dx
    batch = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[
        batch, rows[:, :, None], columns[:, None]
    ].permute(0, 3, 1, 2)


def train(
    net: nn.Sequential,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    batch: int = 256,
    augment: bool = False,
    bfloat16: bool = False,
    l1: float = 0.0,
    average: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """AdamW with a one-cycle schedule; returns a moving average of the weights.

    `average` is its decay per step; 0 keeps the last weights.

    `l1` weighs the root mean square of every hidden unit's output, summed over units
    (a group form of the regularised training of Çallı 2017, §2.2.2): whole units die.
    It acts in the first half of the epochs, the second recovers the fit.
    """
    rng = torch.Generator().manual_seed(seed)
    if bfloat16:
        net.to(memory_format=torch.channels_last)
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=5e-3 if augment else 0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
    average = torch.optim.swa_utils.AveragedModel(
        net,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average),
        use_buffers=True,
    )
    activations: list[Tensor] = []
    if l1:
        for layer in net:
            if isinstance(layer, nn.ReLU):
                layer.register_forward_hook(lambda _m, _i, out: activations.append(out))
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(x), generator=rng)
        for picked in order[: len(x) // batch * batch].split(batch):
            images = crop_and_flip(x[picked], rng) if augment else x[picked]
            activations.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                error = loss(net(images).float(), y[picked])
            if l1 and epoch < epochs / 2:
                error = error + l1 * sum(unit_norms(a).sum() for a in activations)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(net)
            total += error.item()
        seconds = time.perf_counter() - start
        mean = total / (len(x) // batch)
        print(f"epoch {epoch + 1:3}: loss {mean:.5f}, {seconds:.1f} s", flush=True)
    result = average.module.to(memory_format=torch.contiguous_format)
    for layer in result:
        layer._forward_hooks.clear()
    return result.eval()


def unit_norms(a: Tensor) -> Tensor:
    """Root mean square of every channel or hidden unit over samples and positions."""
    return (
        (a.square().flatten(2).mean((0, 2)) if a.ndim > 2 else a.square().mean(0))
        .add(1e-12)
        .sqrt()
    )


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        batches = zip(x.split(500), y.split(500), strict=True)
        hits = [(net(a).argmax(1) == b) for a, b in batches]
    return torch.cat(hits).float().mean().item()


# -- the networks -------------------------------------------------------------------


def conv(cin: int, cout: int) -> list[nn.Module]:
    return [
        nn.Conv2d(cin, cout, 3, padding=1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
    ]


def cifar_split(path: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    part = np.load(path)
    jpeg, offsets = part["jpeg"].tobytes(), part["offsets"]
    files = (io.BytesIO(jpeg[a:b]) for a, b in pairwise(offsets))
    x = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    x = (x.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD
    labels = torch.from_numpy(part["labels"].astype(np.int64))
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), labels


def cifar10(data: Path, epochs: int) -> None:
    """The baseline of EffNet, Table 1 and 2."""
    x, y = cifar_split(data / "train.npz")
    pool = [nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(4096, 10)]
    layers = conv(3, 64) + pool + conv(64, 128) + pool + conv(128, 256) + pool + head
    net = nn.Sequential(*layers)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    options = dict(epochs=epochs, lr=4e-3, augment=True, bfloat16=True, average=0.998)
    net = fold_batch_norm(train(net, x, y, loss, **options))
    score = accuracy(net, *cifar_split(data / "validation.npz"))
    print(f"cifar10_cnn: {score:.2%} of the validation split")
    export(net, [3, 32, 32], "logits", HERE / "cifar10_cnn.onnx")


def digits_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 handwritten digits, 8×8, in [0, 1]: 1,297 and 500."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images / 16).astype(np.float32)[:, None]
    y = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    parts = []
    for name, rows in (("digits", order[500:]), ("digits_test", order[:500])):
        np.savez_compressed(HERE / f"{name}.npz", x=x[rows], labels=y[rows])
        parts.append((torch.from_numpy(x[rows]), torch.from_numpy(y[rows])))
    return parts[0], parts[1]


def digits(epochs: int) -> None:
    """A small classifier, and an autoencoder after the thesis's (§2.2.3, ch. 3)."""
    (x, y), test = digits_data()
    layers = conv(1, 16) + conv(16, 32) + [nn.MaxPool2d(2)] + conv(32, 64)
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
    net = train(
        nn.Sequential(*layers),
        x,
        y,
        nn.CrossEntropyLoss(),
        epochs=epochs,
        lr=4e-3,
        batch=64,
    )
    net = fold_batch_norm(net)
    print(f"digits_cnn: {accuracy(net, *test):.2%} of the 500 test digits")
    export(net, [1, 8, 8], "logits", HERE / "digits_cnn.onnx")

    def half(cin: int, cout: int) -> list[nn.Module]:
        down = nn.Conv2d(cin, cout, 4, stride=2, padding=1)
        return [down, nn.BatchNorm2d(cout), nn.ReLU()]

    def double(cin: int, cout: int) -> list[nn.Module]:
        up = nn.ConvTranspose2d(cin, cout, 4, stride=2, padding=1)
        return [up, nn.BatchNorm2d(cout), nn.ReLU()]

    last = nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1)
    layers = half(1, 32) + half(32, 64) + double(64, 32) + [last, nn.Sigmoid()]
    net = train(
        nn.Sequential(*layers),
        x,
        x,
        nn.MSELoss(),
        epochs=2 * epochs,
        lr=4e-3,
        batch=64,
        l1=3e-3,
    )
    with torch.no_grad():
        error = nn.functional.mse_loss(net(test[0]), test[0]).item()
    print(f"digits_autoencoder: mean squared error {error:.5f} on the 500 test digits")
    export(net, [1, 8, 8], "reconstruction", HERE / "digits_autoencoder.onnx")


def adder(epochs: int) -> None:
    """The thesis's first network (ch. 3): 2 → 1000 ReLU → 1, trained to add."""
    x = torch.rand(4096, 2)
    y = x.sum(1, keepdim=True)
    layers = [nn.Linear(2, 1000), nn.ReLU(), nn.Linear(1000, 1)]
    net = train(
        nn.Sequential(*layers), x, y, nn.MSELoss(), epochs=epochs, lr=1e-2, l1=5e-4
    )
    test = torch.rand(1024, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        worst = (net(test) - test.sum(1, keepdim=True)).abs().max().item()
        silent = (net[:2](x).amax(0) <= 0).sum().item()
    print(f"adder_mlp: largest error {worst:.4f}, {silent} of 1000 units never fire")
    np.savez_compressed(HERE / "adder.npz", x=x.numpy())
    export(net, [2], "sum", HERE / "adder_mlp.onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=["cifar10", "digits", "adder"])
    parser.add_argument("--data", type=Path, help="folder of the CIFAR-10 archives")
    parser.add_argument("--epochs", type=int, help="default: 24, 60 or 200")
    options = parser.parse_args()
    torch.manual_seed(0)
    match options.network:
        case "cifar10" if options.data is None:
            parser.error(
                "cifar10 needs --data: a folder with train.npz, validation.npz"
            )
        case "cifar10":
            cifar10(options.data, options.epochs or 24)
        case "digits":
            digits(options.epochs or 60)
        case "adder":
            adder(options.epochs or 200)


if __name__ == "__main__":
    main()
