"""Image batches: an endless shuffled stream with light augmentation, and scoring on whole splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from setpoint.bench.task import Score


def shuffled_batches(
    images: Shaped[Tensor, "count channels height width"],
    labels: Int[Tensor, " count"],
    *,
    batch: int,
    seed: int,
    shift: int,
    flip: bool,
) -> Iterator[tuple[Shaped[Tensor, "batch channels height width"], Int[Tensor, " batch"]]]:
    """Endless augmented batches, drawn from a generator of their own; the last, short batch is left out.

    Args:
        images: the training images, on the CPU.
        labels: their classes.
        batch: images per batch.
        seed: seed of the order and of the augmentation.
        shift: largest shift in pixels, in each direction; what leaves the frame is lost, zeros come in.
        flip: whether to mirror half of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(images, (shift, shift, shift, shift))
    while True:
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            rows = order[start : start + batch]
            yield augment(padded[rows], images.shape[-2:], generator, flip=flip), labels[rows]


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


def channels_last(module: nn.Module) -> nn.Module:
    """The module itself, its weights laid out with channels innermost, as convolutions like it."""
    # PyTorch documents the keyword but leaves it out of its type annotations.
    to: Callable[..., nn.Module] = module.to
    return to(memory_format=torch.channels_last)


@torch.no_grad()
def score(
    model: nn.Module,
    images: Float[Tensor, "count channels height width"],
    labels: Int[Tensor, " count"],
    autocast: Callable[[], AbstractContextManager[object]],
    batch: int = 512,
) -> Score:
    """Mean cross-entropy in nats and accuracy over all images; the model's mode is restored.

    Args:
        model: gives class scores.
        images: inputs.
        labels: their classes.
        autocast: makes the context to run the model in.
        batch: images per forward pass.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss, right = 0.0, 0
    try:
        for x, y in zip(torch.split(images, batch), torch.split(labels, batch), strict=True):
            x, y = x.to(device), y.to(device)
            with autocast():
                scores = model(x).float()
            loss += float(F.cross_entropy(scores, y, reduction="sum"))
            right += int((scores.argmax(1) == y).sum())
    finally:
        model.train(training)
    return Score(loss / len(images), right / len(images))
