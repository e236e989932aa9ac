"""Padding: positions that only fill a batch up are no data of a score or of a fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.sensor.consumer import Padding, input_rows

REAL = torch.tensor([[True, True, False], [True, False, False]])


class Layer(nn.Module):
    """Takes a mask of queries and keys, as layers of transformers do, or of the keys of another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, key_value_states: Tensor | None = None, attention_mask: Any = None) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tagger(nn.Module):
    """Takes a mask of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 4), Layer(), nn.Linear(4, 2)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        pairs = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        hidden = self.layer(self.layer(self.embed(ids), attention_mask=pairs), ids, REAL.logical_not())
        return self.head(hidden)


def test_rows_are_those_of_real_positions() -> None:
    """Claim: with a mask all real tokens are picked and nothing else; without one, or for another length, any."""
    layer, x = nn.Linear(1, 2), torch.arange(6.0).view(2, 3, 1)
    assert input_rows(layer, x, 6, REAL).flatten().tolist() == [0.0, 1.0, 3.0]
    assert set(input_rows(layer, x, 2, REAL).flatten().tolist()) <= {0.0, 1.0, 3.0}
    assert input_rows(layer, x, 6).equal(input_rows(layer, x, 6, REAL[:1]))
    assert input_rows(layer, x, 6, torch.ones(2, 3, dtype=torch.bool)).equal(input_rows(layer, x, 6))
    assert not len(input_rows(layer, x, 6, torch.zeros(2, 3, dtype=torch.bool)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_last_mask_of_positions_counts_and_none_means_no_padding() -> None:
    """Claim: masks of pairs and of the keys of cross attention change nothing; a forward without a mask after one with
    a mask has no padding; scripted parts do no harm, and hooks go by `remove`.
    """
    model, ids = Tagger(), torch.zeros(2, 3, dtype=torch.long)
    model.scripted = torch.jit.script(nn.Identity())
    padding = Padding(model)
    for given in (REAL.long(), REAL):
        model(ids, given)
        assert padding.real is not None and padding.real.equal(REAL)
        model(ids)
        assert padding.real is None
    padding.remove()
    model(ids, attention_mask=REAL.long())
    assert padding.real is None and not model._forward_pre_hooks and not model.layer._forward_pre_hooks


def batches(filled: int) -> list[dict[str, Tensor]]:
    """The same sequences, filled up by so many positions with one token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (64, 8), generator=generator)
    mask = torch.ones_like(ids)
    fill = ids.new_zeros(64, filled)
    return [{"ids": torch.cat([ids, fill], 1), "attention_mask": torch.cat([mask, fill], 1)}]


@pytest.mark.parametrize("filled", [3, 20, 24])
def test_compress_is_the_same_however_far_batches_are_filled_up(filled: int) -> None:
    """Claim: padding changes neither which units go nor the weights that are fitted."""
    found: list[Any] = []
    for fill in (0, filled):
        torch.manual_seed(0)
        model = Tagger()
        setpoint.compress(model, batches(fill), "60% flops")
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)
