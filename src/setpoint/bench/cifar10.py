"""The CIFAR-10 task: 32x32 colour images and a wide VGG-like network, in bfloat16 where that is faster."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Shaped, UInt8
from torch import Tensor, nn

from setpoint.bench.data import cache_folder, find_data, missing
from setpoint.bench.device import autocast, best_device, product_dtype
from setpoint.bench.images import channels_last, score, shuffled_batches
from setpoint.bench.models import PlainNet
from setpoint.bench.task import BenchError, Dimension, Metric, Score, Split, warm_up_cosine

BATCH = 128
FOLDER = "uoft-cs/cifar10/data"
WIDTHS = (32, 128, 128, 256, 256, 256)
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


@dataclass(frozen=True)
class Cifar10:
    """50,000 training images, a fixed tenth of which validates, and 10,000 test images.

    Krizhevsky, "Learning multiple layers of features from tiny images" (2009).

    Args:
        epochs: passes over the training images.
        data: folder that holds `uoft-cs/cifar10`, or None for the usual places.
    """

    epochs: int = 5
    data: Path | None = None
    length: int | None = None
    learning_rate_factor: float = 1.0
    name: str = field(default="cifar10", init=False)
    metric: Metric = field(default="accuracy", init=False)
    device: torch.device = field(default_factory=best_device, init=False)

    @property
    def product_dtype(self) -> torch.dtype:
        """bfloat16 where the hardware has it."""
        return product_dtype(self.device)

    @property
    def dtype(self) -> str:
        """Name of the type that products are computed in."""
        return str(self.product_dtype).removeprefix("torch.")

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """Channels of the six convolutions."""
        return {f"conv{number}": Dimension(width, 8) for number, width in enumerate(WIDTHS, start=1)}

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the nine tenths that train."""
        return 45_000 // BATCH

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return self.epochs * self.steps_per_epoch if self.length is None else self.length

    @property
    def steps_per_validation(self) -> int:
        """Every epoch."""
        return self.steps_per_epoch

    def with_steps(self, steps: int) -> Cifar10:
        """The same task in a run of so many steps, its schedule stretched or compressed."""
        return replace(self, length=steps)

    def with_learning_rate_factor(self, factor: float) -> Cifar10:
        """The same task at a learning rate `factor` times as high."""
        return replace(self, learning_rate_factor=self.learning_rate_factor * factor)

    def build(self, widths: Mapping[str, int], device: torch.device | None = None) -> nn.Module:
        """A fresh VGG-like network of these widths, in channels-last layout."""
        with device or self.device:
            return channels_last(PlainNet(widths, frozenset({1, 3, 5}), channels=3, classes=10))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum."""
        return torch.optim.SGD(
            model.parameters(), lr=0.1 * self.learning_rate_factor, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """A fifth of the run rising, then half a cosine."""
        return warm_up_cosine(optimizer, steps=self.steps, warm_up=0.2)

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which products run in `dtype`."""
        return autocast(self.device, self.product_dtype)

    def example(self) -> tuple[Tensor, ...]:
        """One batch of noise: blank images would leave BatchNorm nothing to normalise."""
        images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return (images.to(self.device, memory_format=torch.channels_last),)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images mirrored half of the time and shifted by up to four pixels, and their classes."""
        images, labels = _splits(self.data)["train"]
        for x, y in shuffled_batches(images, labels, batch=BATCH, seed=seed, shift=4, flip=True):
            yield _normalised(x).to(self.device, memory_format=torch.channels_last), y.to(self.device)

    def loss(
        self, model: nn.Module, inputs: Shaped[Tensor, "batch ..."], targets: Shaped[Tensor, "batch ..."]
    ) -> Tensor:
        """Cross-entropy with label smoothing 0.1."""
        with self.autocast():
            scores = model(inputs)
        return F.cross_entropy(scores.float(), targets, label_smoothing=0.1)

    def evaluate(self, model: nn.Module, split: Split) -> Score:
        """Cross-entropy and accuracy on a split."""
        images, labels = _splits(self.data)[split]
        return score(model, _normalised(images).to(memory_format=torch.channels_last), labels, self.autocast)


def _normalised(images: Tensor) -> Tensor:
    """Pixels 0..255 to zero mean and unit variance per colour."""
    return (images.float() / 255 - MEAN) / DEVIATION


@lru_cache(maxsize=1)
def _splits(data: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """8-bit images and labels of each split; a fixed tenth of the training images validates."""
    arrays = {name: torch.from_numpy(array) for name, array in _arrays(data).items()}
    images, labels = arrays["train_images"], arrays["train_labels"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    validation, train = torch.split(order, [len(order) // 10, len(order) - len(order) // 10])
    return {
        "train": (images[train], labels[train]),
        "validation": (images[validation], labels[validation]),
        "test": (arrays["test_images"], arrays["test_labels"]),
    }


def _arrays(data: Path | None) -> dict[str, np.ndarray]:
    """Decoded arrays, from the user's cache folder if they are there."""
    folder = find_data(FOLDER, data)
    sizes = "hub" if folder is None else "-".join(str(file.stat().st_size) for file in sorted(folder.glob("*.parquet")))
    cached = cache_folder() / f"cifar10-{sizes}.npz"
    if cached.exists():
        with np.load(cached) as arrays:
            return dict(arrays)
    arrays = {}
    for split in ("train", "test"):
        pixels, labels = _decode(_from_folder(folder, split) if folder else _from_hub(split))
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = pixels, labels
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npz", delete=False) as file:
        np.savez(file, **arrays)
    os.replace(file.name, cached)
    return arrays


def _decode(rows: Iterable[tuple[bytes, int]]) -> tuple[UInt8[np.ndarray, "count 3 32 32"], np.ndarray]:
    """Compressed images and labels as arrays."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BenchError('the cifar10 task needs pillow: pip install "setpoint[bench]"') from error
    images, labels = [], []
    for content, label in rows:
        images.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.uint8).transpose(2, 0, 1))
        labels.append(label)
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _from_folder(folder: Path, split: str) -> Iterator[tuple[bytes, int]]:
    """Rows of the split's parquet files."""
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise BenchError('the cifar10 task needs pyarrow: pip install "setpoint[bench]"') from error
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise BenchError(f"no {split}-*.parquet in {folder}")
    for file in files:
        table = parquet.read_table(file)
        for image, label in zip(table["img"].to_pylist(), table["label"].to_pylist(), strict=True):
            yield image["bytes"], label


def _from_hub(split: str) -> Iterator[tuple[bytes, int]]:
    """Rows of the split on the Hugging Face Hub."""
    try:
        import datasets
    except ImportError as error:
        raise BenchError('the cifar10 task needs datasets: pip install "setpoint[bench]"') from error
    try:
        rows: Any = datasets.load_dataset("uoft-cs/cifar10", split=split)
    except (OSError, RuntimeError, ValueError) as error:
        raise missing(FOLDER, f"{type(error).__name__}: {error}") from error
    rows = rows.cast_column("img", datasets.Image(decode=False))
    for row in rows:
        yield row["img"]["bytes"], row["label"]
