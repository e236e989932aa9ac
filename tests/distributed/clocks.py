"""Checks on budgets of seconds over several ranks; each is a function that every rank runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as Parallel

import setpoint
from distributed.training import caught, everywhere
from runtimes.clock import Clock, straight
from setpoint.errors import CostError, RankError, RuntimeUnavailable
from setpoint.loop.summary import Summary
from setpoint.spending import meter

STEPS = 60
NOW_S = [0.0]


class Ticking(nn.Linear):
    """A layer whose forwards turn this rank's clock, on the second rank twice as far."""

    def forward(self, x: Tensor) -> Tensor:
        NOW_S[0] += 1e-6 * self.weight.numel() * (1 + dist.get_rank())
        return super().forward(x)


def trained(
    budget: Any, kind: type[nn.Linear] = nn.Linear, wrap: Callable[[nn.Module], nn.Module] = Parallel, rows: int = 16
) -> tuple[nn.Module, Summary]:
    torch.manual_seed(0)
    inner = nn.Sequential(kind(16, 128), nn.ReLU(), kind(128, 128), nn.ReLU(), kind(128, 4))
    model, generator = wrap(inner), torch.Generator().manual_seed(dist.get_rank())
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(16, 16, generator=generator)
    loop = setpoint.attach(model, optimizer, budget, example=(x,), total_steps=STEPS)
    for _ in range(STEPS):
        x = torch.randn(rows, 16, generator=generator)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return inner, loop.finish()


def step_s(model: nn.Module) -> float:
    """Seconds of a step on the slowest rank."""
    return dist.get_world_size() * 1e-6 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def alike(summary: Summary) -> None:
    """All ranks have come to the same end."""
    own = (summary.widths, summary.metered, summary.limit, summary.spent, summary.budget_met, summary.overhead_flops)
    assert all(each == own for each in everywhere(own)), everywhere(own)
    assert summary.budget_met, summary.reason


def slowest_clock() -> None:
    """A budget of latency holds on the slowest rank: fit, readings and verdict are the same on all ranks."""
    with patch.object(meter, "_now", lambda synchronize: NOW_S[0]):
        dense = step_s(trained(1.0, Ticking)[0])
        for budget in (setpoint.Budget.total(0.5 * dense, of="latency"), "50% latency"):
            model, summary = trained(budget, Ticking)
            alike(summary)
            assert 0.9 * 0.5 * dense <= step_s(model) <= 1.03 * 0.5 * dense
            assert abs(summary.metered["latency"] / step_s(model) - 1) < 1e-6


def served_once() -> None:
    """The first rank alone loads the runtime and times, also where a runtime fails in mid-run, and all decide alike."""
    first = dist.get_rank() == 0
    clock = Clock(straight)
    dense = straight(trained(1.0)[0])
    model, summary = trained(setpoint.Budget.total(0.5 * dense, of="inference", runtime=clock))
    alike(summary)
    assert 0.95 * 0.5 * dense <= straight(model) <= 0.5 * dense
    assert abs(summary.metered["inference"] / straight(model) - 1) < 1e-6
    assert (clock.loads > 15) if first else clock.loads == 0, clock.loads
    failing = Clock(straight, fails_after=15)  # the dense model twice and thirteen copies
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, summary = trained(setpoint.Budget.fraction(0.5, of="inference", runtime=failing))
    alike(summary)
    assert len([each for each in said if "held by the fit" in str(each.message)]) == (1 if first else 0)


def joules_and_bytes() -> None:
    """Joules are those of all ranks together, bytes those of the rank that has most."""
    with patch.object(meter, "_now", lambda synchronize: NOW_S[0]):
        dense = step_s(trained(1.0, Ticking)[0])
        own = 10.0 * dense * (1 + dist.get_rank()) / dist.get_world_size()  # at 10 W
        limit = 0.5 * sum(everywhere(own))
        model, summary = trained(setpoint.Budget.total(limit, of="energy", watts=10.0), Ticking)
        alike(summary)
        assert 0.9 * 0.5 * dense <= step_s(model) <= 1.03 * 0.5 * dense
    _, summary = trained("60% memory", rows=16 + 8 * dist.get_rank())
    alike(summary)
    assert summary.metered["memory"] <= 1.03 * summary.limit["memory"]


def sharded_clocks() -> None:
    """Seconds of steps, and of forwards in a runtime, under `fully_shard` and under tensor parallelism."""

    def parallel(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    for wrap in (fully_shard, parallel):
        with patch.object(meter, "_now", lambda synchronize: NOW_S[0]):
            dense = step_s(trained(1.0, Ticking, wrap)[0])
            model, summary = trained("50% latency", Ticking, wrap)
            alike(summary)
            assert 0.85 * 0.5 * dense <= step_s(model) <= 1.03 * 0.5 * dense
        limit = 0.5 * straight(trained(1.0, wrap=wrap)[0])
        model, summary = trained(setpoint.Budget.total(limit, of="inference", runtime=Clock(straight)), wrap=wrap)
        alike(summary)
        assert 0.9 * limit <= straight(model) <= limit
        words = "'memory' is not available of a sharded model on the CPU"
        caught(CostError, words, lambda wrap=wrap: trained("60% memory", wrap=wrap))


def clock_failures() -> None:
    """What cannot be read alike is refused, and a runtime that fails in attach stops all ranks with its error."""
    first = dist.get_rank() == 0
    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=Clock(straight, fails_after=0))
    text = "clock lacks the op Relu" if first else "failed on rank 0 with RuntimeUnavailable: clock lacks the op Relu"
    caught(RuntimeUnavailable if first else RankError, text, lambda: trained(budget))
    assert everywhere(dist.get_rank()) == list(range(dist.get_world_size()))

    def breaks(model: nn.Module, example: Any) -> float:
        raise KeyError("no board")

    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=breaks)
    caught(RuntimeUnavailable if first else RankError, "no board", lambda: trained(budget))
    words = "'latency' for the whole run is not available on several ranks"
    caught(CostError, words, lambda: trained(setpoint.Budget.fraction(0.5, of="latency", per="run")))
