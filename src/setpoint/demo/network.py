"""The demo's network: a small residual one, as a user would write it, and its pretrained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from setpoint.checkpoint import load
from setpoint.demo.signs import OLD

PRETRAINED = Path(__file__).parent / "pretrained.safetensors"


class Block(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, width_in, h, w) to features (n, width, h / stride, w / stride)."""
        inner = self.relu(self.norm1(self.conv1(x)))
        out: Tensor = self.relu(self.norm2(self.conv2(inner)) + self.skip(x))
        return out


class Network(nn.Sequential):
    """Images (n, 1, h, w) to logits (n, classes): three blocks, each of which halves height and width."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.block1 = Block(24, 24, stride=2)
        self.block2 = Block(24, 48, stride=2)
        self.block3 = Block(48, 96, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(96, classes)


def pretrained(classes: int) -> Network:
    """The network that knows the old letters, with a new head."""
    model = Network(len(OLD))
    load(PRETRAINED, into=model)
    model.head = nn.Linear(model.head.in_features, classes)
    return model.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
