"""The demo's training: an ordinary loop, dense or with Setpoint, that says after every step how it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from setpoint.attach import attach
from setpoint.demo.signs import NEW, draw
from setpoint.ledger import Ledger
from setpoint.loop.summary import Summary

EACH, TESTED = 50, 40
"""Images of each letter that train, and that test."""
BATCH, RATE = 32, 2e-3
LOOKS = 16
"""How often the accuracy is measured in a training."""


@dataclass(frozen=True)
class Data:
    """Images (n, 1, h, w) and labels (n) of the new letters: for training and for testing."""

    pictures: Tensor
    labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Moment:
    """How a training stands after a step.

    Args:
        accuracy: on the test images, as measured last.
        seconds: of training, without those that measured the accuracy.
        ledger: of a training with Setpoint.
        summary: of a training with Setpoint, at its end.
    """

    step: int
    accuracy: float
    seconds: float
    ledger: Ledger | None = None
    summary: Summary | None = None


def data(seed: int) -> Data:
    """Images of the new letters."""
    return Data(*draw(NEW, EACH, 2 * seed), *draw(NEW, TESTED, 2 * seed + 1))


def train(model: nn.Module, given: Data, steps: int, seed: int, budget: float | None = None) -> Iterator[Moment]:
    """Fine-tune a model in place, with Setpoint where there is a budget: a fraction of the dense FLOPs per step.

    The first moment comes before the first step.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    seconds, right, loop, summary = 0.0, accuracy(model, given), None, None
    if budget is not None:
        started = time.perf_counter()
        loop = attach(model, optimizer, budget, total_steps=steps, example=(given.pictures[:BATCH],))
        seconds = time.perf_counter() - started
    ledger = None if loop is None else loop.ledger
    yield Moment(0, right, seconds, ledger)
    for step in range(1, steps + 1):
        started = time.perf_counter()
        rows = torch.randperm(len(given.labels), generator=order)[:BATCH]
        loss = nn.functional.cross_entropy(model(given.pictures[rows]), given.labels[rows], label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if loop is not None and step == steps:
            summary = loop.finish()
        seconds += time.perf_counter() - started
        if step == steps or step % max(1, steps // LOOKS) == 0:
            right = accuracy(model, given)
        yield Moment(step, right, seconds, ledger, summary)


@torch.no_grad()
def accuracy(model: nn.Module, given: Data) -> float:
    """The share of the test images that a model gets right."""
    model.eval()
    try:
        return float((model(given.test_pictures).argmax(1) == given.test_labels).float().mean())
    finally:
        model.train()
