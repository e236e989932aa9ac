"""Attention: heads can go however masks are given and keys are shared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint.actuator.verify import failing_groups
from setpoint.groups.group import Group
from setpoint.groups.trace import find_groups

PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 7])


def lossless(model: nn.Module, example: Any) -> dict[str, Group]:
    return {group.name: group for group in find_groups(model, example) if group.lossless}


class Attending(nn.Module):
    """Self-attention by torch's module between two layers, with some options of the call."""

    def __init__(self, options: tuple[str, ...]) -> None:
        super().__init__()
        self.options = options
        self.embed, self.attend = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first="batch_first" in options)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, ...]:
        x = self.embed(x)
        length = x.shape[1] if self.attend.batch_first else x.shape[0]
        chosen: dict[str, Any] = {"need_weights": "no weights" not in self.options}
        if "causal" in self.options:
            chosen["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
            chosen["is_causal"] = "no weights" in self.options
        if "of every head" in self.options:
            batch = x.shape[0]
            chosen["attn_mask"] = x.new_zeros(1, length, length).expand(batch * self.attend.num_heads, -1, -1)
        if "all weights" in self.options:
            chosen["average_attn_weights"] = False
        y, weights = self.attend(x, x, x, key_padding_mask=padding, **chosen)
        return (self.head(x + y), weights) if "all weights" in self.options else (self.head(x + y),)


@pytest.mark.parametrize(
    ("options", "padded", "what"),
    [
        (("batch_first",), True, "head"),
        (("batch_first", "no weights"), True, "head"),
        ((), True, "head"),
        (("batch_first", "causal"), False, "head"),
        (("batch_first", "causal", "no weights"), False, "head"),
        (("batch_first", "of every head", "no weights"), False, "head"),
        (("batch_first", "all weights"), False, "neuron"),
    ],
)
def test_heads_of_torch_attention_under_masks(options: tuple[str, ...], padded: bool, what: str) -> None:
    """Heads, and the width around them, are found with any mask, and their cut equals the masked twin.

    Where the weights of every head are an output no head can go, but entries of the values can, within all heads.
    """
    x = torch.randn(3, 7, 5) if "batch_first" in options else torch.randn(7, 3, 5)
    model, example = Attending(options), (x, PADDING) if padded else (x,)
    groups = lossless(model, example)
    assert {(group.name, group.num_units, group.what) for group in groups.values()} == {
        ("embed", 16, "neuron"),
        ("attend", 4, what),
    }
    assert failing_groups(model, example, tuple(groups.values())) == ()


class Translating(nn.Module):
    """Torch's whole transformer, with every mask it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 30)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        causal = self.transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        out: Tensor = self.head(y)
        return out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_heads_and_neurons_of_torch_transformer() -> None:
    """Heads of all three kinds of attention, and the neurons between them, go with padding and causal masks."""
    model = Translating()
    example = (torch.randint(0, 30, (3, 7)), torch.randint(0, 30, (3, 6)), PADDING)
    groups = lossless(model, example)
    assert sorted(group.what for group in groups.values()) == ["head"] * 3 + ["neuron"] * 2
    assert failing_groups(model, example, tuple(groups.values())) == ()


class SharedKey(nn.Module):
    """Query heads with one head of keys and values, repeated in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.size = how, 4, 8
        self.embed, self.q, self.kv = nn.Linear(5, 24), nn.Linear(24, 32), nn.Linear(24, 16)
        self.out = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, self.heads, self.size).transpose(1, 2)
        k, v = (part.view(rows, length, 1, self.size).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        if self.how == "expand":
            k, v = (part.expand(rows, self.heads, length, self.size) for part in (k, v))
        elif self.how == "expand_as":
            k, v = k.expand_as(q), v.expand_as(q)
        elif self.how == "repeat":
            k, v = (part.repeat(1, self.heads, 1, 1) for part in (k, v))
        elif self.how == "repeat_interleave":
            k, v = (part.repeat_interleave(self.heads, 1) for part in (k, v))
        if self.how == "broadcast":
            y = (q @ k.transpose(-2, -1) / math.sqrt(self.size)).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "enable_gqa")
        out: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, self.heads * self.size))
        return out


@pytest.mark.parametrize("how", ["expand", "expand_as", "repeat", "repeat_interleave", "broadcast", "enable_gqa"])
def test_query_heads_of_one_key_head(how: str) -> None:
    """Copies of the one head follow the query heads, any of which may go; the cut equals the masked twin."""
    model, example = SharedKey(how), (torch.randn(3, 7, 5),)
    groups = lossless(model, example)
    assert (groups["q"].num_units, groups["q"].what) == (4, "head")
    assert failing_groups(model, example, tuple(groups.values())) == ()


class GroupedKeys(SharedKey):
    """Two heads of keys, each shared by two query heads, repeated by a new dim."""

    def __init__(self) -> None:
        super().__init__("")
        self.kv = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, self.heads, self.size).transpose(1, 2)
        k, v = (part.view(rows, length, 2, self.size).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        k, v = (part[:, :, None].expand(rows, 2, 2, length, self.size).flatten(1, 2) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, -1))
        return out


def test_a_key_head_goes_with_its_query_heads() -> None:
    """With several key heads a unit is one of them with the query heads that share it, though copies could go too."""
    model, example = GroupedKeys(), (torch.randn(3, 7, 5),)
    groups = lossless(model, example)
    (heads,) = (group for group in groups.values() if group.what == "head")
    assert heads.num_units == 2
    assert {part.tensor for part in heads.slices} >= {"q.weight", "kv.weight", "out.weight"}
    (queries,) = (part for part in heads.slices if part.tensor == "q.weight")
    assert np.array_equal(queries.index, np.repeat([0, 1], 16))
    assert failing_groups(model, example, tuple(groups.values())) == ()
