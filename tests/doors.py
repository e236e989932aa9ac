"""Small models of many families, as their users write them: this file knows nothing of Setpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden.models import GPT


class Positional(nn.Module):
    """A transformers model of one output, whose inputs have places instead of names."""

    def __init__(self, inner: nn.Module, *names: str) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.inner(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]
        return logits


class CNN(nn.Module):
    """Two convolutions, flattened into two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3)
        self.c, self.d = nn.Linear(16 * 4 * 4, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).flatten(1)
        return self.d(F.relu(self.c(x)))


class Conv(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Conv(width, width, 3), Conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class Halves(nn.Module):
    """A block as in recent YOLOs: one half of the channels goes round, and `c`, their number, is for an export only."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.before, self.after = Conv(inputs, 2 * self.c), Conv(3 * self.c, outputs)
        self.blocks = nn.ModuleList([Bottleneck(self.c)])

    def _merged(self, pieces: list[Tensor]) -> Tensor:
        for block in self.blocks:
            pieces.append(block(pieces[-1]))
        return self.after(torch.cat(pieces, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._merged(list(self.before(x).chunk(2, 1)))

    def forward_split(self, x: Tensor) -> Tensor:
        return self._merged(list(self.before(x).split((self.c, self.c), 1)))


class Detector(nn.Module):
    """Two scales, and a head whose code writes the number of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = Conv(3, 12, 3, 2), Conv(24, 24, 3, 2)
        self.fine, self.coarse = Halves(12, 24), Halves(24, 32)
        self.outputs = 7
        self.heads = nn.ModuleList(nn.Sequential(Conv(n, 16, 3), nn.Conv2d(16, 7, 1)) for n in (24, 32))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        scales = fine, self.coarse(self.down(fine))
        found = [head(scale) for head, scale in zip(self.heads, scales, strict=True)]
        return torch.cat([each.view(len(x), self.outputs, -1) for each in found], 2)


class Translator(nn.Module):
    """PyTorch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.inner = nn.Transformer(32, 4, 1, 1, 48, 0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(source), self.embedding(target)))


def resnet() -> nn.Module:
    """torchvision's, with a block a stage."""
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)


def mobile() -> nn.Module:
    """timm's, with a depthwise block and one that squeezes and excites."""
    from timm.models import MobileNetV3
    from timm.models._efficientnet_builder import decode_arch_def

    blocks = decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r1_k3_s2_e3_c16_se0.25"], ["cn_r1_k1_s1_c24"]])
    return MobileNetV3(blocks, num_classes=4, stem_size=8, num_features=32)


def vit() -> nn.Module:
    """Timm's."""
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4, num_classes=4)


def _of_text(kind: str, task: str, **sizes: Any) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(kind, vocab_size=50, **sizes)
    return Positional(getattr(transformers, task)(config), "input_ids", "attention_mask")


_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_SIZES |= {"max_position_embeddings": 16}


def bert() -> nn.Module:
    """A classifier of text."""
    return _of_text("bert", "BertForSequenceClassification", **_SIZES)


def gpt2() -> nn.Module:
    """transformers', whose linear layers write sizes in their code."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return _of_text("gpt2", "GPT2LMHeadModel", use_cache=False, **sizes)


def llama() -> nn.Module:
    """Two heads of queries to one of keys and values."""
    return _of_text("llama", "LlamaForCausalLM", num_key_value_heads=2, use_cache=False, **_SIZES)


Make = Callable[[], nn.Module]


def _image(size: int) -> tuple[Tensor, ...]:
    return (torch.rand(2, 3, size, size),)


def _text() -> tuple[Tensor, ...]:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return torch.randint(1, 50, (2, 8)), mask


FAMILIES: dict[Make, Any] = {
    CNN: lambda: _image(8),
    resnet: lambda: _image(32),
    mobile: lambda: _image(16),
    vit: lambda: _image(16),
    Detector: lambda: _image(16),
    bert: _text,
    gpt2: _text,
    llama: _text,
    GPT: lambda: (torch.randint(0, 16, (2, 8)),),
    Translator: lambda: (torch.randint(0, 50, (2, 8)), torch.randint(0, 50, (2, 5))),
}
"""By family, what makes an example."""
