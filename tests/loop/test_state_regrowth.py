"""States that come back: modes that a truncation lost are probed and appended; a bad cut is undone whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from loop.test_regrowth import Scripted, dear
from setpoint_bench.models import SequenceClassifier

__all__ = ["dear"]  # a fixture of the tests below
LAYER = "blocks.0.lru"
GONE = list(range(10, 16))
Hook = Callable[[nn.Module, torch.optim.Optimizer], None]


class Run:
    """A small model, its optimizer and the loop; `before_cut` is called after each step, before the loop acts."""

    def __init__(self, controller: Any, total_steps: int, before_cut: Hook = lambda model, optimizer: None) -> None:
        torch.manual_seed(0)
        self.model = SequenceClassifier(1, 3, num_channels=4, num_states=16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.optimizer.register_step_post_hook(lambda *_: before_cut(self.model, self.optimizer))
        example = (torch.randn(16, 12, 1),)
        self.loop = setpoint.attach(
            self.model,
            self.optimizer,
            setpoint.Budget.fraction(0.5, of="params"),
            example=example,
            total_steps=total_steps,
            controller=controller,
            groups=tuple(each for each in setpoint.find_groups(self.model, example) if each.kind == "state"),
        )

    def train(self, first: int, last: int, spoil: Callable[[], float] = lambda: 0.0) -> None:
        for step in range(first, last):
            x = torch.randn(16, 12, 1, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(self.model(x), (x.sum((1, 2)) > 0).long())
            loss.backward()
            self.loop.observe(loss=loss.item() + spoil())
            self.optimizer.step()
            self.optimizer.zero_grad()


def of_layer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors with an entry for each state, and their moments."""
    held = [p for name, p in model.get_submodule(LAYER).named_parameters() if name != "D"]
    return [each.detach().clone() for p in held for each in (p, *optimizer.state[p].values()) if each.dim()]


def test_a_truncation_is_undone_when_the_loss_leaves_its_trend() -> None:
    """Once, with a warning: weights and moments of the layer are those from before the cut, to the bit; then the budget
    has the last word.
    """
    held: list[list[Tensor]] = []
    schedule = setpoint.Schedule(warmup=0.2, settle=0.6, num_cuts=4)
    run = Run(setpoint.PricedController(schedule), 200, lambda *parts: held.append(of_layer(*parts)))
    with pytest.warns(UserWarning, match="the cut was taken back at step"):
        for step in range(200):
            run.train(step, step + 1, lambda: 3.0 * any(entry.dropped for entry in run.loop.ledger))
            if run.loop.ledger and run.loop.ledger[-1].grown and run.loop.ledger[-1].step == step + 1:
                after = of_layer(run.model, run.optimizer)
    summary = run.loop.finish()
    (back,) = (entry for entry in run.loop.ledger if entry.grown)
    (taken, *later) = (entry for entry in run.loop.ledger if entry.dropped)
    assert dict(back.grown) == dict(taken.dropped) and taken.step < back.step and later
    assert all(torch.equal(one, two) for one, two in zip(after, held[taken.step - 1], strict=True))
    assert summary.budget_met and summary.gave_way.endswith("the budget was met")


def test_lost_modes_are_probed_and_come_back(dear: None) -> None:
    """A return changes no output; what a probe told is in the ledger."""
    run = Run(Scripted({10: {LAYER: GONE}}, {20: {}, 30: {LAYER: GONE}}, last=60), 60)
    u = torch.randn(4, 60, 4)
    run.optimizer.param_groups[0]["lr"] = 0.0  # so that only the loop changes the model
    run.train(0, 29)
    before = run.model(u[..., :1]).detach()
    run.train(29, 30)
    assert run.loop.widths == {LAYER: 16} and run.loop.origin[LAYER].tolist() == list(range(16))
    torch.testing.assert_close(run.model(u[..., :1]).detach(), before, rtol=0, atol=1e-5)
    (entry,) = (each for each in run.loop.ledger if each.grown)
    assert entry.grown == {LAYER: GONE} and np.isfinite(entry.gain[LAYER]).all()


@pytest.mark.parametrize("controller", ["scripted", "priced"])
def test_a_run_with_resting_states_resumes(controller: str, dear: None) -> None:
    """Weights and ledger are those of the uninterrupted run, before the cut, while states rest, and after."""

    def start() -> Run:
        made: Any = setpoint.PricedController(setpoint.Schedule(warmup=0.2, settle=0.6, num_cuts=4), regrow=True)
        if controller == "scripted":
            made = Scripted({10: {LAYER: GONE}}, {20: {LAYER: GONE[:3]}}, last=40)
        return Run(made, 60)

    whole = start()
    states, at = {}, (5, 15, 22, 45)
    for step in range(60):
        if step in at:
            states[step] = [each.state_dict() for each in (whole.loop, whole.model, whole.optimizer)]
            states[step] = torch.load(_file(states[step]), weights_only=True)
        whole.train(step, step + 1)
    for step, parts in states.items():
        again = start()
        for part, state in zip((again.loop, again.model, again.optimizer), parts, strict=True):
            part.load_state_dict(state)
        again.train(step, 60)
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
        for one, two in zip(whole.loop.ledger, again.loop.ledger, strict=True):
            assert (one.widths, one.loss_after, one.grown) == (two.widths, two.loss_after, two.grown)


def _file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
