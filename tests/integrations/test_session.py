"""A session: a new framework is 60 lines on it, shown for a trainer that nobody has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import setpoint
from golden.models import mlp
from setpoint.errors import LoopError
from setpoint.integrations.session import Session

STEPS = 24


class FakeTrainer:
    """Trains by events, as frameworks do: it loads and saves checkpoints, and keeps an average of the weights."""

    def __init__(self, num_steps: int, folder: Path, callback: Any = None) -> None:
        torch.manual_seed(0)
        self.model, self.num_steps, self.folder, self.callback = mlp(6, 24, 3), num_steps, folder, callback
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.step, self.should_stop = 0, False

    def fit(self, resume: str = "") -> None:
        self._call("on_setup")
        if resume:
            saved = torch.load(self.folder / resume, weights_only=True)
            self.step = saved["step"]
            for name in ("model", "average", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
        self._call("on_start")
        while self.step < self.num_steps and not self.should_stop:
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(self.step))
            nn.functional.cross_entropy(self.model(x), x[:, :3].argmax(1)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            self.step += 1
            self._call("on_step")
            states = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
            torch.save({"step": self.step, **states}, self.folder / str(self.step))
        self._call("on_end")

    def _call(self, event: str) -> None:
        if self.callback is not None:
            getattr(self.callback, event)(self)


class FakeCallback(Session):
    """The whole integration."""

    def on_setup(self, trainer: FakeTrainer) -> None:
        self.prepare(trainer.model, trainer.average)

    def on_start(self, trainer: FakeTrainer) -> None:
        copies = [trainer.average]
        self.begin(trainer.model, trainer.optimizer, total_steps=trainer.num_steps, copies=copies)

    def on_step(self, trainer: FakeTrainer) -> None:
        trainer.should_stop = self.stepped()

    def on_end(self, trainer: FakeTrainer) -> None:
        self.finish()


def weights(trainer: FakeTrainer) -> dict[str, Tensor]:
    return {**trainer.model.state_dict(), **trainer.average.state_dict()}


def same(left: FakeTrainer, right: FakeTrainer) -> bool:
    """Whether models and averages are the same to the bit."""
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_fake_trainer_meets_its_budget_with_its_average(tmp_path: Path) -> None:
    """Claim: the model is cut in the middle of the run, and the average that the trainer keeps with it."""
    callback = FakeCallback(0.5)
    trainer = FakeTrainer(STEPS, tmp_path, callback)
    trainer.fit()
    assert callback.summary is not None and callback.summary.budget_met and callback.summary.resizes
    shapes = {tuple(parameter.shape) for parameter in trainer.average.module.parameters()}
    assert shapes == {tuple(parameter.shape) for parameter in trainer.model.parameters()}
    assert "setpoint/units" in callback.metrics()


@pytest.mark.parametrize("step", [2, 8, 22])
def test_a_fake_trainer_resumes_bit_for_bit(step: int, tmp_path: Path) -> None:
    """Claim: a run goes on from its own checkpoints, before, between and after the cuts."""
    whole, again = FakeTrainer(STEPS, tmp_path, FakeCallback(0.5)), FakeTrainer(STEPS, tmp_path, FakeCallback(0.5))
    whole.fit()
    again.fit(str(step))
    assert same(whole, again)
    assert again.callback.loop.widths == whole.callback.loop.widths


def test_a_fake_trainer_stops_when_its_run_budget_is_spent(tmp_path: Path) -> None:
    """Claim: with more steps than the budget pays for it ends with the budget, and does not go on from there."""
    budget = {"flops": "50%", "flops/run": "100%"}
    callback = FakeCallback(budget, total_steps=STEPS)
    trainer = FakeTrainer(10 * STEPS, tmp_path, callback)
    trainer.fit()
    assert callback.summary is not None and callback.summary.budget_met
    assert STEPS < trainer.step == callback.summary.steps < 10 * STEPS
    again = FakeTrainer(10 * STEPS, tmp_path, FakeCallback(budget, total_steps=STEPS))
    with pytest.raises(LoopError, match="nothing is left to train"):
        again.fit(str(trainer.step))
    assert again.step == trainer.step and again.callback.summary is None


def test_a_session_is_free_after_an_exception(tmp_path: Path) -> None:
    """Claim: the same callback and model begin another run after one that was broken off."""
    callback = FakeCallback(0.5)
    trainer = FakeTrainer(STEPS, tmp_path, callback)
    callback.on_start(trainer)
    callback.on_start(trainer)
    callback.stop()
    setpoint.attach(trainer.model, trainer.optimizer, 0.5, total_steps=STEPS).detach()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FakeCallback("fifty"), setpoint.SetpointError, "fifty"),
        (lambda: FakeCallback(1.5), setpoint.SetpointError, "1.5"),
        (lambda: FakeCallback(0.5, totl_steps=9), TypeError, "unexpected keyword argument 'totl_steps'"),
    ],
)
def test_a_session_refuses_at_once(make: Any, error: type[Exception], words: str) -> None:
    """Claim: what is no budget, and an unknown setting, are named when the callback is made."""
    with pytest.raises(error, match=words):
        make()
