"""Checks that ranks see alike, decide alike and cut alike; each is a function that every rank runs."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as Parallel
from torch.optim.swa_utils import AveragedModel

import setpoint
from distributed.training import (
    STEPS,
    assert_same_everywhere,
    attached,
    batch,
    build,
    everywhere,
    reads_as_alone,
    regrowing,
    same_as_alone,
    share,
    story,
    train,
    uneven,
)
from loop.test_regrowth import Net, Scripted
from setpoint.actuator.mask import mask
from setpoint.errors import CheckpointError, RankError
from setpoint.gates.gated import GatedController
from setpoint.integrations import log_to
from setpoint.sensor.chain import SensorChain

DROP = {3: {"inner.0": [1, 4, 9], "stem": [0, 3]}, 5: {"inner.0": [0]}}


def twin() -> None:
    """Losses, plans and weights are those of one process on the same global batches, over cuts and returns."""
    same_as_alone(Parallel(build()), lambda model, _: [p.detach() for p in model.parameters()], rtol=1e-8)


def goals() -> None:
    """What decides by the observed loss, or learns while it decides, makes the plans that it makes in one process."""

    def followed(goal: Any, controller: Any, steps: int, called: Any, data: Callable[[int], Any]) -> list[Any]:
        optimizer, loop = attached(called, controller, data(0)[0], total_steps=steps, budget=goal)
        train(called, optimizer, loop, range(steps), data)
        assert loop.finish().resizes > 2
        return story(loop)

    half = setpoint.Budget.fraction(0.5, of="flops")
    for goal, controller, steps in ((setpoint.Tolerance(0.5), None, 120), (half, GatedController(), 40)):
        together = followed(goal, controller, steps, Parallel(build()), share)
        if dist.get_rank() == 0:
            assert together == followed(goal, controller, steps, build(), batch)


def batch_norm() -> None:
    """With batch norm and uneven batches, a cut run equals the masked full model on the same ranks."""
    model = build(Net)
    wrapper = Parallel(model)
    optimizer, loop = attached(wrapper, Scripted(DROP, regrow=False), share(0)[0])
    groups = loop.groups
    train(wrapper, optimizer, loop, range(2), uneven)
    full = copy.deepcopy(model)
    of_full = torch.optim.AdamW(full.parameters(), lr=0.01, eps=1e-4)
    of_full.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masked = Parallel(full)
    for step in range(2, 9):
        kept = {name: np.isin(np.arange(group.num_units), loop.origin[name]) for name, group in _named(groups)}
        mask(full, of_full, groups, kept)
        ours = train(wrapper, optimizer, loop, range(step, step + 1), uneven)
        theirs = train(
            masked, _Guarded(of_full, partial(mask, full, of_full, groups, kept)), None, range(step, step + 1), uneven
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    assert loop.widths == {"stem": 10, "inner.0": 12}
    for a, b in zip(model.buffers(), full.buffers(), strict=True):
        kept_channels = loop.origin["inner.0" if len(b) == 16 else "stem"] if b.dim() else ...
        torch.testing.assert_close(a, b[kept_channels], rtol=1e-10, atol=1e-12)


def _named(groups: Any) -> list[tuple[str, Any]]:
    return [(group.name, group) for group in groups]


class _Guarded:
    """An optimizer around whose step something is done."""

    def __init__(self, optimizer: Any, guard: Callable[[], None]) -> None:
        self.optimizer, self.guard, self.zero_grad = optimizer, guard, optimizer.zero_grad

    def step(self) -> None:
        self.guard()
        self.optimizer.step()
        self.guard()


def options() -> None:
    """Whatever a wrapper was built with goes on after cuts: the same weights as in the plainest wrapper."""
    calls: list[int] = []

    def user_hook(state, bucket):  # type: ignore[no-untyped-def]  # a wrapper takes no annotation that is a string
        state.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / dist.get_world_size())

    def run(hook: Any = None, compiled: bool = False, to_none: bool = True, **how: Any) -> list[Tensor]:
        model = build()
        wrapper = Parallel(model, **how)
        if callable(hook):
            wrapper.register_comm_hook(calls, hook)
        elif hook is not None:
            wrapper._register_builtin_comm_hook(hook)
        seen: list[int] = []
        wrapper.register_forward_hook(lambda *args: seen.append(1))
        called = torch.compile(wrapper, backend="eager") if compiled else wrapper
        optimizer, loop = attached(called, Scripted({3: {"up": [1, 5]}, 5: {"up": [0]}}, regrow=False), share(0)[0])
        for step in range(8):
            x, y = share(step)
            nn.functional.cross_entropy(called(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        assert loop.widths["up"] == 21 and (compiled or len(seen) == 8)
        assert_same_everywhere(model, optimizer)
        loop.detach()
        if hook is not None and not callable(hook):
            assert str(hook) in wrapper._get_ddp_logging_data()["comm_hook"]
        return [p.detach() for p in model.parameters()]

    plain = run()
    built_in = torch._C._distributed_c10d.BuiltinCommHookType.ALLREDUCE
    rows: list[dict[str, Any]] = [
        {"hook": user_hook, "static_graph": True, "gradient_as_bucket_view": True, "to_none": False},
        {"hook": built_in, "find_unused_parameters": True, "bucket_cap_mb": 0.0005},
        {"compiled": True, "gradient_as_bucket_view": True},
    ]
    for row in rows:
        for a, b in zip(plain, run(**row), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=str(row))
    assert len(set(calls)) >= 3  # the hook was given buckets of three sizes


def frozen() -> None:
    """A layer that is frozen while others are cut, and then trains again, is averaged again, as in one process."""
    model = build()
    wrapper = Parallel(model, find_unused_parameters=True)
    script = Scripted({3: {"up": [1, 5]}, 5: {"up": [0]}}, regrow=False)
    optimizer, loop = attached(wrapper, script, share(0)[0])
    alone = build()
    of_alone, single = attached(alone, script, batch(0)[0])
    for step in range(8):
        for each in (model, alone):
            each.wide.requires_grad_(step not in (2, 3))
            each.stem.requires_grad_(step < 4)
        train(wrapper, optimizer, loop, range(step, step + 1), share)
        train(alone, of_alone, single, range(step, step + 1), batch)
    assert_same_everywhere(model, optimizer)
    assert loop.widths == single.widths and loop.widths["up"] == 21
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    readings = [each.reading().saliency for each in (loop, single)]
    for name, values in readings[0].items():
        np.testing.assert_allclose(values, readings[1][name], rtol=1e-7)


def adapters() -> None:
    """Outgoing weights that are frozen from the beginning are read through hooks, as in one process, over a cut."""
    reads_as_alone(Parallel)


class Branched(nn.Module):
    """A net with a branch that may be left out, whose outgoing weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.up, self.down, self.taken = nn.Linear(8, 4), nn.Linear(8, 16), nn.Linear(16, 4), True
        self.down.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x)
        return y + self.down(torch.relu(self.up(x))) if self.taken else y


