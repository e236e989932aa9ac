"""Joining: ranks inside `DistributedDataParallel.join()` that have run out of batches before the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import JoinHook
from torch.utils import _pytree as pytree

from setpoint.distributed import Ranks
from setpoint.errors import LoopError


class Joining:
    """Lets the ranks of a wrapper know, inside `join()`, whether all of them are there.

    Inside, a backward pass whose gradients are averaged ends with one small all-reduce that counts the ranks which made
    it; ranks that have run out of batches shadow it, as they shadow the wrapper's own. If not all ranks made the last
    pass of a step, no decision follows: it waits until all are back. Nor does one follow a step of fewer passes than
    usual, since a rank may make a short one with its last batches while others still gather gradients. When the context
    ends, which may be after the loop does, ranks that made fewer steps count those that they have missed, and PyTorch
    broadcasts the weights of the rank that ran longest.
    """

    def __init__(self, wrapper: Any, ranks: Ranks, steps: Callable[[], int], missed: Callable[[], None]) -> None:
        self._wrapper = wrapper
        self._ranks, self._steps, self._missed = ranks, steps, missed
        self._open = self._stopped = False
        self._all_there, self._passes, self._usual = True, 0, 0
        self._handle: Any = None
        vars(self._wrapper)["join_hook"] = self._join_hook  # on the instance, which `join()` asks

    @property
    def _enabled(self) -> bool:
        # The wrapper sends what `join()` needs; PyTorch leaves that on when a context has ended.
        return bool(self._wrapper._join_config.enable)

    @property
    def _inside(self) -> bool:
        """Whether a context may be open; on all ranks alike."""
        return self._open and self._enabled

    def check(self, *, regrows: bool, by_hooks: bool) -> None:
        if self._enabled and self._handle is None:
            raise LoopError(
                "DistributedDataParallel.join() was entered before attach: attach first. (If that context is over, "
                "`with model.join(enable=False): pass` tells the wrapper so)"
            )
        if not self._inside:
            return
        if regrows:
            raise LoopError("inside join() units cannot come back: attach with PricedController(regrow=False)")
        if by_hooks:
            raise LoopError(
                "inside join() a sensor cannot read by hooks, as it does frozen outgoing weights: give every rank as "
                "many batches, use another sensor, or leave these groups out (groups=...)"
            )
        if self._wrapper.static_graph:
            raise LoopError("inside join() a wrapper with static_graph=True cannot follow a cut: leave that out")

    def all_made(self) -> bool:
        """Whether all ranks have made the step that is just over."""
        if not self._inside:
            return True
        passes, self._passes = self._passes, 0
        self._usual = self._usual or passes
        return self._all_there and passes == self._usual > 0

    def stop(self) -> None:
        """Leave the wrapper as it was, as soon as no rank waits for this one any more; may be called again."""
        self._stopped = True
        if not self._inside:
            self._remove()

    def _remove(self) -> None:
        vars(self._wrapper).pop("join_hook", None)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _join_hook(self, **settings: Any) -> JoinHook:
        own: JoinHook = type(self._wrapper).join_hook(self._wrapper, **settings)
        if self._stopped:  # the context before was left by an exception
            self._remove()
            return own
        self._open, self._all_there, self._passes, self._usual = True, True, 0, 0
        if self._handle is None:
            self._handle = self._wrapper.register_forward_hook(self._after_forward)
        return _Absent(own, self._missing, self._closed)

    def _after_forward(self, wrapper: Any, args: Any, output: Any) -> None:
        if not (self._inside and torch.is_grad_enabled() and wrapper.require_backward_grad_sync):
            return
        queued = False

        def begun(gradient: Tensor) -> None:
            nonlocal queued
            if not queued:
                queued = True
                # A callback of the engine runs when the whole backward pass is over; a hook runs when it begins.
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(self._passed)

        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(begun)  # type: ignore[no-untyped-call]

    def _passed(self) -> None:
        """At the end of a backward pass: who else has made it?"""
        self._all_there = self._count(1) == self._ranks.count
        self._passes += 1

    def _count(self, own: int) -> int:
        return round(self._ranks.total(torch.tensor([own], dtype=torch.float64)).item())

    def _missing(self) -> None:
        """The others have made a forward pass, and go on to a backward pass without this rank."""
        if self._wrapper.require_forward_param_sync:  # by now: whether they average the gradients
            self._count(0)

    def _closed(self) -> None:
        self._open = False
        behind = max(map(int, self._ranks.all_gather_text(str(self._steps())))) - self._steps()
        if self._stopped:
            self._remove()
            return
        for _ in range(behind):
            self._missed()


class _Absent(JoinHook):
    """A rank that has run out of batches: what PyTorch does there, and our part."""

    def __init__(self, own: JoinHook, missing: Callable[[], None], closed: Callable[[], None]) -> None:
        self._own, self._missing, self._closed = own, missing, closed

    def main_hook(self) -> None:
        self._own.main_hook()
        self._missing()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._own.post_hook(is_last_joiner)
        self._closed()
