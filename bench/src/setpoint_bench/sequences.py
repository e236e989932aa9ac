"""Sequences: images read pixel by pixel, and the linear recurrent classifiers that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from setpoint_bench.images import Splits, standardised
from setpoint_bench.models import SequenceClassifier
from setpoint_bench.task import Dimension, Split
from setpoint_bench.tensors import shuffled_rows


@dataclass(frozen=True)
class SequenceFamily:
    """Sequence classifiers; the number of states, the same in all blocks, is their free width."""

    inputs: int
    channels: int
    states: int
    blocks: int = 1
    dropout: float = 0.1
    classes: int = 10

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return {"states": Dimension(self.states)}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        return SequenceClassifier(
            self.inputs,
            self.classes,
            num_channels=self.channels,
            num_states=widths["states"],
            num_blocks=self.blocks,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class PixelSequences:
    """Images as sequences, row after row, or in one fixed random order.

    Args:
        load: gives raw pixels and labels of "train", "validation" and "test", from a data folder or the usual places.
        shape: channels, height and width of the images.
        num_train: images to train on.
        mean: of each channel's raw pixels.
        deviation: of each channel's raw pixels.
        pool: side of the squares of pixels that are averaged into one first.
        folder: the data folder, or None for the usual places.
    """

    load: Callable[[Path | None], Splits]
    shape: tuple[int, int, int]
    num_train: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    pool: int = 1
    folder: Path | None = None

    @property
    def length(self) -> int:
        return (self.shape[1] // self.pool) * (self.shape[2] // self.pool)

    def example(self, batch: int) -> Float[Tensor, "batch steps channels"]:
        return torch.randn(batch, self.length, self.shape[0], generator=torch.Generator().manual_seed(0))

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.load(self.folder)["train"]
        for rows in shuffled_rows(len(images), batch, torch.Generator().manual_seed(seed)):
            yield self._read(images[rows]), labels[rows]

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = self.load(self.folder)[split]
        return self._read(images), labels

    def _read(self, images: Shaped[Tensor, "count channels height width"]) -> Float[Tensor, "count steps channels"]:
        """Pixels to zero mean and unit variance per channel, in reading order."""
        pixels = standardised(F.avg_pool2d(images.float(), self.pool), self.mean, self.deviation)
        return pixels.flatten(2).mT.contiguous()
