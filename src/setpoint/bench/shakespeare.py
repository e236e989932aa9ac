"""The Shakespeare task: the next character of tiny Shakespeare, by a nanoGPT-like model."""

from __future__ import annotations

import os
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from setpoint.bench.data import cache_folder, find_data, missing
from setpoint.bench.device import autocast, best_device, product_dtype
from setpoint.bench.models import CharGPT
from setpoint.bench.task import Dimension, Metric, Score, Split, warm_up_cosine

FILE = "karpathy/tiny_shakespeare/input.txt"
ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BATCH = 64
BLOCK = 64
LAYERS = 4
HEADS = 6
HEAD_DIM = 64
N_EMBD = HEADS * HEAD_DIM
NUM_WINDOWS = 256


@dataclass(frozen=True)
class Shakespeare:
    """1,115,394 characters: by convention the last tenth tests; the last tenth before it validates.

    Karpathy, "The unreasonable effectiveness of recurrent neural networks" (2015); the model is that of
    nanoGPT with four layers of six heads of 64 features.

    Args:
        steps: optimizer steps of one run.
        data: folder that holds `karpathy/tiny_shakespeare`, or None for the usual places.
    """

    steps: int = 1500
    data: Path | None = None
    learning_rate_factor: float = 1.0
    name: str = field(default="shakespeare", init=False)
    metric: Metric = field(default="loss", init=False)
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
        """Heads and neurons of each layer; the residual stream keeps its size."""
        dimensions = {}
        for layer in range(1, LAYERS + 1):
            dimensions[f"layer{layer}.heads"] = Dimension(HEADS)
            dimensions[f"layer{layer}.neurons"] = Dimension(4 * N_EMBD, 8)
        return dimensions

    @property
    def steps_per_validation(self) -> int:
        """Every 100 steps."""
        return 100

    def with_steps(self, steps: int) -> Shakespeare:
        """The same task in a run of so many steps, its schedule stretched or compressed."""
        return replace(self, steps=steps)

    def with_learning_rate_factor(self, factor: float) -> Shakespeare:
        """The same task at a learning rate `factor` times as high."""
        return replace(self, learning_rate_factor=self.learning_rate_factor * factor)

    def build(self, widths: Mapping[str, int], device: torch.device | None = None) -> nn.Module:
        """A fresh GPT with these heads and neurons."""
        vocabulary = _corpus(self.data).vocabulary
        with device or self.device:
            return CharGPT(widths, vocabulary, BLOCK, N_EMBD, HEAD_DIM)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW; matrices decay, vectors do not."""
        decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3 * self.learning_rate_factor, betas=(0.9, 0.99))

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """A fifteenth of the run rising, then half a cosine down to a tenth."""
        return warm_up_cosine(optimizer, steps=self.steps, warm_up=1 / 15, floor=0.1)

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which products run in `dtype`."""
        return autocast(self.device, self.product_dtype)

    def example(self) -> tuple[Tensor, ...]:
        """One batch of random characters."""
        vocabulary = _corpus(self.data).vocabulary
        tokens = torch.randint(vocabulary, (BATCH, BLOCK), generator=torch.Generator().manual_seed(0))
        return (tokens.to(self.device),)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows at random places of the training text, and the characters that follow."""
        text = _corpus(self.data).splits["train"]
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(text) - BLOCK, (BATCH,), generator=generator)
            inputs, targets = _windows(text, starts)
            yield inputs.to(self.device), targets.to(self.device)

    def loss(
        self, model: nn.Module, inputs: Shaped[Tensor, "batch ..."], targets: Shaped[Tensor, "batch ..."]
    ) -> Tensor:
        """Cross-entropy per character, in nats."""
        with self.autocast():
            scores = model(inputs)
        return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> Score:
        """Cross-entropy per character over windows spread evenly over the split."""
        text = _corpus(self.data).splits[split]
        starts = torch.linspace(0, len(text) - BLOCK - 1, NUM_WINDOWS).long()
        training = model.training
        model.eval()
        total = 0.0
        try:
            for rows in torch.split(starts, BATCH):
                inputs, targets = _windows(text, rows)
                total += float(self.loss(model, inputs.to(self.device), targets.to(self.device))) * len(rows)
        finally:
            model.train(training)
        return Score(total / len(starts))


@dataclass(frozen=True, eq=False)
class _Corpus:
    """The text as character numbers, cut into splits."""

    vocabulary: int
    splits: Mapping[str, Tensor]


def _windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and next-character targets of the windows that begin at `starts`."""
    places = starts[:, None] + torch.arange(BLOCK)
    return text[places], text[places + 1]


@lru_cache(maxsize=1)
def _corpus(data: Path | None) -> _Corpus:
    """The numbered text; characters are numbered in sorted order."""
    text = (find_data(FILE, data) or _download()).read_text(encoding="utf-8")
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([number[character] for character in text])
    num_train = int(0.9 * len(numbers))
    num_fit = num_train - num_train // 10
    parts = {"train": numbers[:num_fit], "validation": numbers[num_fit:num_train], "test": numbers[num_train:]}
    return _Corpus(len(number), parts)


def _download() -> Path:
    """The text in the user's cache folder, fetched once."""
    cached = cache_folder() / "tiny_shakespeare.txt"
    if cached.exists():
        return cached
    try:
        with urllib.request.urlopen(ADDRESS, timeout=30) as response:
            content = response.read()
    except OSError as error:
        raise missing(FILE, f"{ADDRESS}: {error}") from error
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, cached)
    return cached
