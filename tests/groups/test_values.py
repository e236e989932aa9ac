"""Values: `find_groups` alone calls nothing lossless whose cut would change a value, though every shape fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setpoint.actuator.verify import failing_groups
from setpoint.errors import ExportError
from setpoint.groups.trace import find_groups, trace


class Reparametrised(nn.Module):
    """A layer whose weight is a function of its parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 2)
        self.function, self.before = function, before

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.before(self.a(x)), self.function(self.b.weight), self.b.bias)
        return self.c(y.relu())


# name: (weight from parameter, what comes before, lossless groups).
LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], list[str]]] = {
    "positive after tanh": (F.softplus, torch.tanh, ["a", "b"]),
    "positive after sigmoid": (F.softplus, torch.sigmoid, ["b"]),
    "exponential after sigmoid": (torch.exp, torch.sigmoid, ["b"]),
    "bounded from below after sigmoid": (lambda w: w.clamp(min=0.1), torch.sigmoid, ["b"]),
    "square after sigmoid": (torch.square, torch.sigmoid, ["a", "b"]),
    "centred": (lambda w: w - w.mean(), torch.tanh, []),
    "softmax over outputs": (lambda w: w.softmax(0), torch.tanh, ["a"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_zero_does_not_silence(name: str) -> None:
    """Where a masked parameter gives a weight that is not zero, units that are not zero either are not lossless."""
    function, before, expected = LAYERS[name]
    model, example = Reparametrised(function, before), (torch.randn(6, 5),)
    groups = tuple(group for group in find_groups(model, example) if group.lossless)
    assert [group.name for group in groups] == expected
    assert not groups or failing_groups(model, example, groups) == ()


class Averaging(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of entries."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / gradients[0].shape[-1]


class Custom(nn.Module):
    """A custom Function between two layers, taken off its class at once or when it is called."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 2)
        self.apply_early = Averaging.apply if early else None

    def forward(self, x: Tensor) -> Tensor:
        function = self.apply_early or Averaging.apply
        out: Tensor = self.c(self.b(function(self.a(x))).relu())
        return out


@pytest.mark.parametrize("early", [True, False])
def test_what_a_custom_function_touches_stays(early: bool) -> None:
    """No graph shows its backward: its units stay, under its name, and the others go."""
    found = trace(Custom(early), (torch.randn(6, 5),))
    assert [group.name for group in found.groups] == ["b"]
    assert any("custom autograd Function Averaging" in frozen.reason for frozen in found.frozen)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool]] = {
    "gradient reversal": (lambda x, n: x.view_as(x), lambda g, x, n: (-g, None), True),
    "square": (lambda x, n: x * x, lambda g, x, n: (2 * g * x, None), True),
    "step, passed straight through": (lambda x, n: x.sign(), lambda g, x, n: (g * (x.abs() < 1), None), True),
    "a learnt step": (lambda x, n: (x / n).round() * n, lambda g, x, n: (g, (g * x).sum()), True),
    "a learnt step, by the size": (lambda x, n: (x / n).round() * n, lambda g, x, n: (g, (g * x).mean()), False),
    "halved where one is large": (lambda x, n: x.clone(), lambda g, x, n: (g / (1 + (x > 50).any()), None), False),
    "by place": (lambda x, n: x * torch.arange(x.shape[-1]), lambda g, x, n: (g, None), False),
    "gradient by place": (lambda x, n: x.clone(), lambda g, x, n: (g.flip(-1), None), False),
    "gradient clipped by its norm": (lambda x, n: x.clone(), lambda g, x, n: (g / g.norm(), None), False),
    "sum of two neighbours": (lambda x, n: x + x.roll(1, -1), lambda g, x, n: (g + g.roll(-1, -1), None), False),
    "random": (lambda x, n: x * (torch.rand_like(x) < 0.9), lambda g, x, n: (g, None), False),
    "in place": (lambda x, n: x.mul_(2).clone(), lambda g, x, n: (2 * g, None), False),
    "without a backward": (lambda x, n: x.clone(), lambda g, x, n: 1 / 0, False),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_which_custom_functions_are_elementwise(name: str) -> None:
    """A Function that treats each entry alone, and so does its backward, is followed as plain ops are; no other is."""
    first, second, elementwise = FUNCTIONS[name]

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *inputs: Tensor) -> Any:
            context.save_for_backward(*inputs)
            return first(*inputs)

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> Any:
            return second(gradients[0], *context.saved_tensors)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.read, self.step = nn.Linear(5, 16), nn.Linear(16, 2), nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.read(Own.apply(self.write(x), self.step))
            return out

    found = find_groups(Net(), (torch.randn(6, 5),))
    assert [group.name for group in found] == (["write"] if elementwise else [])


class Checkpointed(nn.Module):
    """Attention that works sizes out inside a checkpoint, and a submodule that is a checkpoint as a whole."""

    def __init__(self, inside: bool, reentrant: bool) -> None:
        super().__init__()
        self.inside, self.reentrant = inside, reentrant
        self.embed, self.qkv, self.out = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 2)

    def attend(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (part.view(rows, length, 4, width // 4).transpose(1, 2) for part in self.qkv(x).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        out: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, -1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = checkpoint(self.attend, x, use_reentrant=self.reentrant) if self.inside else self.attend(x)
        hidden = checkpoint(self.first, x + y, use_reentrant=self.reentrant)
        out: Tensor = self.second(hidden.relu())
        return out


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_sizes_corrected_inside_a_checkpoint(inside: bool, reentrant: bool) -> None:
    """What backward runs again by itself is not corrected there: such units stay, by name; the others go."""
    model, example = Checkpointed(inside, reentrant), (torch.randn(3, 6, 5, requires_grad=True),)
    found = trace(model, example)
    groups = tuple(group for group in found.groups if group.lossless)
    assert ("qkv" in {group.name for group in groups}) is not inside
    assert "first" in {group.name for group in groups}
    assert any("inside a checkpoint" in frozen.reason for frozen in found.frozen) is inside
    assert failing_groups(model, example, groups) == ()


class Packed(nn.Module):
    """A recurrent network that reads packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)
        out: Tensor = self.head(padded[:, 0])
        return out


def test_packed_sequences_are_refused_with_a_reason() -> None:
    """Sizes that depend on lengths are in no static graph: the error says so, and what to give instead."""
    with pytest.raises(ExportError, match="packed sequence .* give the recurrent network the padded tensor"):
        find_groups(Packed(), (torch.randn(3, 5, 6), torch.tensor([5, 3, 2])))
