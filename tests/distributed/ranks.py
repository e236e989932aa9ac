"""Checks that several processes make together; each is a function that every rank runs.

python tests/distributed/ranks.py twin:2 twin:4 ...     what to check, and on how many ranks
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as Parallel
from torch.optim.swa_utils import AveragedModel

import setpoint
from setpoint.actuator import shrink as shrink_module
from setpoint.actuator.mask import mask
from setpoint.controller.reference import Reference

sys.path.append(str(Path(__file__).parents[1]))
from loop.test_regrowth import Net, Scripted

TIMEOUT_S, LIMIT_S = 30, 300
STEPS = 40
DROP = {3: {"inner.0": [1, 4, 9], "stem": [0, 3]}, 5: {"inner.0": [0]}}


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


def regrowing(num_cuts: int = 14) -> setpoint.PricedController:
    return setpoint.PricedController(Reference(0.0, 0.7, 0.8, num_cuts=num_cuts), regrow=True, dwell=1, min_density=0.0)


def attached(model: nn.Module, controller: Any, x: Tensor, **options: Any) -> tuple[Any, setpoint.Loop]:
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    budget = options.pop("budget", setpoint.Budget.fraction(0.5, of="flops"))
    settings = {"example": (x,), "total_steps": STEPS, "controller": controller, "verify": False, **options}
    return optimizer, setpoint.attach(model, optimizer, budget, **settings)


def train(
    model: Any, optimizer: Any, loop: Any, steps: range, data: Callable[[int], Any], parts: int = 1
) -> list[float]:
    """Losses of the user's own loop; with several parts it accumulates gradients."""
    losses = []
    for step in steps:
        x, y = data(step)
        losses.append(0.0)
        for number, (some, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
            unsynchronised = isinstance(model, Parallel) and number < parts
            with model.no_sync() if unsynchronised else nothing():
                loss = nn.functional.cross_entropy(model(some), labels) / parts
                loss.backward()
            losses[-1] += loss.item()
        if loop is not None:
            loop.observe(loss=losses[-1])
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
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


# The checks.


def twin() -> None:
    """Losses, plans and weights are those of one process on the same global batches, over cuts and returns."""
    setpoint.loop.regrowth._PROBE_SHARE = 1.0
    steps, cuts = (STEPS, 14) if dist.get_world_size() == 2 else (20, 7)
    model = build()
    wrapper = Parallel(model)
    optimizer, loop = attached(wrapper, regrowing(cuts), share(0)[0], total_steps=steps)
    losses = train(wrapper, optimizer, loop, range(steps), share, parts=2)
    summary = loop.finish()
    assert_same_everywhere(model, optimizer)
    assert all(each == story(loop) for each in everywhere(story(loop)))
    assert summary.landed and summary.resizes >= 0.7 * cuts and summary.regrown_units > 0, summary
    mean_losses = np.mean(everywhere(losses), 0)
    if dist.get_rank() > 0:
        return
    alone = build()
    of_alone, single = attached(alone, regrowing(cuts), batch(0)[0], total_steps=steps)
    np.testing.assert_allclose(mean_losses, train(alone, of_alone, single, range(steps), batch), rtol=1e-9)
    np.testing.assert_allclose(loop._watch._losses, single._watch._losses, rtol=1e-9)
    single.finish()
    assert story(single) == story(loop)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    for ours, theirs in zip(loop.ledger, single.ledger, strict=True):
        assert ours.loss is not None and abs(ours.loss - theirs.loss) < 1e-9 * abs(theirs.loss)
        for name, values in theirs.gain.items():
            np.testing.assert_allclose(ours.gain[name], values, rtol=1e-6)


def goals() -> None:
    """What decides by the observed loss, or learns while it decides, makes the plans that it makes in one process."""

    def followed(goal: Any, controller: Any, steps: int, called: Any, data: Callable[[int], Any]) -> list[Any]:
        optimizer, loop = attached(called, controller, data(0)[0], total_steps=steps, budget=goal)
        train(called, optimizer, loop, range(steps), data)
        assert loop.finish().resizes > 2
        return story(loop)

    half = setpoint.Budget.fraction(0.5, of="flops")
    for goal, controller, steps in ((setpoint.Tolerance(0.5), None, 120), (half, setpoint.GatedController(), 40)):
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


def vanishing() -> None:
    """A branch that vanishes as a whole, and comes back in part, leaves the others averaged, as in one process."""
    setpoint.loop.regrowth._PROBE_SHARE = 1.0
    every, back = {3: {"inner.0": list(range(16))}}, {6: {"inner.0": [2, 7]}}
    model = build(Still)
    wrapper = Parallel(model)
    optimizer, loop = attached(wrapper, Scripted(every, back), share(0)[0])
    losses = train(wrapper, optimizer, loop, range(5), share)
    assert loop.widths["inner.0"] == 0
    losses += train(wrapper, optimizer, loop, range(5, 9), share)
    assert loop.widths["inner.0"] == 2
    assert_same_everywhere(model, optimizer)
    alone = build(Still)
    of_alone, single = attached(alone, Scripted(every, back), batch(0)[0])
    np.testing.assert_allclose(
        np.mean(everywhere(losses), 0), train(alone, of_alone, single, range(9), batch), rtol=1e-9
    )


class Still(Net):
    """The net with batch norm that does not look at the batch."""

    def train(self, mode: bool = True) -> Still:
        super().train(mode)
        for each in (self.norm, self.inner[1]):
            each.eval()
        return self


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
    readings = [each._parts.sensor.read(each._sensor_state, each.groups, 8).saliency for each in (loop, single)]
    for name, values in readings[0].items():
        np.testing.assert_allclose(values, readings[1][name], rtol=1e-7)


def resume() -> None:
    """A run on several ranks goes on bit for bit from one file, in freshly built wrappers."""
    setpoint.loop.regrowth._PROBE_SHARE = 1.0

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
    setpoint.load_run(folder / "run", **again)
    rest = train(*called, range(18, STEPS), share)
    assert train(*(again[name] for name in ("model", "optimizer", "loop")), range(18, STEPS), share) == rest
    assert story(again["loop"]) == story(whole["loop"]) and len(story(whole["loop"])) > 10


def disagreement() -> None:
    """Ranks that do not agree, or of which one fails, all raise, and can still speak with each other."""
    rank = dist.get_rank()

    def caught(error: type[BaseException], text: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(f"no {error.__name__}: {text}")
        assert everywhere(rank) == [0, 1]

    def start(controller: Any, **settings: Any) -> tuple[Any, Any, setpoint.Loop]:
        wrapper = Parallel(build())
        return wrapper, *attached(wrapper, controller, share(0)[0], **settings)

    never = Scripted({}, regrow=False)
    budget = setpoint.Budget.fraction(0.5 + 0.1 * rank, of="flops")
    caught(setpoint.RankError, "rank 1 in budgets", lambda: start(never, budget=budget))
    bad = {"groups": ()} if rank else {}
    error, text = (
        (setpoint.GroupError, "nothing") if rank else (setpoint.RankError, "attach failed on rank 1 with Group")
    )
    caught(error, text, lambda: start(never, **bad))
    apart = start(Scripted({3: {"up": [1 + rank]}}, regrow=False))
    caught(setpoint.RankError, "rank 1 in plan", lambda: train(*apart, range(4), share))
    assert apart[2].widths["up"] == 24
    failing = start(Scripted({3: {"up": [1, 4]}, 6: {"up": [0]}}, {9: {"up": [1]}}))
    train(*failing, range(5), share)
    swap = shrink_module.swap

    def no_memory(*args: Any) -> None:
        raise MemoryError("of the host")

    for step in (6, 9):  # a cut, and a return
        shrink_module.swap = no_memory if rank else swap
        text = "host" if rank else f"the cut after step {step} failed on rank 1 with MemoryError: of the host"
        steps = range(step - 1, step)
        caught(MemoryError if rank else setpoint.RankError, text, lambda steps=steps: train(*failing, steps, share))
        shrink_module.swap = swap
        assert failing[2].widths["up"] == failing[0].module.up.out_features == 22
        failing[1].zero_grad()
        train(*failing, range(step, step + 2), share)  # on all ranks it is as it was, and goes on
        assert_same_everywhere(failing[0].module, failing[1])
    assert failing[2]._regrowth.reserve.resting["up"].nonzero()[0].tolist() == [1, 4]


def late() -> None:
    """A rank that does not come is waited for as long as its process group says, and no longer."""
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    wrapper = Parallel(build(), process_group=impatient)
    optimizer, loop = attached(wrapper, Scripted({2: {"up": [1]}}, regrow=False), share(0)[0])
    if dist.get_rank() == 1:
        optimizer.register_step_pre_hook(lambda *args: time.sleep(3) if loop.step == 1 else None)
    try:
        train(wrapper, optimizer, loop, range(3), share)
    except setpoint.RankError as error:
        assert "a rank was lost at the reading after step 2, or has not come to it in time" in str(error)
    else:
        raise AssertionError("nobody was missed")


def lost() -> None:
    """When a process is gone, the others stop with an error that says so."""
    wrapper = Parallel(build())
    optimizer, loop = attached(wrapper, Scripted({3: {"up": [1]}}, regrow=False), share(0)[0])
    if dist.get_rank() == 1:
        optimizer.register_step_pre_hook(lambda *args: os._exit(0) if loop.step == 2 else None)
    try:
        train(wrapper, optimizer, loop, range(4), share)
    except setpoint.RankError as error:
        assert "a rank was lost at the reading after step 3" in str(error)
    else:
        raise AssertionError("nothing was noticed")


def refusals() -> None:
    """What cannot follow a cut is refused by name, before or at the first step."""
    from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward  # which warns at import

    never, x = Scripted({}, regrow=False), share(0)[0]

    def refused(text: str, model: nn.Module, error: type[Exception] = setpoint.LoopError, **settings: Any) -> None:
        try:
            attached(model, never, x, **settings)
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(text)

    inner = build()
    wrapper = Parallel(inner)
    refused("give attach the wrapper", inner)
    refused("give attach the wrapper", inner.head)
    squared = PowerSGDState(None, matrix_approximation_rank=1)
    wrapper.register_comm_hook(squared, powerSGD_hook)
    refused("PowerSGD", wrapper)
    delayed = build()
    hooked = {"param_to_hook_all_reduce": delayed.head.weight}
    delaying = [("head.bias", delayed.head.bias)]
    refused("delay_all_reduce", Parallel(delayed, delay_all_reduce_named_params=delaying, **hooked))
    behind = build()
    _apply_optimizer_in_backward(torch.optim.SGD, behind.head.parameters(), {"lr": 0.1})
    refused("optimizers in the backward pass", Parallel(behind))
    part = build()
    part.head = Parallel(part.head)
    refused("wrap the whole model", part)
    sharded = build()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    refused("fully_shard (FSDP2)", sharded)
    shared = Parallel(build())
    zero = ZeroRedundancyOptimizer(shared.parameters(), torch.optim.SGD, lr=0.1)
    refused("ZeroRedundancyOptimizer", shared, setpoint.OptimizerError, optimizer=zero)
    if dist.get_world_size() > 1:
        memory = setpoint.Budget.fraction(0.5, of="memory")
        refused("'memory' is not available on several ranks", Parallel(build()), setpoint.CostError, budget=memory)

    def stops(text: str, model: nn.Module, optimizer: Any, loop: Any) -> None:
        try:
            train(model, optimizer, loop, range(1), share)
        except setpoint.LoopError as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(text)

    later = build()
    optimizer, loop = attached(later, never, x)
    stops("wrap the model first", Parallel(later), optimizer, loop)
    joined = Parallel(build())
    optimizer, loop = attached(joined, never, x)
    context = Join([joined])
    stops("join()", joined, optimizer, loop)
    del context


# How they are run.


def one_rank(names: list[str], rank: int, count: int, store: str) -> None:
    """All checks on one rank, in one group, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT_S)
    )
    for name in names:
        globals()[name]()
        if name != "lost":
            dist.barrier()
        if rank == 0:
            print(f"{name}:{count} came through", flush=True)


def in_own_process(*arguments: Any) -> None:
    """One rank in a process of its own, which ends whatever happens."""
    try:
        one_rank(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def run(count: int, names: list[str]) -> None:
    """Let so many ranks make these checks; none of them is left behind."""
    fork = multiprocessing.get_context("fork")  # what this process has imported need not be imported again
    with tempfile.TemporaryDirectory() as folder:
        made = [fork.Process(target=in_own_process, args=(names, rank, count, f"{folder}/s")) for rank in range(count)]
        for each in made:
            each.start()
        until = time.monotonic() + LIMIT_S
        for each in made:
            each.join(max(0.0, until - time.monotonic()))
            each.kill()


if __name__ == "__main__":
    setpoint.find_groups(build(), (batch(0)[0],))  # imports the rest; no gradients, which would forbid to fork
    asked = [each.split(":") for each in sys.argv[1:]]
    for ranks in sorted({int(count) for _, count in asked}):
        run(ranks, [name for name, count in asked if int(count) == ranks])
