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
        scores: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return scores


class PlainNet(nn.Module):
    """VGG-like network: 3x3 convolutions, max pools after some, BatchNorm and ReLU, linear classifier.

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
            layers += _convolution(channels, width, pool=number in pool_after)
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        scores: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return scores


def _convolution(inputs: int, outputs: int, *, pool: bool = False) -> list[nn.Module]:
    """A 3x3 convolution, a max pool if asked for, BatchNorm and ReLU, which have a quarter of the work after a pool."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(outputs), nn.ReLU()]


class ShortBlock(nn.Module):
    """Residual block of two 3x3 convolutions with its last ReLU inside: `x + relu(bn2(conv2(relu(bn1(conv1(x))))))`."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_convolution(width, inner), *_convolution(inner, width))

    def forward(self, x: Float[Tensor, "batch width height width_"]) -> Float[Tensor, "batch width height width_"]:
        out: Tensor = x + self.branch(x)
        return out


class Patches(nn.Module):
    """Each pixel's 3x3 patch in the cosine basis of colour, height and width, each coefficient at unit variance: fixed.

    The principal components of small patches of photographs are close to this basis, so what comes out is nearly
    white. After the whitened patches of Page, "How to train your ResNet" (2018).

    Args:
        width: how many of the 27 coefficients, from the lowest frequencies on.
    """

    filters: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        place, frequency = torch.arange(3) + 0.5, torch.arange(3.0)
        cosines = F.normalize(torch.cos(torch.pi / 3 * frequency[:, None] * place))
        products = torch.einsum("ai,bj,ck->abcijk", cosines, cosines, cosines).reshape(27, 3, 3, 3)
        by_frequency = torch.cartesian_prod(frequency, frequency, frequency).sum(1).argsort(stable=True)
        self.register_buffer("filters", products[by_frequency[:width]])
        # Fine detail is mostly noise: the eps keeps small what varies little.
        self.norm = nn.BatchNorm2d(width, eps=0.01, affine=False)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch coefficients height width"]:
        out: Tensor = self.norm(F.conv2d(x, self.filters, padding=1))
        return out


class ShortResidualNet(nn.Module):
    """Residual network of seven convolutions for short runs, after Page's ResNet-9 (DAWNBench, 2018).

    Fixed patches; convolution and pool; residual block; twice convolution and pool; residual block; global max pool;
    classifier, whose scores are damped to a fifth.

    Args:
        widths: coefficients of `"patches"`, channels of `"stage1"`, `"stage2"`, `"stage3"`, and the inner ones of
            `"block1"`, `"block3"`.
        classes: number of classes.
    """

    def __init__(self, widths: Mapping[str, int], classes: int) -> None:
        super().__init__()
        first, second, third = (widths[name] for name in ("stage1", "stage2", "stage3"))
        self.features = nn.Sequential(
            Patches(widths["patches"]),
            nn.Sequential(*_convolution(widths["patches"], first, pool=True)),
            ShortBlock(first, widths["block1"]),
            nn.Sequential(*_convolution(first, second, pool=True)),
            nn.Sequential(*_convolution(second, third, pool=True)),
            ShortBlock(third, widths["block3"]),
        )
        self.head = nn.Linear(third, classes)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        scores: Tensor = 0.2 * self.head(self.features(x).amax((2, 3)))
        return scores


class CausalSelfAttention(nn.Module):
    """Causal attention with one fused projection to queries, keys and values.

    Args:
        n_embd: features of the residual stream.
        n_head: number of heads.
        head_dim: features of each head.
        fused: use PyTorch's fused kernel on a processor, too.
    """

    def __init__(self, n_embd: int, n_head: int, head_dim: int, fused: bool = False) -> None:
        super().__init__()
        self.n_head, self.fused = n_head, fused
        self.n_inner = n_head * head_dim
        self.c_attn = nn.Linear(n_embd, 3 * self.n_inner)
        self.c_proj = nn.Linear(self.n_inner, n_embd)

    def forward(self, x: Float[Tensor, "batch time embd"]) -> Float[Tensor, "batch time embd"]:
        B, T, _ = x.size()
        q, k, v = self.c_attn(x).split(self.n_inner, dim=2)
        C = self.n_inner
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = causal_attention(q, k, v, self.fused).transpose(1, 2).contiguous().view(B, T, C)
        out: Tensor = self.c_proj(y)
        return out


def causal_attention(
    q: Float[Tensor, "batch head time dim"],
    k: Float[Tensor, "batch head time dim"],
    v: Float[Tensor, "batch head time dim"],
    fused: bool = False,
) -> Float[Tensor, "batch head time dim"]:
    """`softmax(q k' / sqrt(dim)) v`, where each position sees itself and those before it."""
    if fused or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a processor the backward pass of the fused kernel takes far longer than that of plain products, unless both
    # the window and the heads are small.
    later = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3)
    gathered: Tensor = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    return gathered


class Layer(nn.Module):
    """Transformer layer, norm first: attention, then a GELU network of `neurons` neurons."""

    def __init__(
        self, n_embd: int, n_head: int, head_dim: int, neurons: int, dropout: float, fused: bool = False
    ) -> None:
        super().__init__()
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, head_dim, fused)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.c_fc = nn.Linear(n_embd, neurons)
        self.c_proj = nn.Linear(neurons, n_embd)

    def forward(self, x: Float[Tensor, "batch time embd"]) -> Float[Tensor, "batch time embd"]:
        x = x + self.dropout(self.attn(self.ln_1(x)))
        x = x + self.dropout(self.c_proj(F.gelu(self.c_fc(self.ln_2(x)))))
        return x


class CharGPT(nn.Module):
    """Character-level GPT with learned positions and a head tied to the embedding.

    Args:
        widths: `"layer1.heads"` and `"layer1.neurons"`, and so on for each layer.
        vocabulary: number of distinct characters.
        block: longest context, in characters.
        n_embd: features of the residual stream.
        head_dim: features of each head.
        dropout: share of the embedding and of what each layer adds that is dropped in training.
        fused: use PyTorch's fused attention on a processor, too.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        vocabulary: int,
        block: int,
        n_embd: int,
        head_dim: int,
        dropout: float = 0.0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.wte = nn.Embedding(vocabulary, n_embd)
        self.wpe = nn.Embedding(block, n_embd)
        number_of_layers = len(widths) // 2
        self.layers = nn.ModuleList(
            Layer(n_embd, widths[f"layer{i}.heads"], head_dim, widths[f"layer{i}.neurons"], dropout, fused)
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
        x = self.dropout(self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device)))
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.lm_head(self.ln_f(x))
        return scores
