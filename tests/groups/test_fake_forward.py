"""Fake forwards: few forwards, on copies without data, that leave the model and its hooks alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from setpoint.groups.sizes_in_code.bind import FakeForward
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


def test_torchs_own_code_needs_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where every module is torch's own and has no hooks, sizes are attributes, and no forward is tried."""
    ran: list[FakeForward] = []
    run = FakeForward._run
    monkeypatch.setattr(
        FakeForward, "_run", lambda self, *args, **options: ran.append(self) or run(self, *args, **options)
    )
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    first, second = find_groups(model, (torch.ones(2, 4),))
    assert [size.place for size in first.sizes] == ["out_features", "num_features", "in_features"]
    assert [size.place for size in second.sizes] == ["out_features", "in_features"]
    assert not ran
    model.register_forward_hook(lambda *_: None)
    assert len(find_groups(model, (torch.ones(2, 4),))) == 2 and ran


def test_inputs_that_the_forward_writes_into_keep_their_values() -> None:
    """Claim: where a forward needs data and writes into its input, the user's example stays as it is."""

    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(x.sum().item())
            return super().forward(x)

    x = torch.ones(2, 4)
    assert FakeForward(Writes(4, 3), (x,)).run() == ((2, 3),)
    assert torch.equal(x, torch.ones(2, 4))
