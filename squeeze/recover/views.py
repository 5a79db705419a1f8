"""Pictures of a sample that training sees, and the teacher's outputs on them, kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from squeeze.recover.feed import Fed, Inputs, image_axes
from squeeze.recover.options import Options

SMALLEST = 16  # pixels; smaller images are not moved
VIEWS = 4  # of every sample at least,
PICTURES = 200_000  # and this many pictures together
KEPT_BYTES = 2**29


class Views:
    """Every sample, shifted by up to an eighth and mirrored, in `count` ways.

    Epochs take turns with them: where all pictures together are plenty, what the
    teacher gives for one stands when it comes again (`Recall`).
    Single-channel images (digits, X-rays, spectrograms) are seldom symmetric and not
    mirrored, and under 16 pixels a shift changes too much. Inputs that are no images
    stay, and so does everything where there are several: what belongs together must
    not move apart. Blends are never the same.
    """

    def __init__(self, options: Options, samples: int, example: Inputs) -> None:
        self._seed, self._samples = options.seed, samples
        images = options.augment and _are_images(example)
        sides = [_image(x).shape[2:] for x in example.values()] if images else []
        self._moves = images and min(sides[0]) >= SMALLEST
        # a blend has no label
        self._mixes = images and options.mix and not options.label_weight
        self.count = max(VIEWS, math.ceil(PICTURES / samples)) if self._moves else 1
        self._plenty = samples * self.count >= PICTURES and not self._mixes
        self._drawn: tuple[int, np.ndarray] | None = None

    def of(self, fed: Fed, phase: int, epoch: int) -> Fed:
        """The batch as this epoch of a phase sees it."""
        assert fed.samples is not None
        inputs, view = fed.inputs, epoch % self.count
        if self._moves:
            inputs = _moved(inputs, self._draws(view)[:, fed.samples.numpy()])
        if self._mixes:
            seed = (self._seed, phase, epoch, int(fed.samples[0]))
            state = np.random.SeedSequence(seed).generate_state(1)
            rng = torch.Generator().manual_seed(int(state[0]))
            inputs = {name: mixed(x, rng) for name, x in inputs.items()}
        if not self._plenty:
            return dataclasses.replace(fed, inputs=inputs)
        again = epoch >= self.count
        return dataclasses.replace(fed, inputs=inputs, view=view, again=again)

    def _draws(self, view: int) -> np.ndarray:
        """(shift down, shift right, mirror) of every sample, the first two in 0..1."""
        if self._drawn is None or self._drawn[0] != view:
            rng = np.random.default_rng((self._seed, view))
            self._drawn = view, rng.random((3, self._samples), np.float32)
        return self._drawn[1]


def _are_images(inputs: Inputs) -> bool:
    [first, *others] = inputs.values()
    images = image_axes(tuple(first.shape)) is not None
    return not others and images and first.is_floating_point()


def _image(x: Tensor) -> Tensor:
    """With its channels first, whatever the network takes."""
    axes = image_axes(tuple(x.shape))
    return x.permute(0, 3, 1, 2) if axes is not None and axes[0] == 3 else x


def _moved(inputs: Inputs, draws: np.ndarray) -> Inputs:
    [(name, x)] = inputs.items()
    image = _image(x)
    moved = shifted(image, torch.from_numpy(draws), mirror=image.shape[1] == 3)
    return {name: moved if image is x else moved.permute(0, 2, 3, 1)}


def shifted(x: Tensor, draws: Tensor, mirror: bool) -> Tensor:
    """`x` is (n, c, h, w), `draws` (3, n) in 0..1; edges are reflected."""
    n, _, h, w = x.shape
    up, left = h // 8, w // 8
    padded = F.pad(x, [left, left, up, up], mode="reflect").permute(0, 2, 3, 1)
    rows = torch.arange(h) + (draws[0] * (2 * up + 1)).long()[:, None]
    columns = torch.arange(w).repeat(n, 1)
    if mirror:
        flipped = draws[2] < 0.5
        columns[flipped] = columns[flipped].flip(1)
    columns = columns + (draws[1] * (2 * left + 1)).long()[:, None]
    batch = torch.arange(n)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mixed(x: Tensor, rng: torch.Generator) -> Tensor:
    """Half of the samples blended with another one, up to equal parts.

    The teacher says what a blend is: matching it between the samples as well is what
    makes long distillation pay (Beyer et al. 2022, "function matching").
    """
    n = len(x)
    share = torch.rand(n, generator=rng) / 2
    share[torch.rand(n, generator=rng) < 0.5] = 0
    share = share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x, x[torch.randperm(n, generator=rng)], share)


class Recall:
    """What the teacher gave for each picture, to up to 512 MiB; beyond, nothing."""

    def __init__(self, samples: int, views: int) -> None:
        self._samples, self._views = samples, views
        self._seen: dict[int, Tensor] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}

    def find(self, fed: Fed) -> dict[str, Tensor] | None:
        """The outputs on the batch, None unless all of it has been seen."""
        if fed.view is None or fed.samples is None or fed.view not in self._seen:
            return None
        if not self._seen[fed.view][fed.samples].all():
            return None
        return {k: v[fed.samples] for k, v in self._kept[fed.view].items()}

    def keep(self, fed: Fed, outputs: Mapping[str, Tensor]) -> None:
        """Remember the outputs on the batch, if there is room for all of the data's."""
        if fed.view is None or fed.samples is None or not self._fits(fed, outputs):
            return
        if fed.view not in self._seen:
            self._seen[fed.view] = torch.zeros(self._samples, dtype=torch.bool)
            self._kept[fed.view] = {
                k: v.new_empty((self._samples, *v.shape[1:]))
                for k, v in outputs.items()
            }
        self._seen[fed.view][fed.samples] = True
        for name, value in outputs.items():
            self._kept[fed.view][name][fed.samples] = value

    def _fits(self, fed: Fed, outputs: Mapping[str, Tensor]) -> bool:
        if any(not v.dim() or len(v) != len(fed) for v in outputs.values()):
            return False
        size = sum(v[0].numel() * v.element_size() for v in outputs.values())
        return size * self._samples * self._views <= KEPT_BYTES
