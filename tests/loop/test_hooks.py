"""Step hooks with several optimizers, of which a scaler skips some."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import setpoint
from setpoint.loop.hooks import StepHooks


class Trace:
    """Two optimizers under a scaler, and in which order hooks and steps came."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizers = (torch.optim.SGD([self.model.weight], lr=0.1), torch.optim.SGD([self.model.bias], lr=0.1))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.events: list[str] = []
        self.hooks = StepHooks(
            self.optimizers, lambda scale: self.events.append("before"), lambda: self.events.append("after")
        )
        for name, optimizer in zip("ab", self.optimizers, strict=True):
            optimizer.register_step_post_hook(lambda *_, name=name: self.events.append(name))

    def iterate(self, overflow: str, order: str = "ab") -> str:
        """One iteration in which these overflow; returns what came in it."""
        self.events.clear()
        self.scaler.scale(self.model(torch.ones(4, 3)).square().mean()).backward()
        for name, optimizer in zip("ab", self.optimizers, strict=True):
            if name in overflow:
                optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        for name in order:
            self.scaler.step(self.optimizers["ab".index(name)])
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        assert not self.hooks.within_step
        return " ".join(self.events)


# The optimizer's own hook runs behind ours, hence "after b".
WHOLE = {"ab": "before a after b", "ba": "before b after a"}


@pytest.mark.parametrize("overflows", list(itertools.product(["", "a", "b", "ab"], repeat=3)))
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_step_ends_behind_its_last_optimizer_whatever_was_skipped(overflows: tuple[str, ...], order: str) -> None:
    """Claim: in whichever iterations a scaler skips whichever optimizers, a whole iteration has `before` ahead of the
    first and `after` behind the last, and one with a skip has no `after`.
    """
    trace = Trace()
    for overflow in (*overflows, "", ""):
        came = trace.iterate(overflow, order)
        if overflow:
            assert "after" not in came, (overflows, came)
        else:
            assert came == WHOLE[order], (overflows, came)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it traces its optimizer
def test_a_compiled_optimizer_step_decides_like_a_plain_one() -> None:
    """Claim: `torch.compile(optimizer.step)`, made ahead of `attach`, leaves the loop out of what it compiles."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        x = torch.randn(16, 8)
        budget = setpoint.Budget.fraction(0.5, of="params")
        loop = setpoint.attach(model, optimizer, budget, example=(x,), total_steps=20)
        for _ in range(20):
            model(x).square().mean().backward()
            step()
            optimizer.zero_grad()
        summary = loop.finish()
        assert summary.budget_met and summary.resizes > 0, summary
        ends.append(summary.widths)
    assert ends[0] == ends[1]
