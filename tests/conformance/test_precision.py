"""Optimizers, precisions, accumulation, clipping and compiled code: a cut run trains on like a fresh small model.

Rows are pairwise: each value of each setting meets each value of each other one at least once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import setpoint
from loop.test_regrowth import Net, Scripted, data
from matrix.rows import pairwise

# Losses are asked for twice in a step.
pytestmark = pytest.mark.filterwarnings("ignore:a step gives the model")

SETTINGS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("sgd", "adamw", "adamw-foreach", "adamw-fused"),
    "precision": ("float32", "bfloat16", "float16"),
    "accumulation": (1, 2),
    "clip": (None, 0.05),
    "wrapper": ("plain", "compiled", "channels_last", "parallel"),
}
DROP = {3: {"inner.0": [1, 4, 9], "stem": [0, 3]}}


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2]}]
    if name == "sgd":
        return torch.optim.SGD(others, lr=0.05, momentum=0.9)
    forms = {name.partition("-")[2]: True} if "-" in name else {}
    return torch.optim.AdamW(others, lr=0.01, **forms)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, drop: Any = None) -> setpoint.Loop:
    """A loop that drops these units, by step."""
    budget, example = setpoint.Budget.fraction(0.9, of="params"), (data(0)[0],)
    settings = {"controller": Scripted(drop or {}, regrow=False), "verify": False}
    return setpoint.attach(model, optimizer, budget, example=example, total_steps=20, **settings)


class Training:
    """A user's training loop of these settings."""

    def __init__(self, model: nn.Module, forward: Any, optimizer: torch.optim.Optimizer, row: dict[str, Any]) -> None:
        self.model, self.forward, self.optimizer, self.row = model, forward, optimizer, row
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=row["precision"] == "float16")  # type: ignore[attr-defined]

    def autocast(self) -> Any:
        kind = self.row["precision"]
        return nullcontext() if kind == "float32" else torch.autocast("cpu", getattr(torch, kind))

    def step(self, number: int) -> Tensor:
        parts = self.row["accumulation"]
        for part in range(parts):
            x, y = data(parts * number + part)
            if self.row["wrapper"] == "channels_last":
                x = x.to(memory_format=torch.channels_last)
            last = part == parts - 1 or not isinstance(self.forward, DistributedDataParallel)
            with nullcontext() if last else self.forward.no_sync():
                with self.autocast():
                    loss = nn.functional.cross_entropy(self.forward(x).float(), y) / parts
                self.scaler.scale(loss).backward()
        if self.row["clip"]:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.row["clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


@contextmanager
def called_through(model: nn.Module, wrapper: str, folder: Path) -> Iterator[Any]:
    """The model as the user calls it; the process group of a parallel one has one process."""
    if wrapper == "parallel":
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield DistributedDataParallel(model, gradient_as_bucket_view=True)
        finally:
            torch.distributed.destroy_process_group()
    else:
        yield torch.compile(model, backend="eager") if wrapper == "compiled" else model


@pytest.mark.parametrize("row", pairwise(SETTINGS), ids=lambda row: "-".join(map(str, row.values())))
def test_a_cut_run_trains_on_like_a_fresh_small_model(row: dict[str, Any], tmp_path: Path) -> None:
    """Claim: after a cut in the middle of training, losses and weights are bit-equal to those of a small model that was
    loaded from a file, with an optimizer that was given the state, and without a loop.
    """
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last) if row["wrapper"] == "channels_last" else Net()
    optimizer = make_optimizer(row["optimizer"], model)
    with called_through(model, row["wrapper"], tmp_path) as forward:
        loop = attached(forward, optimizer, DROP)
        run = Training(model, forward, optimizer, row)
        for number in range(4):
            run.step(number)
        assert loop.widths == {"stem": 10, "inner.0": 13}
        check_goes_on(run, row, tmp_path)
        reading = loop.reading()
        assert reading.num_steps == 8 and reading.finite() and reading.skipped_steps == 0
        loop.detach()


def check_goes_on(run: Training, row: dict[str, Any], folder: Path) -> None:
    """Four more steps beside a small model of its own that is called plainly, or compiled."""
    setpoint.save(run.model, folder / "small")
    small = Net().to(memory_format=torch.channels_last) if row["wrapper"] == "channels_last" else Net()
    setpoint.load(folder / "small", into=small)
    alone = make_optimizer(row["optimizer"], small)
    alone.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    forward = torch.compile(small, backend="eager") if row["wrapper"] == "compiled" else small
    other = Training(small, forward, alone, row)
    other.scaler.load_state_dict(run.scaler.state_dict())
    for number in range(4, 8):
        assert torch.equal(run.step(number), other.step(number))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), small.parameters(), strict=True))


def saliencies(kind: str, scale: float, unscale: bool) -> dict[str, np.ndarray]:
    """What the sensor reads after five steps of a run whose gradients are scaled like this."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make_optimizer(kind, model)
    loop = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)  # type: ignore[attr-defined]
    for number in range(5):
        x, y = data(number)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return dict(loop.reading().saliency)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "adamw-fused"])
def test_a_grad_scaler_does_not_scale_readings(kind: str, unscale: bool) -> None:
    """Claim: with a GradScaler of a power of two readings are as without, to rounding; fused optimizers, which see
    scaled gradients, too.
    """
    want, got = saliencies(kind, 1.0, False), saliencies(kind, 2.0**12, unscale)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "adamw-fused"])
def test_steps_that_a_grad_scaler_skips_make_no_reading(kind: str) -> None:
    """Claim: a step with infinite gradients is skipped by scaler and sensor alike: it does not count as
    sensed, and the weights do not move.
    """
    model = Net()
    optimizer = make_optimizer(kind, model)
    loop = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in model.parameters()]
    x, y = data(0)
    scaler.scale(nn.functional.cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert loop.reading().num_steps == 0
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    assert loop.reading().num_steps == 1
