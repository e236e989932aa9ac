"""Padding: positions that only fill a batch up are no data of a score or of a fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.one_shot.consumer import Padding, input_rows, real_positions

REAL = torch.tensor([[True, True, False], [True, False, False]])


class Layer(nn.Module):
    """Takes a mask of queries and keys, as layers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(9, 4), Layer(), nn.Linear(4, 2)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        both = None if attention_mask is None else attention_mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        added = None if both is None else torch.where(both.bool(), 0.0, torch.finfo(torch.float32).min)
        return self.head(self.layer(self.embed(ids), added))


@pytest.mark.parametrize("form", ["positions", "numbers", "kept", "added", "causal", "half"])
def test_each_form_of_mask_says_which_positions_are_real(form: str) -> None:
    """Claim: a mask of positions and one of queries and keys, kept or added, in any dtype, name the same positions."""
    both = REAL[:, None, None, :].expand(-1, 1, 3, -1)
    masks = {
        "positions": REAL,
        "numbers": REAL.long(),
        "kept": both,
        "added": torch.where(both, 0.0, torch.finfo(torch.float32).min),
        "causal": both & torch.ones(3, 3, dtype=torch.bool).tril(),
        "half": torch.where(both, 0.0, -65504.0).half(),
    }
    assert real_positions(masks[form]).equal(REAL)


def test_rows_are_those_of_real_positions() -> None:
    """Claim: with a mask all real tokens are picked and nothing else; without one, or for another length, any."""
    layer, x = nn.Linear(1, 2), torch.arange(6.0).view(2, 3, 1)
    assert input_rows(layer, x, 6, REAL).flatten().tolist() == [0.0, 1.0, 3.0]
    assert set(input_rows(layer, x, 2, REAL).flatten().tolist()) <= {0.0, 1.0, 3.0}
    assert input_rows(layer, x, 6).equal(input_rows(layer, x, 6, REAL[:1]))
    assert input_rows(layer, x, 6, torch.ones(2, 3, dtype=torch.bool)).equal(input_rows(layer, x, 6))
    assert not len(input_rows(layer, x, 6, torch.zeros(2, 3, dtype=torch.bool)))


def test_the_last_mask_counts_and_none_means_no_padding() -> None:
    """Claim: a forward without a mask after one with a mask has no padding; hooks go by `stop`."""
    model, ids = Tagger(), torch.zeros(2, 3, dtype=torch.long)
    padding = Padding(model)
    model(ids, REAL.long())
    assert padding.real is not None and padding.real.equal(REAL)
    model(ids)
    assert padding.real is None
    model(ids, REAL.long())
    padding.stop()
    assert padding.real is None
    model(ids, attention_mask=REAL.long())
    assert padding.real is None and not model._forward_pre_hooks
    assert not model.layer._forward_pre_hooks


def test_pairs_do_not_change_what_positions_say() -> None:
    """Claim: a mask of pairs counts where none of positions was given; so rows of padding may attend to everything."""
    model, ids = Tagger(), torch.zeros(2, 3, dtype=torch.long)
    padding = Padding(model)
    model(ids, REAL.long())
    model.layer(torch.zeros(2, 3, 4), torch.ones(2, 1, 3, 3, dtype=torch.bool))
    assert padding.real is not None and padding.real.equal(REAL)
    model(ids)
    model.layer(torch.zeros(2, 3, 4), attention_mask=REAL[:, None, None, :].expand(-1, 1, 3, -1))
    assert padding.real is not None and padding.real.equal(REAL)


def batches(filled: int) -> list[dict[str, Tensor]]:
    """The same sequences, filled up by so many positions with one token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (64, 8), generator=generator)
    mask = torch.ones_like(ids)
    fill = ids.new_zeros(64, filled)
    return [{"ids": torch.cat([ids, fill], 1), "attention_mask": torch.cat([mask, fill], 1)}]


class Wrapped(nn.Module):
    """Takes a mask of pairs itself, and holds scripted code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scripted = Layer(), torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.scripted(self.layer(x, attention_mask))


class Cross(nn.Module):
    def forward(self, x: Tensor, key_value_states: Tensor | None = None, attention_mask: Any = None) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_each_forward_begins_anew() -> None:
    """Claim: of two batches with masks of pairs the second one's counts; scripted parts do no harm; cross attention and
    masks of other kinds change nothing.
    """
    model, x = Wrapped(), torch.zeros(2, 3, 4)
    padding = Padding(model)
    for real in (REAL, ~REAL):
        model(x, real[:, None, None, :].expand(-1, 1, 3, -1))
        assert padding.real is not None and padding.real.equal(real)
    model(x, torch.ones(2, 3, 3))
    assert padding.real is None
    padding.stop()
    cross = Cross()
    padding = Padding(cross)
    padding.note(REAL)
    padding.note("a block mask")
    assert padding.real is not None and padding.real.equal(REAL)
    cross(x, x, REAL[:, None, None, :])
    assert padding.real is None  # a new forward began, and this mask is of other positions


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
