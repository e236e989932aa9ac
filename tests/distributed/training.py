"""What the checks on several ranks train: a model whose batch may be split, its data, and a user's own loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as Parallel

import setpoint
from controller.returning import Returning
from golden.models import Sampled
from loop.test_regrowth import Scripted
from setpoint.controller.schedule import Schedule

STEPS = 40


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
            with model.no_sync() if unsynchronised else nullcontext():
                loss = nn.functional.cross_entropy(model(some), labels) / parts
                loss.backward()
            losses[-1] += loss.item()
        if loop is not None:
            loop.observe(loss=losses[-1])
        if np.isfinite(largest_norm):  # PyTorch clips no plain tensors and DTensors together
            nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def caught(error: type[BaseException], text: str, do: Callable[[], Any]) -> None:
    """Check that something raises this, with this text."""
    try:
        do()
    except error as raised:
        assert text in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}: {text}")


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


def same_as_alone(called: nn.Module, contents: Callable[[nn.Module, Any], list[Tensor]], *, rtol: float) -> None:
    """Losses, plans and contents are those of one process on the same global batches, over cuts and returns."""
    setpoint.regrowth.regrowing._PROBE_SHARE = 1.0
    steps, cuts = (STEPS, 14) if dist.get_world_size() == 2 else (20, 7)
    optimizer, loop = attached(called, regrowing(cuts), share(0)[0], total_steps=steps)
    losses = train(called, optimizer, loop, range(steps), share, parts=2)
    summary = loop.finish()
    if isinstance(called, Parallel):
        assert_same_everywhere(called, optimizer)
    assert all(each == story(loop) for each in everywhere(story(loop)))
    assert summary.budget_met and summary.resizes >= 0.7 * cuts and summary.regrown_units > 0, summary
    mean_losses, found = np.mean(everywhere(losses), 0), contents(called, optimizer)
    if dist.get_rank() > 0:
        return
    alone = build()
    of_alone, single = attached(alone, regrowing(cuts), batch(0)[0], total_steps=steps)
    np.testing.assert_allclose(mean_losses, train(alone, of_alone, single, range(steps), batch), rtol=1e-9)
    single.finish()
    assert story(single) == story(loop)
    for a, b in zip(found, contents(alone, of_alone), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)
    for ours, theirs in zip(loop.ledger, single.ledger, strict=True):
        assert ours.loss is not None and abs(ours.loss - theirs.loss) < 1e-9 * abs(theirs.loss)
        for name, values in theirs.saliency.items():
            np.testing.assert_allclose(ours.saliency[name], values, rtol=1e-6)
        for name, values in theirs.gain.items():
            np.testing.assert_allclose(ours.gain[name], values, rtol=1e-6)


def reads_as_alone(wrap: Callable[[nn.Module], nn.Module], *, largest_norm: float = 0.5) -> None:
    """Outgoing weights that are frozen from the beginning are read through hooks, as in one process, over a cut."""
    readings, found = [], []
    for alone in (False, True):
        model = build()
        for layer in (model.mix, model.down):
            layer.weight.requires_grad_(False)
        called, data = (model, batch) if alone else (wrap(model), share)
        script = Scripted({5: {"up": [1, 5], "wide": [0, 3]}}, regrow=False)
        optimizer, loop = attached(called, script, data(0)[0])
        train(called, optimizer, loop, range(8), data, parts=2, largest_norm=largest_norm)
        assert loop.widths == {**loop.widths, "up": 22, "wide": 18}, loop.ledger.header["frozen"]
        readings.append(loop.reading())
        found.append([whole(each.detach()) for each in model.parameters()])
        loop.detach()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for name, values in readings[0].saliency.items():
        np.testing.assert_allclose(values, readings[1].saliency[name], rtol=1e-7)
        np.testing.assert_allclose(readings[0].slope[name], readings[1].slope[name], rtol=1e-7)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
