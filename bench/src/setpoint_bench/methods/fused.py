"""Fused layers: one linear layer that makes queries, keys and values, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.groups.group import Group


@final
class Apart(nn.Module):
    """What a fused layer does, by one layer for each of its equal parts.

    >>> fused, x = nn.Linear(4, 6), torch.ones(2, 4)
    >>> torch.allclose(Apart(fused, 3)(x), fused(x))
    True
    """

    def __init__(self, fused: nn.Linear, num_parts: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        gradients = [None] * num_parts if fused.weight.grad is None else fused.weight.grad.chunk(num_parts)
        biases = [None] * num_parts if fused.bias is None else fused.bias.detach().chunk(num_parts)
        for weight, bias, gradient in zip(fused.weight.detach().chunk(num_parts), biases, gradients, strict=True):
            part = nn.Linear(fused.in_features, len(weight), bias is not None, device=weight.device, dtype=weight.dtype)
            part.weight = nn.Parameter(weight.clone())
            part.weight.grad = None if gradient is None else gradient.clone()
            if bias is not None:
                part.bias = nn.Parameter(bias.clone())
            self.parts.append(part)

    def forward(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... outputs"]:
        return torch.cat([part(x) for part in self.parts], -1)

    @torch.no_grad()
    def put_back_into(self, fused: nn.Linear) -> None:
        """Give the parts' weights, whatever their size is now, to the fused layer."""
        fused.weight = nn.Parameter(torch.cat([part.get_parameter("weight") for part in self.parts]))
        if fused.bias is not None:
            fused.bias = nn.Parameter(torch.cat([part.get_parameter("bias") for part in self.parts]))
        fused.out_features, fused.in_features = fused.weight.shape


@contextmanager
def taken_apart(model: nn.Module, groups: Iterable[Group]) -> Iterator[dict[nn.Module, int]]:
    """Layers that make heads and their number of heads; inside, fused ones are taken apart.

    Torch-Pruning follows a split along features only where each part has a layer of its own.

    Args:
        model: changed in place; at the end each fused layer is back, with what its parts have become.
        groups: the model's groups.
    """
    heads: dict[nn.Module, int] = {}
    apart: list[tuple[str, nn.Linear, Apart]] = []
    for group in groups:
        for piece in group.slices:
            owner, _, kind = piece.tensor.rpartition(".")
            if group.what != "head" or piece.role != "produce" or kind != "weight":
                continue
            layer, parts = model.get_submodule(owner), _num_parts(piece.index)
            if parts > 1 and isinstance(layer, nn.Linear):
                apart.append((owner, layer, Apart(layer, parts)))
                model.set_submodule(owner, apart[-1][2])
                heads.update(dict.fromkeys(apart[-1][2].parts, group.num_units))
            else:
                heads[layer] = group.num_units
    try:
        yield heads
    finally:
        for owner, fused, taken in apart:
            taken.put_back_into(fused)
            model.set_submodule(owner, fused)


def _num_parts(index: np.ndarray) -> int:
    """How many times over the table lists the units: 3 for queries, keys and values in one layer."""
    for parts in (3, 2):
        if len(index) % parts == 0 and np.array_equal(index, np.tile(index[: len(index) // parts], parts)):
            return parts
    return 1
