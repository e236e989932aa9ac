"""The digits task: scikit-learn's 8x8 handwritten digits and a residual CNN far larger than they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from setpoint.bench.images import channels_last, score, shuffled_batches
from setpoint.bench.models import ResidualNet
from setpoint.bench.task import BenchError, Dimension, Metric, Score, Split, warm_up_cosine

Images = tuple[Tensor, Tensor]
BATCH = 64
NUM_TRAIN = 971


@dataclass(frozen=True)
class Digits:
    """1,797 images: two fixed fifths test, a fixed tenth of the rest validates.

    Alpaydin and Kaynak, "Cascading classifiers", Kybernetika 34 (1998), as embedded in scikit-learn.

    Args:
        epochs: passes over the training images.
        width: channels of the first stage; the second has twice as many.
    """

    epochs: int = 40
    width: int = 64
    length: int | None = None
    learning_rate_factor: float = 1.0
    name: str = field(default="digits", init=False)
    metric: Metric = field(default="accuracy", init=False)
    dtype: str = field(default="float32", init=False)
    device: torch.device = field(default=torch.device("cpu"), init=False)

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """Residual streams and inner widths of two stages of two blocks; wide ones in steps of 8, which run faster."""
        block = 8 if self.width >= 64 else 4
        first, second = Dimension(self.width, block), Dimension(2 * self.width, block)
        return {
            "stage1": first,
            "stage1.block1": first,
            "stage1.block2": first,
            "stage2": second,
            "stage2.block1": second,
            "stage2.block2": second,
        }

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images."""
        return NUM_TRAIN // BATCH

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return self.epochs * self.steps_per_epoch if self.length is None else self.length

    @property
    def steps_per_validation(self) -> int:
        """Every second epoch."""
        return 2 * self.steps_per_epoch

    def with_steps(self, steps: int) -> Digits:
        """The same task in a run of so many steps, its schedule stretched or compressed."""
        return replace(self, length=steps)

    def with_learning_rate_factor(self, factor: float) -> Digits:
        """The same task at a learning rate `factor` times as high."""
        return replace(self, learning_rate_factor=self.learning_rate_factor * factor)

    def build(self, widths: Mapping[str, int], device: torch.device | None = None) -> nn.Module:
        """A fresh residual CNN of these widths."""
        with device or self.device:
            return channels_last(ResidualNet(widths, (2, 2), channels=1, classes=10))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum."""
        return torch.optim.SGD(
            model.parameters(), lr=0.1 * self.learning_rate_factor, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """A tenth of the run rising, then half a cosine."""
        return warm_up_cosine(optimizer, steps=self.steps, warm_up=0.1)

    def example(self) -> tuple[Tensor, ...]:
        """One batch of noise: blank images would leave BatchNorm nothing to normalise."""
        images = torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return (images.to(memory_format=torch.channels_last),)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images shifted by up to a pixel, and their digits."""
        images, labels = _splits()["train"]
        for x, y in shuffled_batches(images, labels, batch=BATCH, seed=seed, shift=1, flip=False):
            yield x.to(memory_format=torch.channels_last), y

    def loss(
        self, model: nn.Module, inputs: Shaped[Tensor, "batch ..."], targets: Shaped[Tensor, "batch ..."]
    ) -> Tensor:
        """Cross-entropy with label smoothing 0.1."""
        return F.cross_entropy(model(inputs), targets, label_smoothing=0.1)

    def evaluate(self, model: nn.Module, split: Split) -> Score:
        """Cross-entropy and accuracy on a split."""
        images, labels = _splits()[split]
        return score(model, images, labels, contextlib.nullcontext)


@lru_cache(maxsize=1)
def _splits() -> dict[str, Images]:
    """Images in [0, 1] and labels of each split; the split never changes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BenchError('the digits task needs scikit-learn: pip install "setpoint[bench]"') from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    num_test = 2 * len(order) // 5
    parts = torch.split(order, [num_test, len(order) - num_test - NUM_TRAIN, NUM_TRAIN])
    names = ("test", "validation", "train")
    return {name: (images[part], targets[part]) for name, part in zip(names, parts, strict=True)}
