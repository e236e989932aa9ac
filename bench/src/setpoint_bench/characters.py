"""Characters: data of a text, in windows whose targets are the next characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from setpoint_bench.task import Split


@dataclass(frozen=True)
class Characters:
    """Windows of a text as character numbers.

    Args:
        load: gives the numbered text of "train", "validation" and "test", from a data folder or the usual places.
        vocabulary: number of distinct characters.
        window: characters of a window.
        folder: the data folder, or None for the usual places.
    """

    load: Callable[[Path | None], Mapping[str, Tensor]]
    vocabulary: int
    window: int
    folder: Path | None = None

    @property
    def num_train(self) -> None:
        """Windows are drawn at random places, so there are no passes."""
        return None

    def example(self, batch: int) -> Int[Tensor, "batch window"]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (batch, self.window), generator=generator)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows at random places of the training text, and the characters that follow."""
        text = self.load(self.folder)["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._windows(text, torch.randint(len(text) - self.window, (batch,), generator=generator))

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        """All of the split, window by window; what is left over at its end is less than one."""
        text = self.load(self.folder)[split]
        return self._windows(text, torch.arange(0, len(text) - self.window, self.window))

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and next-character targets of the windows that begin at `starts`."""
        places = starts[:, None] + torch.arange(self.window)
        return text[places], text[places + 1]
