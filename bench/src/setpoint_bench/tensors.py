"""Tensors: data that lie ready in memory, for a task of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from setpoint_bench.task import BenchError, Split

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Tensors:
    """Inputs and targets, shuffled again in each pass; the last, short batch of a pass is left out.

    Args:
        train: inputs and targets to train on, along the first dim; a fixed tenth of them validates unless
            `validation` is given.
        test: inputs and targets to report on.
        validation: inputs and targets to tune on.

    Raises:
        BenchError: inputs and targets differ in number, or there are too few.

    >>> data = Tensors(train=(torch.arange(20.0), torch.arange(20)), test=(torch.zeros(1), torch.zeros(1)))
    >>> data.num_train, len(data.split("validation")[0])
    (18, 2)
    """

    train: Pair
    test: Pair
    validation: Pair | None = None

    def __post_init__(self) -> None:
        for name, pair in (("train", self.train), ("test", self.test), ("validation", self.validation)):
            if pair is not None and len(pair[0]) != len(pair[1]):
                raise BenchError(f"{name} holds {len(pair[0])} inputs and {len(pair[1])} targets: give as many of each")
        if len(self.train[0]) < 10:
            raise BenchError(f"train holds {len(self.train[0])} examples: give at least 10, a tenth of which validates")

    @property
    def num_train(self) -> int:
        return len(self._fitted[0])

    @property
    def _fitted(self) -> Pair:
        return self.train if self.validation is not None else held_out(self.train)[0]

    def example(self, batch: int) -> Tensor:
        """The first inputs, repeated if there are too few."""
        inputs = self._fitted[0]
        return inputs[torch.arange(batch) % len(inputs)]

    def batches(self, batch: int, seed: int) -> Iterator[Pair]:
        inputs, targets = self._fitted
        for rows in shuffled_rows(len(inputs), batch, torch.Generator().manual_seed(seed)):
            yield inputs[rows], targets[rows]

    def split(self, split: Split) -> Pair:
        return self.test if split == "test" else self.validation or held_out(self.train)[1]


def held_out(pair: Pair) -> tuple[Pair, Pair]:
    """Nine tenths to train on, and a tenth, fixed for all time, to validate on."""
    inputs, targets = pair
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    validation, train = torch.split(order, [len(order) // 10, len(order) - len(order) // 10])
    return (inputs[train], targets[train]), (inputs[validation], targets[validation])


def shuffled_rows(count: int, batch: int, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Endless batches of row numbers, each row once a pass; the last, short batch of a pass is left out.

    Raises:
        BenchError: a batch holds more than there is.
    """
    if batch > count:
        raise BenchError(f"a batch of {batch} is more than the {count} training examples: make it smaller")
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


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
