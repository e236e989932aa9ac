"""Images: data of labelled pictures, shuffled, lightly augmented and normalised as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from setpoint_bench.task import Split
from setpoint_bench.tensors import shuffled_rows

Splits = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Images:
    """Pictures and their classes.

    Args:
        load: gives raw pixels and labels of "train", "validation" and "test", from a data folder or the usual places.
        shape: channels, height and width.
        num_train: images to train on.
        mean: of each channel's raw pixels.
        deviation: of each channel's raw pixels.
        shift: largest shift in pixels, in each direction; what leaves the frame is lost, zeros come in.
        flip: whether to mirror half of the images.
        folder: the data folder, or None for the usual places.
        folds: parts that all the pictures are divided into at random, whatever splits they come in: one tests, and of
            the rest a tenth validates and the others train. 0 for the splits as they are.
        fold: number of the part that tests.
    """

    load: Callable[[Path | None], Splits]
    shape: tuple[int, int, int]
    num_train: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    shift: int = 0
    flip: bool = False
    folder: Path | None = None
    folds: int = 0
    fold: int = 0

    def with_fold(self, fold: int) -> Images:
        return replace(self, fold=fold)

    def splits(self) -> Splits:
        """Raw pixels and labels."""
        return in_fold(self.load, self.folder, self.fold, self.folds) if self.folds else self.load(self.folder)

    def as_in(self, other: Images) -> nn.Module:
        """What makes inputs normalised as here of those normalised as there; the same for what reads them there."""
        return Renormalised(self, other)

    def example(self, batch: int) -> Float[Tensor, "batch channels height width"]:
        """Noise: blank images would leave BatchNorm nothing to normalise."""
        noise = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))
        return noise.contiguous(memory_format=torch.channels_last)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless augmented batches; order and augmentation are drawn from a generator of their own."""
        images, labels = self.splits()["train"]
        generator = torch.Generator().manual_seed(seed)
        padded = F.pad(images, (self.shift,) * 4)
        for rows in shuffled_rows(len(images), batch, generator):
            window = augment(padded[rows], images.shape[-2:], generator, flip=self.flip)
            yield self._normalised(window), labels[rows]

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = self.splits()[split]
        return self._normalised(images), labels

    def _normalised(self, images: Shaped[Tensor, "count channels height width"]) -> Tensor:
        """Raw pixels to zero mean and unit variance per channel, channels innermost."""
        return standardised(images.float(), self.mean, self.deviation).contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def in_fold(load: Callable[[Path | None], Splits], folder: Path | None, fold: int, folds: int) -> Splits:
    """All that `load` gives, divided again: every `folds`-th picture of a fixed random order tests."""
    loaded = load(folder)
    images, labels = (torch.cat([loaded[split][each] for split in sorted(loaded)]) for each in (0, 1))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    tests = torch.arange(len(order)) % folds == fold
    test, rest = order[tests], order[~tests]
    count = len(rest) // 10
    places = {"train": rest[count:], "validation": rest[:count], "test": test}
    return {split: (images[rows], labels[rows]) for split, rows in places.items()}


class Renormalised(nn.Module):
    """Images normalised one way as images normalised another way.

    Args:
        given: how they come.
        wanted: how they go on.
    """

    def __init__(self, given: Images, wanted: Images) -> None:
        super().__init__()
        self.given, self.wanted = given, wanted

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        known = self.given.mean, self.given.deviation
        centre, scale = (torch.tensor(each, device=x.device).view(-1, 1, 1) for each in known)
        return standardised(x * scale + centre, self.wanted.mean, self.wanted.deviation)


def standardised(
    images: Float[Tensor, "count channels height width"], mean: tuple[float, ...], deviation: tuple[float, ...]
) -> Float[Tensor, "count channels height width"]:
    centre, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, deviation))
    return (images - centre) / scale


def augment(
    padded: Shaped[Tensor, "batch channels tall wide"], size: torch.Size, generator: torch.Generator, *, flip: bool
) -> Shaped[Tensor, "batch channels height width"]:
    """A random window of each padded image, mirrored half of the time.

    Args:
        padded: images with a border.
        size: height and width of the window.
        generator: where the draws come from.
        flip: whether to mirror.
    """
    height, width = size
    count = len(padded)
    top = torch.randint(padded.shape[-2] - height + 1, (count, 1), generator=generator)
    left = torch.randint(padded.shape[-1] - width + 1, (count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    one = torch.arange(count)[:, None, None]
    window = padded.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None, :]]
    return window.permute(0, 3, 1, 2)


def ten_views(images: Shaped[Tensor, "batch channels height width"]) -> Sequence[Tensor]:
    """The images, the same shifted by a pixel in both directions at once, four ways, and the mirror images of all.

    What enters the frame mirrors its neighbours. More views than in Page, "How to train your ResNet" (2018).
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[..., y : y + height, x : x + width] for y, x in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))]
    return [view.contiguous(memory_format=torch.channels_last) for each in shifted for view in (each, each.flip(-1))]


def channels_last(module: nn.Module) -> nn.Module:
    """The module itself, its weights laid out with channels innermost, as convolutions like it."""
    # PyTorch documents the keyword but leaves it out of its type annotations.
    to: Callable[..., nn.Module] = module.to
    return to(memory_format=torch.channels_last)


def classes_only(labels: Int[Tensor, " count"], classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Places of the labels that are among `classes`, and these labels counted from 0 in the order given.

    >>> classes_only(torch.tensor([7, 2, 9]), (9, 7))
    (tensor([0, 2]), tensor([1, 0]))
    """
    matches = labels[:, None] == torch.tensor(classes)
    places = matches.any(1).nonzero()[:, 0]
    return places, matches[places].int().argmax(1)
