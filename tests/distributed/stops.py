"""Checks that ranks stop together, with an error that says why; each is a function that every rank runs."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as Parallel

import setpoint
from distributed.training import assert_same_everywhere, attached, build, caught, everywhere, share, train
from loop.test_regrowth import Scripted
from setpoint.actuator import shrink as shrink_module
from setpoint.errors import CostError, GroupError, LoopError, OptimizerError, RankError
from setpoint.weights.masking import Masking


def disagreement() -> None:
    """Ranks that do not agree, or of which one fails, all raise, and can still speak with each other."""
    rank = dist.get_rank()

    def all_caught(error: type[BaseException], text: str, do: Callable[[], Any]) -> None:
        caught(error, text, do)
        assert everywhere(rank) == [0, 1]

    def start(controller: Any, **settings: Any) -> tuple[Any, Any, setpoint.Loop]:
        wrapper = Parallel(build())
        return wrapper, *attached(wrapper, controller, share(0)[0], **settings)

    never = Scripted({}, regrow=False)
    budget = setpoint.Budget.fraction(0.5 + 0.1 * rank, of="flops")
    all_caught(RankError, "rank 1 in budgets", lambda: start(never, budget=budget))
    bad = {"groups": ()} if rank else {}
    error, text = (GroupError, "nothing") if rank else (RankError, "attach failed on rank 1 with Group")
    all_caught(error, text, lambda: start(never, **bad))
    apart = start(Scripted({3: {"up": [1 + rank]}}, regrow=False))
    all_caught(RankError, "rank 1 in plan", lambda: train(*apart, range(4), share))
    assert apart[2].widths["up"] == 24
    failing = start(Scripted({3: {"up": [1, 4]}, 6: {"up": [0]}}, {9: {"up": [1]}}))
    train(*failing, range(5), share)
    swap = shrink_module.swap

    def no_memory(*args: Any) -> None:
        raise MemoryError("of the host")

    for step in (6, 9):  # a cut, and a return
        shrink_module.swap = no_memory if rank else swap
        text = "host" if rank else "failed on rank 1 with MemoryError: of the host"
        steps = range(step - 1, step)
        all_caught(MemoryError if rank else RankError, text, lambda steps=steps: train(*failing, steps, share))
        shrink_module.swap = swap
        assert failing[2].widths["up"] == failing[0].module.up.out_features
        failing[1].zero_grad()
        train(*failing, range(step, step + 2), share)  # on all ranks it is as it was, and goes on
        assert_same_everywhere(failing[0].module, failing[1])
    assert failing[2].control.actuator.reserve.resting["up"].nonzero()[0].tolist() == [1, 4]


def late() -> None:
    """A rank that does not come is waited for as long as its process group says, and no longer."""
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    wrapper = Parallel(build(), process_group=impatient)
    optimizer, loop = attached(wrapper, Scripted({2: {"up": [1]}}, regrow=False), share(0)[0])
    if dist.get_rank() == 1:
        optimizer.register_step_pre_hook(lambda *args: time.sleep(3) if loop.step == 1 else None)
    words = "a rank was lost at the reading after step 2, or has not come to it in time"
    caught(RankError, words, lambda: train(wrapper, optimizer, loop, range(3), share))


def lost() -> None:
    """When a process is gone, the others stop with an error that says so."""
    wrapper = Parallel(build())
    optimizer, loop = attached(wrapper, Scripted({3: {"up": [1]}}, regrow=False), share(0)[0])
    if dist.get_rank() == 1:
        optimizer.register_step_pre_hook(lambda *args: os._exit(0) if loop.step == 2 else None)
    words = "a rank was lost at the reading after step 3"
    caught(RankError, words, lambda: train(wrapper, optimizer, loop, range(4), share))


def refusals() -> None:
    """What cannot follow a cut is refused by name, before or at the first step."""
    from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward  # which warns at import

    never, x = Scripted({}, regrow=False), share(0)[0]

    def refused(text: str, model: nn.Module, error: type[Exception] = LoopError, **settings: Any) -> None:
        caught(error, text, lambda: attached(model, never, x, **settings))

    wrapper = Parallel(build())
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
    refused("single weights", Parallel(build()), actuator=Masking())
    part = build()
    part.head = Parallel(part.head)
    refused("wrap the whole model", part)
    shared = Parallel(build())
    zero = ZeroRedundancyOptimizer(shared.parameters(), torch.optim.SGD, lr=0.1)
    refused("ZeroRedundancyOptimizer", shared, OptimizerError, optimizer=zero)
    if dist.get_world_size() > 1:
        joules = setpoint.Budget.fraction(0.5, of="energy", per="run", watts=10.0)
        words = "'energy' for the whole run is not available on several ranks"
        refused(words, Parallel(build()), CostError, budget=joules)

    def stops(text: str, model: nn.Module, optimizer: Any, loop: Any) -> None:
        caught(LoopError, text, lambda: train(model, optimizer, loop, range(1), share))

    later = build()
    optimizer, loop = attached(later, never, x)
    stops("wrap the model first", Parallel(later), optimizer, loop)
    before = build()
    wrapper = Parallel(before)
    optimizer, loop = attached(before, never, x)
    stops("give attach the wrapper", wrapper, optimizer, loop)
    joined = Parallel(build())
    optimizer, loop = attached(joined, never, x)
    with Join([joined]):
        stops("join() of DistributedDataParallel is not supported", joined, optimizer, loop)


@contextmanager
def _late(threads: Iterable[str]) -> Iterator[None]:
    """Those that work for a process group run only when nothing else wants the CPU that all share inside."""
    before = os.sched_getaffinity(0)
    one = {sorted(before)[dist.get_rank() % len(before)]}
    for thread in threads:
        os.sched_setaffinity(int(thread), one)
        if "runloop" in Path(f"/proc/self/task/{thread}/comm").read_text():
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(0, one)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ending() -> None:
    """No thread of the process group holds a message when a step is over, nor anybody a reducer that was replaced.

    A thread that still holds one takes Python's lock to drop it, and aborts the process if Python has ended by then.
    """
    tasks = Path("/proc/self/task")
    others = {each.name for each in tasks.glob("*")}
    own = dist.new_group()
    wrapper = Parallel(build(), process_group=own)
    cuts = {step: {"up": [step]} for step in range(1, 5)}
    optimizer, loop = attached(wrapper, Scripted(cuts, regrow=False), share(0)[0])
    replaced = [weakref.ref(part) for part in (wrapper.reducer, wrapper.logger)]
    left: list[torch.Tensor] = []
    with _late({each.name for each in tasks.glob("*")} - others) if others else nullcontext():
        for step in range(4):
            train(wrapper, optimizer, loop, range(step, step + 1), share)
            alive = [each for each in gc.get_objects() if type(each) is torch.Tensor]
            left += [each for each in alive if each.dtype is torch.uint8 and each.shape == (1024,)]
    loop.finish()
    assert loop.widths["up"] == 20
    assert not left, f"{len(left)} tensors of messages"
    assert [part() for part in replaced] == [None, None]
