"""Models of the plain suite that read sequences: recurrent networks, and torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint_bench.coverage import Build

SEQUENCES: dict[str, Build] = {}
"""By name, how to make each model."""


class _Recurrent(nn.Module):
    """An encoder of numbers, a recurrent network, a classifier of its last output."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 24)
        self.cell = kind(24, 20, batch_first=True, **options)
        self.head = nn.Linear(20 * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(F.relu(self.encode(x)))
        out: Tensor = self.head(y[:, -1])
        return out


def _recurrent(kind: Callable[..., nn.RNNBase], **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (_Recurrent(kind, **options), (torch.randn(4, 7, 6),))


SEQUENCES["lstm"] = _recurrent(nn.LSTM)
SEQUENCES["lstm_2_layers_both_directions"] = _recurrent(nn.LSTM, num_layers=2, bidirectional=True)
SEQUENCES["gru"] = _recurrent(nn.GRU)
SEQUENCES["gru_2_layers_both_directions"] = _recurrent(nn.GRU, num_layers=2, bidirectional=True)
SEQUENCES["rnn_relu"] = _recurrent(nn.RNN, nonlinearity="relu")


class _Attending(nn.Module):
    """`nn.MultiheadAttention` over a sequence, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        out: Tensor = self.head(x.mean(1))
        return out


def _multihead_attention() -> tuple[nn.Module, Any]:
    return _Attending(), (torch.randn(4, 7, 6),)


def _transformer_encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 32), encoder, nn.Linear(32, 3)), (torch.randn(4, 7, 6),)


def _transformer_decoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2), (torch.randn(4, 7, 32), torch.randn(4, 5, 32))


SEQUENCES["multihead_attention"] = _multihead_attention
SEQUENCES["transformer_encoder"] = _transformer_encoder
SEQUENCES["transformer_decoder"] = _transformer_decoder