def branches() -> None:
    """What hooks read is that of all ranks where a branch runs on one of them only; the others do not stop the run, nor
    does one step that leaves it out everywhere.
    """
    model = build(Branched)
    wrapper = Parallel(model, find_unused_parameters=True)
    x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    sensor = SensorChain(setpoint.TaylorSensor(16))
    optimizer, loop = attached(wrapper, Scripted({6: {"up": [1, 5]}}, regrow=False), x, sensor=sensor)
    for step in range(8):
        model.taken = dist.get_rank() == 0 and step != 2
        nn.functional.cross_entropy(wrapper(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.widths["up"] == 14 and loop.reading().saliency["up"].max() > 0
    assert_same_everywhere(model, optimizer)
    everyones = everywhere(loop.reading().saliency["up"].tolist())
    assert all(each == everyones[0] for each in everyones)
    loop.detach()
    # The same until the first cut, for which second moments are gathered in forwards.
    model = build(Branched)
    wrapper, optimizer = Parallel(model, find_unused_parameters=True), torch.optim.SGD(model.parameters(), lr=0.01)
    loop = setpoint.attach(wrapper, optimizer, 0.6, total_steps=300, example=(x,))
    for _ in range(4):
        model.taken = dist.get_rank() == 0
        nn.functional.cross_entropy(wrapper(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.budget_met and "refitted" in loop.ledger[0].reason
    assert_same_everywhere(model, optimizer)
    loop.detach()


def averages() -> None:
    """An average that one rank alone keeps is cut with the model there, while the other rank has another copy."""
    model = build()
    wrapper, ema = Parallel(model), AveragedModel(model) if dist.get_rank() == 0 else None
    copies = (copy.deepcopy(model),) if ema is None else (ema,)  # as many on every rank, as the ranks compare
    optimizer, loop = attached(wrapper, Scripted({3: {"up": [1, 5]}}, regrow=False), share(0)[0], copies=copies)
    train(wrapper, optimizer, loop, range(8), share)
    assert len(loop.host.copies) == 1 and loop.widths["up"] == 22
    if ema is not None:
        ema.update_parameters(model)
        for mine, its in zip(ema.module.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, its)
    loop.detach()


def bad_batch() -> None:
    """Where the first batch of one rank holds NaN, all ranks begin with the next one."""
    model = build()
    wrapper, good = Parallel(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = setpoint.attach(wrapper, optimizer, 0.5, total_steps=STEPS)
    for step in range(4):
        x, y = share(step)
        nn.functional.cross_entropy(wrapper(x * torch.nan if dist.get_rank() > step else x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not step:
            assert loop.step == 0
            model.load_state_dict(good)
    assert loop.step == 3 and loop.budget_met
    assert_same_everywhere(model, optimizer)
    loop.detach()


def resume() -> None:
    """A run on several ranks goes on bit for bit from one file, in freshly built wrappers.

    Where one of them refuses it first, all ranks raise, and have the dense model again.
    """
    setpoint.regrowth.regrowing._PROBE_SHARE = 1.0

    def start() -> dict[str, Any]:
        model = build()
        wrapper, ema = Parallel(model), AveragedModel(model)
        optimizer, loop = attached(wrapper, regrowing(), share(0)[0], copies=(ema,))
        return {"model": wrapper, "optimizer": optimizer, "loop": loop, "ema": ema}

    folder = Path(everywhere(tempfile.mkdtemp())[0])
    whole = start()
    called = [whole[name] for name in ("model", "optimizer", "loop")]
    train(*called, range(18), share)
    if dist.get_rank() == 0:
        setpoint.save_run(folder / "run", **whole)
    dist.barrier()
    again = start()
    dense = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in again["model"].state_dict().items()}
    optimizer = again["optimizer"]
    if dist.get_rank() == 1:
        optimizer.load_state_dict = lambda state: {}["nothing"]
    with suppress(RankError if dist.get_rank() == 0 else CheckpointError):
        setpoint.load_run(folder / "run", **again)
        raise AssertionError("a rank has refused it")
    assert all(
        torch.equal(t, dense[n][0]) and t.data_ptr() == dense[n][1] for n, t in again["model"].state_dict().items()
    )
    vars(optimizer).pop("load_state_dict", None)
    setpoint.load_run(folder / "run", **again)
    rest = train(*called, range(18, STEPS), share)
    assert train(*(again[name] for name in ("model", "optimizer", "loop")), range(18, STEPS), share) == rest
    assert story(again["loop"]) == story(whole["loop"]) and len(story(whole["loop"])) > 10


def told() -> None:
    """All ranks ask for loggers, a file of the ledger and lines in the log; the first alone writes, and all agree."""

    class Rows(list[Any]):
        def log(self, metrics: dict[str, float], step: int) -> None:
            """Note a row."""
            self.append(metrics)

    folder, rank, rows, lines = Path(everywhere(tempfile.mkdtemp())[0]), dist.get_rank(), Rows(), list[Any]()
    handler, log = logging.Handler(), logging.getLogger("setpoint")
    handler.emit = lines.append  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    wrapper = Parallel(build())
    optimizer, loop = attached(wrapper, regrowing(), share(0)[0])
    log_to(loop, rows)
    log_to(loop, folder / f"{rank}.jsonl")
    seen = list[Any]()
    loop.on_step(seen.append)
    train(wrapper, optimizer, loop, range(STEPS), share)
    loop.finish()
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    dist.barrier()
    first = rank == 0
    cuts = [each for each in lines if each.getMessage().startswith("step ")]  # attach says on each rank what begins
    assert (len(rows), bool(cuts)) == (STEPS if first else 0, first)
    assert [each.name for each in folder.iterdir()] == ["0.jsonl"]
    written = [each.step for each in setpoint.Ledger.load(folder / "0.jsonl")]
    assert written == [each.step for each in loop.ledger] == [each.step for each in seen[:-1] if each is not None]
