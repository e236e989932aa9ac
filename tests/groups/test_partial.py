"""A part of a model that cannot be exported is not pruned and named; the rest is cut."""

from __future__ import annotations

import copy
import traceback
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.errors import ExportError
from setpoint.groups.group import random_keep
from setpoint.groups.trace import trace


class Sorts(nn.Module):
    """A part that leaves PyTorch: NumPy decides on the order of positions, by a layer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score, self.mix = nn.Linear(width, 1), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> dict[str, Any]:
        order = self.score(x).squeeze(-1).detach().numpy().argsort(-1)
        rows = torch.as_tensor(order.copy()).unsqueeze(-1).expand_as(x)
        return {"sorted": self.inner(self.mix(x).gather(1, rows)), "length": x.shape[1]}


class Net(nn.Module):
    """A part that cannot be followed, between some that can; its result is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 8)
        self.sorts = Sorts(8)
        self.first, self.second, self.last = nn.Linear(8, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(x).relu())
        for _ in range(2):
            found = self.sorts(x)
            x = x + found["sorted"] / found["length"]
        out: Tensor = self.last(self.second(self.first(x).relu()).relu())
        return out


def test_a_part_that_cannot_be_exported_is_left_whole() -> None:
    """Claim: the failing child is named with its line, also where it is called twice; what is around it is cut, across
    it nothing is; its own children are cut inside; and in float64 the cut model equals its masked twin.
    """
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5, 6)
    found = trace(model, (x,))
    assert {group.name for group in found.groups} == {"up", "first", "second", "sorts.inner.0"}
    (reason,) = [each.reason for each in found.frozen if each.place == "sorts"]
    assert "cannot be exported" in reason and "test_partial.py" in reason and "numpy" in reason
    assert not found.unreached and "forward" not in vars(model.sorts)
    model, x = model.double(), x.double()
    twin, keep = copy.deepcopy(model), random_keep(found.groups)
    mask(twin, None, found.groups, keep)
    shrink(model, None, found.groups, keep)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-12)
    for each in (model, twin):
        each(x).square().mean().backward()
    for name in ("sorts.mix.weight", "sorts.inner.2.bias", "down.bias", "last.bias"):
        torch.testing.assert_close(
            model.get_parameter(name).grad, twin.get_parameter(name).grad, rtol=1e-10, atol=1e-12
        )


def test_a_loop_names_it_and_counts_its_flops() -> None:
    """Claim: `loop.ledger.header["frozen"]` names the part; its FLOPs are counted; the budget is met, in training."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5, 6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loop = setpoint.attach(model, optimizer, 0.7, total_steps=20, example=(x,))
    assert "cannot be exported" in loop.ledger.header["frozen"]["sorts"]
    for _ in range(20):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    summary = loop.finish()
    inside = 2 * 2 * 20 * (8 * 8 + 8)  # two calls, 20 rows: `mix` and `score`; a step takes three such passes
    outside = 2 * 20 * (6 * 24 + 24 * 8 + 8 * 20 + 20 * 20 + 20 * 3) + 2 * 2 * 20 * (2 * 8 * 16)
    assert summary.budget_met and loop.widths["up"] < 24
    assert outside * 2.5 < summary.dense_flops <= 3 * (inside + outside)


class AsksItself(nn.Module):
    """The user's own code decides by data, in the model's own forward or in a part."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.part, self.a, self.b = part, nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        if self.part is not None:
            out: Tensor = self.part(x)
            return out
        if x.sum() > 0:
            return x
        return -x


def test_only_the_user_can_replace_an_if() -> None:
    """Claim: an `if` by data in the model's own code is refused with what to do; in a part it leaves the part whole."""
    with pytest.raises(ExportError, match=r"test_partial\.py.*if x\.sum.*replace the Python `if`"):
        trace(AsksItself(), (torch.randn(4, 6),))
    found = trace(AsksItself(AsksItself()), (torch.randn(4, 6),))
    assert {group.name for group in found.groups} == {"a"}
    assert any(each.place == "part" for each in found.frozen)


class Counts(nn.Module):
    """It is called by its user with a mask, at which torch's own encoder looks; then its own code looks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(x, mask)
        return x if x.sum() > 0 else -x


def test_following_a_library_does_not_follow_the_user() -> None:
    """Claim: where a library's path is followed, the user's own is refused all the same."""
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with pytest.raises(ExportError, match=r"x\.sum\(\) > 0.*replace the Python `if`") as caught:
        trace(Counts(), (torch.randn(2, 4, 8), mask))
    assert "transformer.py" not in str(caught.value)


@pytest.mark.parametrize("lost", ["text of the line", "file of the line", "all lines"])
def test_an_if_is_not_followed_where_its_line_is_lost(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: whose `if` it is has to be known before it is followed: code that was typed in, code without its source
    and a graph without stack traces are refused.
    """
    monkeypatch.setattr("linecache.getline", lambda *line: "")
    if lost == "file of the line":
        monkeypatch.setattr(Counts.forward, "__code__", Counts.forward.__code__.replace(co_filename="<stdin>"))
    if lost == "all lines":
        monkeypatch.setattr("torch.fx.proxy.CapturedTraceback.summary", lambda captured: traceback.StackSummary())
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with pytest.raises(ExportError, match="asks for the values of a tensor"):
        trace(Counts(), (torch.randn(2, 4, 8), mask))


def test_the_hint_is_for_the_users_own_line() -> None:
    """Claim: where a library's line is at fault and nothing can be cut, no one is asked to replace its `if`."""
    packed = nn.LSTM(4, 8, batch_first=True)
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 4), torch.tensor([3, 2]), batch_first=True)
    with warnings.catch_warnings(action="ignore"), pytest.raises(ExportError) as caught:
        trace(packed, (x,))
    assert "replace the Python" not in str(caught.value)


class MatchesItself(nn.Module):
    """A model that works out its own loss with NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(x)
        best = torch.as_tensor(scores.detach().numpy().argmax(-1))
        return nn.functional.cross_entropy(scores, best)


def test_a_model_that_leaves_pytorch_itself_is_cut_in_its_parts() -> None:
    """Claim: where the model's own forward cannot be exported, its children are followed all the same."""
    found = trace(MatchesItself(), (torch.randn(4, 6),))
    assert [group.name for group in found.groups] == ["body.0"]
    assert "numpy" in next(each.reason for each in found.frozen if each.place == "model")
