"""The sequence classifier: blocks of batch norm, linear recurrent unit, gate and residual sum, and a mean over time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from setpoint_bench.models.lru import LRU


class SequenceBlock(nn.Module):
    """`x + dropout(GLU(dropout(GELU(LRU(norm(x))))))`, where `GLU(h) = (W h) * sigmoid(V h)`.

    The norm is batch norm over samples and steps, without weights of its own.

    Args:
        num_channels: channels of input and output.
        num_states: complex states.
        dropout: probability.
        least_modulus: as in `LRU`.
        most_modulus: as in `LRU`.
        most_angle: as in `LRU`.
    """

    def __init__(
        self,
        num_channels: int,
        num_states: int,
        *,
        dropout: float = 0.0,
        least_modulus: float = 0.9,
        most_modulus: float = 0.999,
        most_angle: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_channels, affine=False)
        self.lru = LRU(
            num_channels,
            num_states,
            least_modulus=least_modulus,
            most_modulus=most_modulus,
            most_angle=most_angle,
        )
        self.gated = nn.Linear(num_channels, num_channels)
        self.gate = nn.Linear(num_channels, num_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch steps channels"]) -> Float[Tensor, "batch steps channels"]:
        hidden = self.dropout(F.gelu(self.lru(self.norm(x.mT).mT)))
        gated: Tensor = self.dropout(self.gated(hidden) * torch.sigmoid(self.gate(hidden)))
        return x + gated


class SequenceClassifier(nn.Module):
    """Linear encoder, blocks, mean over time, linear head.

    Args:
        num_inputs: channels of the sequences (1 for pixels of a grey image).
        num_classes: classes.
        num_channels: channels between blocks.
        num_states: complex states of each block.
        num_blocks: blocks.
        dropout: probability.
        least_modulus: as in `LRU`.
        most_modulus: as in `LRU`.
        most_angle: as in `LRU`.

    >>> model = SequenceClassifier(num_inputs=1, num_classes=10, num_channels=8, num_states=16)
    >>> model(torch.randn(4, 196, 1)).shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        num_channels: int = 8,
        num_states: int = 256,
        num_blocks: int = 1,
        dropout: float = 0.0,
        least_modulus: float = 0.9,
        most_modulus: float = 0.999,
        most_angle: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_inputs, num_channels)
        self.blocks = nn.Sequential(
            *(
                SequenceBlock(
                    num_channels,
                    num_states,
                    dropout=dropout,
                    least_modulus=least_modulus,
                    most_modulus=most_modulus,
                    most_angle=most_angle,
                )
                for _ in range(num_blocks)
            )
        )
        self.head = nn.Linear(num_channels, num_classes)

    def forward(self, x: Float[Tensor, "batch steps inputs"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.head(self.blocks(self.encoder(x)).mean(1))
        return logits
