"""Trace: a model's exported graph, reduced to its groups and to the products that cost FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from setpoint.groups.group import Group, Size

Example = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Contraction:
    """One matrix product or convolution of the forward pass.

    Its forward costs `coefficient * prod(sizes)` FLOPs (2 per multiply-add); the backward pass costs
    as much again for each operand that needs a gradient.

    Args:
        module: qualified name of the module whose forward holds it.
        op: ATen name.
        coefficient: 2 x everything that no width changes (batch, positions, kernel).
        sizes: the lengths that follow widths.
        num_gradients: how many operands need a gradient: 0, 1 or 2.
    """

    module: str
    op: str
    coefficient: float
    sizes: tuple[Size, ...]
    num_gradients: int


@dataclass(frozen=True)
class Frozen:
    """Something that stays whole, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Trace:
    """What tracing a model yields: groups, contractions, and what was frozen, by name."""

    groups: tuple[Group, ...]
    contractions: tuple[Contraction, ...]
    frozen: tuple[Frozen, ...]


def trace(model: torch.nn.Module, example: Example) -> Trace:
    """Export `model` on `example` and find its groups."""
    raise NotImplementedError
