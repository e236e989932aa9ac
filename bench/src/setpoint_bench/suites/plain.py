"""The plain suite: small models written out here, each with one thing that people's own code does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint_bench.coverage import Build
from setpoint_bench.suites.families import FAMILIES
from setpoint_bench.suites.sequences import SEQUENCES


def suite() -> Mapping[str, Build]:
    return {**_SUITE, **SEQUENCES, **FAMILIES}


_SUITE: dict[str, Build] = {}


def _model(build: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    _SUITE[build.__name__.strip("_")] = build
    return build


def _image(channels: int = 3, size: int = 16, rows: int = 4) -> Tensor:
    return torch.randn(rows, channels, size, size)


class _UNet(nn.Module):
    """Two levels down and up again, with skips and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _double(3, 16), _double(16, 32)
        self.bottom = _double(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge2, self.merge1 = _double(64, 32), _double(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        a = self.merge1(torch.cat([self.up1(b), a], 1))
        out: Tensor = self.head(a)
        return out


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


@_model
def _unet() -> tuple[nn.Module, Any]:
    return _UNet(), (_image(),)


class _GroupedTransposed(nn.Module):
    """A grouped and a depthwise transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.ConvTranspose2d(16, 32, 2, 2, groups=4)
        self.c = nn.ConvTranspose2d(32, 32, 2, 2, groups=32)
        self.d = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))
        return out


@_model
def _grouped_transposed() -> tuple[nn.Module, Any]:
    return _GroupedTransposed(), (_image(),)


class _Experts(nn.Module):
    """Every expert computes, a softmax gate mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        mixed = torch.stack([expert(x) for expert in self.experts], -1)
        out: Tensor = self.head((mixed * weights.unsqueeze(-2)).sum(-1))
        return out


@_model
def _mixture_of_experts() -> tuple[nn.Module, Any]:
    return _Experts(), (torch.randn(6, 8),)


class _BatchedExperts(nn.Module):
    """Experts in one tensor, multiplied by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 8, 24)), nn.Parameter(torch.randn(4, 24, 8))
        self.gate, self.head = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bi,eih->ebh", x, self.first))
        mixed = torch.einsum("ebh,eho,be->bo", hidden, self.second, self.gate(x).softmax(-1))
        out: Tensor = self.head(mixed)
        return out


@_model
def _batched_experts() -> tuple[nn.Module, Any]:
    return _BatchedExperts(), (torch.randn(6, 8),)


class _Gated(nn.Module):
    """SwiGLU with a fused first matrix, GEGLU by `F.glu`'s sister, and a gated convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(8, 48), nn.Linear(24, 8)
        self.glu, self.back = nn.Linear(8, 32), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fused(x).chunk(2, -1)
        x = x + self.out(F.silu(gate) * value)
        out: Tensor = self.back(F.glu(self.glu(x), -1))
        return out


@_model
def _gated_mlp() -> tuple[nn.Module, Any]:
    return _Gated(), (torch.randn(6, 8),)


@_model
def _weight_norm() -> tuple[nn.Module, Any]:
    norm = nn.utils.parametrizations.weight_norm
    layers = norm(nn.Linear(8, 24)), nn.ReLU(), norm(nn.Linear(24, 16)), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(*layers), (torch.randn(6, 8),)


@_model
def _prelu_per_channel() -> tuple[nn.Module, Any]:
    layers = nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 8, 3), nn.PReLU(), nn.Conv2d(8, 2, 3)
    return nn.Sequential(*layers), (_image(),)


class _Shuffled(nn.Module):
    """Grouped convolution, channel shuffle by reshape, and super-resolution by pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1, groups=4)
        self.c, self.up = nn.Conv2d(32, 16, 3, padding=1), nn.PixelShuffle(2)
        self.d = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(x))))
        n, c, h, w = y.shape
        y = y.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        out: Tensor = self.d(F.relu(self.up(self.c(y))))
        return out


@_model
def _shuffles() -> tuple[nn.Module, Any]:
    return _Shuffled(), (_image(),)


class _ManyOutputs(nn.Module):
    """Two inputs; a dict with a tensor, a tuple and a number comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 24), nn.Linear(5, 24)
        self.classes, self.value = nn.Linear(24, 3), nn.Linear(24, 1)

    def forward(self, left: Tensor, *, right: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.left(left) + self.right(right))
        return {"classes": self.classes(hidden), "rest": (self.value(hidden), 3)}


@_model
def _many_inputs_and_outputs() -> tuple[nn.Module, Any]:
    return _ManyOutputs(), {"left": torch.randn(6, 6), "right": torch.randn(6, 5)}


class _Buffered(nn.Module):
    """A buffer with an entry per channel, and one kept out of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
        self.register_buffer("scale", torch.rand(16, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 16, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.a(x) * self.scale + self.shift))
        return out


@_model
def _channel_buffers() -> tuple[nn.Module, Any]:
    return _Buffered(), (_image(),)


class _Standardised(nn.Conv2d):
    """A convolution whose filters are standardised at each forward."""

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding)


@_model
def _weight_standardised() -> tuple[nn.Module, Any]:
    layers = (
        _Standardised(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )
    return nn.Sequential(*layers), (_image(),)


class _Mixer(nn.Module):
    """Token mixing and channel mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(9, 24), nn.GELU(), nn.Linear(24, 9))
        self.channels = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        out: Tensor = self.head(x.mean(1))
        return out


@_model
def _token_mixer() -> tuple[nn.Module, Any]:
    return _Mixer(), (torch.randn(4, 9, 12),)


class _Excited(nn.Module):
    """Squeeze and excitation between two convolutions, and a learned scale on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.gamma = nn.Parameter(torch.full((16, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        out: Tensor = self.c(x + self.gamma * self.b(x * gate))
        return out


@_model
def _squeeze_excite_layer_scale() -> tuple[nn.Module, Any]:
    return _Excited(), (_image(),)


class _Inner(nn.Module):
    """Part of the forward under autocast off, part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean(-1, keepdim=True) + 1
        with torch.autocast("cpu", enabled=False):
            y = F.relu(self.a(x / scale))
        out: Tensor = self.c(F.relu(self.b(y)))
        return out


@_model
def _autocast_and_no_grad_blocks() -> tuple[nn.Module, Any]:
    return _Inner(), (torch.randn(6, 6),)


class _Picked(nn.Module):
    """Both halves of a layer's output, by slices at the live middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = y.shape[-1] // 2
        out: Tensor = self.c(F.relu(self.b(torch.tanh(y[..., :half]) * torch.sigmoid(y[..., half:]))))
        return out


@_model
def _halves_by_slicing() -> tuple[nn.Module, Any]:
    return _Picked(), (torch.randn(6, 6),)


class _Windowed(nn.Module):
    """Attention in shifted windows by reshape and roll, with a bias per head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 2, 2)
        self.norm = nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.bias = nn.Parameter(torch.randn(4, 16, 16))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).view(-1, 16, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // 4) ** -0.5 + self.bias).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        out: Tensor = self.head(x.mean((1, 2)))
        return out


@_model
def _shifted_windows() -> tuple[nn.Module, Any]:
    return _Windowed(), (_image(),)
