"""The benchmark models, each built from a table of widths."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block of two 3x3 convolutions: `relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Output of the block."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class ResidualNet(nn.Module):
    """Residual network: stem, stages of blocks, global average pool, classifier.

    Args:
        widths: `"stage1"` is the width of the first stage's residual stream (and of the stem),
            `"stage1.block1"` the inner width of its first block, and so on; each stage after the
            first halves height and width.
        blocks: number of blocks of each stage.
        channels: channels of the input.
        classes: number of classes.
    """

    def __init__(self, widths: Mapping[str, int], blocks: tuple[int, ...], channels: int, classes: int) -> None:
        super().__init__()
        width = widths["stage1"]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Sequential] = []
        for stage, count in enumerate(blocks, start=1):
            stages.append(nn.Sequential())
            for block in range(1, count + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                outputs = widths[f"stage{stage}"]
                stages[-1].append(Block(width, widths[f"stage{stage}.block{block}"], outputs, stride))
                width = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        scores: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return scores


class PlainNet(nn.Module):
    """VGG-like network: 3x3 convolutions with BatchNorm and ReLU, max pools between, linear classifier.

    Args:
        widths: channels of `"conv1"`, `"conv2"`, ...
        pool_after: which convolutions (from 1) are followed by a 2x2 max pool.
        channels: channels of the input.
        classes: number of classes.
    """

    def __init__(self, widths: Mapping[str, int], pool_after: frozenset[int], channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(1, len(widths) + 1):
            width = widths[f"conv{number}"]
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        scores: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return scores


class CausalSelfAttention(nn.Module):
    """Causal attention with one fused projection to queries, keys and values.

    Args:
        n_embd: features of the residual stream.
        n_head: number of heads.
        head_dim: features of each head.
    """

    def __init__(self, n_embd: int, n_head: int, head_dim: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_inner = n_head * head_dim
        self.c_attn = nn.Linear(n_embd, 3 * self.n_inner)
        self.c_proj = nn.Linear(self.n_inner, n_embd)

    def forward(self, x: Float[Tensor, "batch time embd"]) -> Float[Tensor, "batch time embd"]:
        """What each position gathers from itself and the positions before it."""
        B, T, _ = x.size()
        q, k, v = self.c_attn(x).split(self.n_inner, dim=2)
        C = self.n_inner
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        out: Tensor = self.c_proj(y)
        return out


class Layer(nn.Module):
    """Transformer layer, norm first: attention, then a GELU network of `neurons` neurons."""

    def __init__(self, n_embd: int, n_head: int, head_dim: int, neurons: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, head_dim)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.c_fc = nn.Linear(n_embd, neurons)
        self.c_proj = nn.Linear(neurons, n_embd)

    def forward(self, x: Float[Tensor, "batch time embd"]) -> Float[Tensor, "batch time embd"]:
        """The residual stream after this layer."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return x


class CharGPT(nn.Module):
    """Character-level GPT with learned positions and a head tied to the embedding.

    Args:
        widths: `"layer1.heads"` and `"layer1.neurons"`, and so on for each layer.
        vocabulary: number of distinct characters.
        block: longest context, in characters.
        n_embd: features of the residual stream.
        head_dim: features of each head.
    """

    def __init__(self, widths: Mapping[str, int], vocabulary: int, block: int, n_embd: int, head_dim: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, n_embd)
        self.wpe = nn.Embedding(block, n_embd)
        number_of_layers = len(widths) // 2
        self.layers = nn.ModuleList(
            Layer(n_embd, widths[f"layer{i}.heads"], head_dim, widths[f"layer{i}.neurons"])
            for i in range(1, number_of_layers + 1)
        )
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        self._initialise(0.02, 0.02 / (2 * number_of_layers) ** 0.5)

    def _initialise(self, deviation: float, residual_deviation: float) -> None:
        """GPT-2's initialisation: what writes to the residual stream starts smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, 0.0, residual_deviation if "c_proj" in name else deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocabulary"]:
        """Scores of the next character at every position."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.lm_head(self.ln_f(x))
        return scores
