"""Fake forwards: few forwards, on copies without data, that leave the model and its hooks alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from setpoint.groups.sizes_in_code.fake_forward import FakeForward
from setpoint.groups.trace import find_groups


class AsksForValues(nn.Module):
    """A forward whose code depends on a value, which tensors without data cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else x


def are_fake(forward: FakeForward) -> list[bool]:
    """Whether the first weight of every copy that one run made has no data."""
    found: list[bool] = []
    forward.run(lambda twin: found.append(isinstance(next(twin.parameters()), FakeTensor)))
    return found


def test_where_data_are_needed_they_are_used_at_once_from_then_on() -> None:
    """A forward that asks for values is tried on fake and real tensors once, and then on real ones only."""
    forward = FakeForward(AsksForValues(), (torch.ones(2, 4),))
    assert are_fake(forward) == [True, False]
    assert are_fake(forward) == [False]
    assert forward.run() == ((2, 3),)
    assert are_fake(FakeForward(nn.Linear(4, 3), (torch.ones(2, 4),))) == [True]


def test_hooks_of_the_user_are_neither_run_nor_copied() -> None:
    """A hook that cannot be copied is no obstacle, and never runs; weight norm's own computes the weight."""
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    class Hook:
        def __deepcopy__(self, memo: object) -> Hook:
            raise AssertionError("copied")

        def __call__(self, *_: object) -> None:
            raise AssertionError("run")

    layer.register_forward_hook(Hook())
    assert FakeForward(layer, (torch.ones(2, 4),)).run() == ((2, 3),)
    assert len(layer._forward_hooks) == 1


class Branching(nn.Module):
    """A stream under a norm and neurons beside it; other code in training than in evaluation, if `branch`."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(self.embed(x))).relu()
        return self.second(x * 2 if self.branch and self.training else x)


@pytest.mark.parametrize(("branch", "modes"), [(False, [0, 0, 0, 1, 0]), (True, [0, 0, 0, 1, 0, 1])])
def test_the_other_mode_is_tried_again_only_if_it_runs_other_code(
    branch: bool, modes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model, its written sizes, the lossless cut in both modes, and the whole cut in one or in both."""
    ran: list[int] = []
    run = FakeForward._run

    def noted(
        self: FakeForward, prepare: Callable[[nn.Module], None], other_mode: bool, *, fake: bool
    ) -> tuple[torch.Size, ...]:
        ran.append(int(other_mode))
        return run(self, prepare, other_mode, fake=fake)

    monkeypatch.setattr(FakeForward, "_run", noted)
    assert [group.lossless for group in find_groups(Branching(branch), (torch.ones(2, 4),))] == [False, True]
    assert ran == modes


class Answered(nn.Module):
    """A forward of norms, a product and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.channels = nn.LayerNorm((3, 4)), nn.Linear(4, 6), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        normed, mixed = self.norm(x), self.linear(x[:, 0])
        return normed, mixed, self.channels(x), nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_shapes_are_those_of_the_forward() -> None:
    """Claim: norms, products and attention have the shapes that the model itself returns."""
    model, x = Answered(), torch.randn(2, 3, 4)
    assert FakeForward(model, (x,)).run() == tuple(out.shape for out in model(x))


@pytest.mark.parametrize(
    ("place", "shape"),
    [("norm.weight", (2, 4)), ("norm.bias", (3, 3)), ("linear.weight", (6, 5)), ("linear.bias", (5,))],
)
def test_sizes_that_do_not_fit_are_refused(place: str, shape: tuple[int, ...]) -> None:
    """Claim: a cut that leaves an operation with wrong sizes raises, though no arithmetic is done."""
    owner, name = place.split(".")

    def prepare(twin: nn.Module) -> None:
        setattr(twin.get_submodule(owner), name, nn.Parameter(torch.empty(shape)))

    with pytest.raises(RuntimeError):
        FakeForward(Answered(), (torch.randn(2, 3, 4),)).run(prepare)


def test_inputs_that_the_forward_writes_into_keep_their_values() -> None:
    """Claim: where a forward needs data and writes into its input, the user's example stays as it is."""

    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(x.sum().item())
            return super().forward(x)

    x = torch.ones(2, 4)
    assert FakeForward(Writes(4, 3), (x,)).run() == ((2, 3),)
    assert torch.equal(x, torch.ones(2, 4))
