"""The state of a loop: a run that was interrupted goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import setpoint
from conformance.test_optimizers import ROWS
from loop.test_regrowth import BACK, DROP, Net, Scripted, data, dear
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.priced import PricedController
from setpoint.cost.price import Price
from setpoint.errors import CheckpointError, LoopError, OptimizerError

__all__ = ["dear"]
STEPS = 40


class Run:
    """A training run with all that a run may have: an averaged copy, a scheduler, two optimizers if asked for."""

    def __init__(
        self,
        controller: Callable[[], Any],
        make: Callable[[Any], Optimizer] = lambda p: torch.optim.AdamW(p, lr=0.01),
        split: bool = False,
        budget: float = 0.5,
        model: Callable[[], nn.Module] = Net,
        total_steps: int = STEPS,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        parameters = list(self.model.parameters())
        parts = [parameters[::2], parameters[1::2]] if split else [parameters]
        self.optimizers = [make(part) for part in parts]
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda s: 1 / (1 + s)) for each in self.optimizers]
        self.loop = setpoint.attach(
            self.model,
            self.optimizers,
            setpoint.Budget.fraction(budget, of="params"),
            example=(data(0)[0],),
            total_steps=total_steps,
            controller=controller(),
            copies=(self.ema,),
            **options,
        )

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            x, y = data(step)
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            for each in (*self.optimizers, *self.schedulers):
                each.step()
            for each in self.optimizers:
                each.zero_grad()
            self.ema.update_parameters(self.model)
            self.loop.observe(loss=loss)
            losses.append(loss.item())
        return losses

    def parts(self) -> list[Any]:
        return [self.loop, self.model, self.ema, *self.optimizers, *self.schedulers]

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts()], file)
        return file

    def load(self, file: io.BytesIO) -> Run:
        file.seek(0)
        for part, state in zip(self.parts(), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        return self


def told(loop: setpoint.Loop) -> list[dict[str, Any]]:
    """The ledger, without seconds."""
    rows = [{key: v for key, v in row.items() if "seconds" not in key} for row in loop.ledger.to_rows()]
    return rows


def tensors(run: Run) -> list[torch.Tensor]:
    """Everything that training has changed."""
    found = [*run.model.state_dict().values(), *run.ema.state_dict().values()]
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return found


def assert_same_end(one: Run, other: Run) -> None:
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    assert told(one.loop) == told(other.loop) and one.loop.widths == other.loop.widths
    assert all(np.array_equal(origin, other.loop.origin[name]) for name, origin in one.loop.origin.items())
    summaries = [each.loop.finish() for each in (one, other)]
    for name, value in vars(summaries[0]).items():
        if "seconds" not in name and name != "break_even_step":
            assert value == vars(summaries[1])[name], name


def check_resumes(start: Callable[[], Run], at: range | list[int], steps: int = STEPS) -> None:
    """Interrupt a run at each of these steps, and compare what comes of it with the run that was left alone."""
    whole = start()
    losses, files = [], {}
    for step in range(steps):
        if step in at:
            files[step] = whole.saved()
        losses += whole.train(step, step + 1)
    assert len(whole.loop.ledger) > 1 and whole.loop.widths != start().loop.widths
    for step, file in files.items():
        again = start().load(file)
        assert again.loop.step == step
        assert again.train(step, steps) == losses[step:], step
        assert_same_end(copy.copy(whole), again) if step == at[-1] else None
        assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))
        assert told(whole.loop) == told(again.loop)


def test_a_run_resumes_bit_for_bit_at_every_step(dear: None) -> None:
    """Claim: losses, weights, moments, averaged copy, ledger and summary are those of the uninterrupted run, from any
    step on: before the first cut, while units rest, are probed, rise after their return, and after the landing."""
    check_resumes(lambda: Run(lambda: Scripted(DROP, BACK), split=True, budget=0.9), range(STEPS))
