"""The Shakespeare tasks: the next character of tiny Shakespeare, by nanoGPT-like models of three sizes."""

from __future__ import annotations

import os
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from setpoint_bench.catalogue import task
from setpoint_bench.data import cache_folder, find_data, missing
from setpoint_bench.networks import CharGPT
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Dimension
from setpoint_bench.tensors import Characters

FILE = "karpathy/tiny_shakespeare/input.txt"
ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VOCABULARY = 65


@dataclass(frozen=True)
class GPTFamily:
    """Character GPTs; heads and neurons of each layer are free, and the residual stream, which only `small` narrows.

    Args:
        layers: number of layers.
        heads: dense number of heads; together they are as wide as the residual stream, and neurons four times.
        window: longest context, in characters.
        head_dim: features of each head.
        dropout: share of what each layer adds that is dropped in training.
    """

    layers: int
    heads: int
    window: int
    head_dim: int = 64
    dropout: float = 0.0

    @property
    def n_embd(self) -> int:
        """Features of the dense residual stream."""
        return self.heads * self.head_dim

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        dimensions = {"n_embd": Dimension(self.n_embd, 8)}
        for layer in range(1, self.layers + 1):
            dimensions[f"layer{layer}.heads"] = Dimension(self.heads)
            dimensions[f"layer{layer}.neurons"] = Dimension(4 * self.n_embd, 8)
        return dimensions

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        of_layers = {name: width for name, width in widths.items() if name != "n_embd"}
        return CharGPT(of_layers, VOCABULARY, self.window, widths["n_embd"], self.head_dim, self.dropout)


@task("shakespeare")
def shakespeare(data: Path | None = None) -> SimpleTask:
    """Shakespeare in 1,115,394 characters: by convention the last tenth tests; the last tenth before it validates.

    Karpathy, "The unreasonable effectiveness of recurrent neural networks" (2015); the model is that of nanoGPT.

    Args:
        data: folder that holds `karpathy/tiny_shakespeare`, or None for the usual places.
    """
    recipe = _recipe(steps=2400, batch=32, learning_rate=3e-3)
    made = _task("shakespeare", GPTFamily(layers=4, heads=6, window=128, head_dim=32), recipe, data)
    return replace(made, scratch_learning_rate=1.5)  # docs/tasks.md, "What was tuned"


@task("shakespeare-mini")
def shakespeare_mini(data: Path | None = None) -> SimpleTask:
    """Shakespeare and a small GPT, for runs of a minute or two.

    Args:
        data: folder that holds `karpathy/tiny_shakespeare`, or None for the usual places.
    """
    recipe = _recipe(steps=2000, batch=16, learning_rate=6e-3)
    made = _task("shakespeare-mini", GPTFamily(layers=3, heads=4, window=64, head_dim=32), recipe, data)
    return replace(made, scratch_learning_rate=1.5)  # docs/tasks.md, "What was tuned"


@task("shakespeare-10m")
def shakespeare_10m(data: Path | None = None) -> SimpleTask:
    """Shakespeare and nanoGPT's model of ten million parameters for a GPU, with its length and dropout.

    Args:
        data: folder that holds `karpathy/tiny_shakespeare`, or None for the usual places.
    """
    recipe = _recipe(steps=5000, batch=64, learning_rate=1e-3)
    return _task("shakespeare-10m", GPTFamily(layers=6, heads=6, window=256, dropout=0.2), recipe, data)


def _recipe(steps: int, batch: int, learning_rate: float) -> Recipe:
    """AdamW; a fifteenth of the run rising, then half a cosine down to a tenth."""
    return Recipe(
        steps=steps,
        batch=batch,
        rule="adamw",
        learning_rate=learning_rate,
        weight_decay=0.1,
        warm_up=1 / 15,
        floor=0.1,
        mixed=True,
    )


def _task(name: str, family: GPTFamily, recipe: Recipe, data: Path | None) -> SimpleTask:
    """A task on the text, judged by its loss."""
    characters = Characters(splits, VOCABULARY, family.window, folder=data)
    return SimpleTask(name, family, characters, recipe, metric="loss")


@lru_cache(maxsize=1)
def splits(data: Path | None) -> Mapping[str, Tensor]:
    """The numbered text of each split; characters are numbered in sorted order."""
    text = read_text(data)
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    if len(number) > VOCABULARY:
        raise BenchError(f"{FILE} has {len(number)} distinct characters, tiny Shakespeare has {VOCABULARY}")
    numbers = torch.tensor([number[character] for character in text])
    num_train = int(0.9 * len(numbers))
    num_fit = num_train - num_train // 10
    return {"train": numbers[:num_fit], "validation": numbers[num_fit:num_train], "test": numbers[num_train:]}


def read_text(data: Path | None) -> str:
    return (find_data(FILE, data) or _download()).read_text(encoding="utf-8")


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
