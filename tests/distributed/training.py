"""What the checks on several ranks train: a model whose batch may be split, its data, and a user's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as Parallel

import setpoint
from controller.returning import Returning
from setpoint.controller.schedule import Schedule

STEPS = 40


class Sampled(nn.Module):
    """A net whose norms are per sample, so that a batch may be split over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 16, 3, padding=1), nn.GroupNorm(8, 16)
        self.wide, self.mix, self.stream = nn.Conv2d(16, 20, 1), nn.Conv2d(20, 12, 1), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.norm(self.stem(x)))))
        x = self.mix(x).mean((2, 3))
        return self.head(x + self.down(nn.functional.gelu(self.up(self.stream(x)))))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1, 0, 0] > 0.5).long()


def share(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of it."""
    x, y = batch(step)
    each = len(x) // dist.get_world_size()
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    return x[mine], y[mine]


def uneven(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part, which is smaller in some steps on some ranks."""
    x, y = share(step)
    left = len(x) - 3 * (dist.get_rank() * step % 2)
    return x[:left], y[:left]


def build(kind: Callable[[], nn.Module] = Sampled) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train()


def regrowing(num_cuts: int = 14) -> Returning:
    """Comes down to three quarters of the limit, from where units come back."""
    schedule = Schedule(0.0, 0.5, 0.8, num_cuts=num_cuts)
    return Returning(setpoint.PricedController(schedule, regrow=True, dwell=1, min_density=0.0), share=0.75)


def attached(model: nn.Module, controller: Any, x: Tensor, **options: Any) -> tuple[Any, setpoint.Loop]:
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    budget = options.pop("budget", setpoint.Budget.fraction(0.5, of="flops"))
    settings = {"example": (x,), "total_steps": STEPS, "controller": controller, "verify": False, **options}
    return optimizer, setpoint.attach(model, optimizer, budget, **settings)


def train(
    model: Any,
    optimizer: Any,
    loop: Any,
    steps: range,
    data: Callable[[int], Any],
    parts: int = 1,
    largest_norm: float = 0.5,
) -> list[float]:
    """Losses of the user's own loop; with several parts it accumulates gradients."""
    losses = []
    for step in steps:
        x, y = data(step)
        losses.append(0.0)
        for number, (some, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
            unsynchronised = isinstance(model, Parallel) and number < parts
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(number == parts)
            with model.no_sync() if unsynchronised else nothing():
                loss = nn.functional.cross_entropy(model(some), labels) / parts
                loss.backward()
            losses[-1] += loss.item()
        if loop is not None:
            loop.observe(loss=losses[-1])
        nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@contextmanager
def nothing() -> Iterator[None]:
    yield


def everywhere(value: Any) -> list[Any]:
    """What each rank has."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def assert_same_everywhere(model: nn.Module, optimizer: Any) -> None:
    """Weights and optimizer state are the same on all ranks, bit for bit."""
    tensors = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    all_of_them = everywhere([tensor.detach().numpy().tobytes() for tensor in tensors])
    assert all(each == all_of_them[0] for each in all_of_them)


def story(loop: setpoint.Loop) -> list[Any]:
    return [(entry.step, entry.dropped, entry.grown) for entry in loop.ledger]
