"""Families: small models of kinds that no library of classifiers holds, written as their users write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from setpoint_bench.coverage import Build

FAMILIES: dict[str, Build] = {}


def _model(build: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    FAMILIES[build.__name__.strip("_")] = build
    return build


class _VectorQuantised(nn.Module):
    """An autoencoder whose code is the nearest of a table, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.codes = nn.Embedding(32, 8)
        self.decoder = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, 8)
        table = self.codes.weight
        distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.t()
        code = self.codes(distance.argmin(1)).view(z.shape)
        loss = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(code.detach(), z)
        return self.decoder((z + (code - z).detach()).permute(0, 3, 1, 2)), loss


@_model
def _vector_quantised_autoencoder() -> tuple[nn.Module, Any]:
    return _VectorQuantised(), (torch.randn(2, 3, 16, 16),)


class _GatedLayer(nn.Module):
    """A dilated causal convolution with a gate; one output goes on, the other to the sum of skips."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.past = dilation
        self.value, self.gate = nn.Conv1d(16, 16, 2, dilation=dilation), nn.Conv1d(16, 16, 2, dilation=dilation)
        self.on, self.skip = nn.Conv1d(16, 16, 1), nn.Conv1d(16, 24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(x, (self.past, 0))
        y = torch.tanh(self.value(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.on(y), self.skip(y)


class _WaveNet(nn.Module):
    """Gated layers; what the last one hands on is read by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Conv1d(1, 16, 1), nn.ModuleList(_GatedLayer(2**i) for i in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 20, 1), nn.ReLU(), nn.Conv1d(20, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        total = torch.zeros((), dtype=x.dtype)
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        out: Tensor = self.head(total)
        return out


@_model
def _wavenet() -> tuple[nn.Module, Any]:
    return _WaveNet(), (torch.randn(3, 1, 20),)


class _PointNet(nn.Module):
    """A learned rotation of points, and the largest feature over all points."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix = nn.Linear(16, 9)
        self.points = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 32, 1))
        self.head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        turn = self.matrix(self.turn(x).max(2)[0]).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        out: Tensor = self.head(self.points(torch.bmm(turn, x)).max(2)[0])
        return out


@_model
def _pointnet() -> tuple[nn.Module, Any]:
    return _PointNet(), (torch.randn(4, 3, 20),)


class _Graph(nn.Module):
    """Messages along edges, summed where they arrive: by index_add_, and by scatter_add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        x = self.a(x)
        x = torch.zeros_like(x).index_add_(0, target, x[source]).relu()
        x = self.b(x)
        message = x.index_select(0, source)
        x = x.new_zeros(x.shape).scatter_add(0, target.unsqueeze(-1).expand_as(message), message).relu()
        out: Tensor = self.c(x)
        return out


@_model
def _graph_network() -> tuple[nn.Module, Any]:
    return _Graph(), (torch.randn(10, 6), torch.randint(0, 10, (2, 30)))


class _TwoTowers(nn.Module):
    """Users and items in one space; a dict goes in and a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(20, 8), nn.Embedding(30, 8)
        self.user = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16))
        self.item = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        user = self.user(torch.cat([self.users(batch["user"]), batch["features"]], -1))
        item = self.item(self.items(batch["items"]).mean(1))
        return {"logits": F.normalize(user, dim=-1) @ F.normalize(item, dim=-1).t()}


@_model
def _two_towers() -> tuple[nn.Module, Any]:
    batch = {"user": torch.randint(0, 20, (5,)), "items": torch.randint(0, 30, (5, 4)), "features": torch.randn(5, 4)}
    return _TwoTowers(), (batch,)


class _Hypernetwork(nn.Module):
    """A network that writes another one's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 56))
        self.a, self.b = nn.Linear(5, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        written = self.write(code)
        weight, bias = written[:, :48].view(-1, 8, 6), written[:, 48:]
        y = torch.bmm(weight, self.a(x).relu().unsqueeze(-1)).squeeze(-1) + bias
        out: Tensor = self.b(y.relu())
        return out


@_model
def _hypernetwork() -> tuple[nn.Module, Any]:
    return _Hypernetwork(), (torch.randn(4, 5), torch.randn(4, 4))


class _FourierOperator(nn.Module):
    """Complex weights on the lowest frequencies, written into a spectrum of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.local, self.head = nn.Linear(2, 16), nn.Conv1d(16, 16, 1), nn.Linear(16, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 4, dtype=torch.cfloat) / 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(1, 2)
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(x.shape[0], self.weight.shape[1], spectrum.shape[-1], dtype=spectrum.dtype)
        out[:, :, :4] = torch.einsum("bix,iox->box", spectrum[:, :, :4], self.weight.to(spectrum.dtype))
        y: Tensor = self.head(F.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.local(x)).transpose(1, 2))
        return y


@_model
def _fourier_operator() -> tuple[nn.Module, Any]:
    return _FourierOperator(), (torch.randn(2, 16, 2),)


class _Translator(nn.Module):
    """A recurrent encoder, and a cell that attends to it at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(20, 12), nn.GRU(12, 16, batch_first=True)
        self.cell, self.query, self.head = nn.GRUCell(28, 16), nn.Linear(16, 16), nn.Linear(32, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(self.embed(source))
        hidden, outputs = state[0], []
        for step in range(target.shape[1]):
            weights = torch.bmm(memory, self.query(hidden).unsqueeze(2)).softmax(1)
            context = torch.bmm(weights.transpose(1, 2), memory).squeeze(1)
            hidden = self.cell(torch.cat([self.embed(target[:, step]), context], -1), hidden)
            outputs.append(self.head(torch.cat([hidden, context], -1)))
        return torch.stack(outputs, 1)


@_model
def _attending_cell() -> tuple[nn.Module, Any]:
    return _Translator(), (torch.randint(0, 20, (3, 5)), torch.randint(0, 20, (3, 3)))


class _SharedKey(nn.Module):
    """Query heads with one head of keys and values, expanded to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.kv = nn.Linear(5, 24), nn.Linear(24, 32), nn.Linear(24, 16)
        self.out, self.head = nn.Linear(32, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 4, 8).transpose(1, 2)
        k, v = (part.view(rows, length, 1, 8).transpose(1, 2).expand(-1, 4, -1, -1) for part in self.kv(x).chunk(2, -1))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(rows, length, 32))
        out: Tensor = self.head(x + y)
        return out


@_model
def _multi_query_attention() -> tuple[nn.Module, Any]:
    return _SharedKey(), (torch.randn(3, 7, 5),)


@_model
def _spectral_norm() -> tuple[nn.Module, Any]:
    layers = (
        spectral_norm(nn.Conv2d(3, 16, 3)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(16, 12, 3)),
        nn.LeakyReLU(0.2),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 1)), (torch.randn(4, 3, 8, 8),)
