"""Joining: ranks that have run out of batches inside `DistributedDataParallel.join()`, and go along with the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.algorithms.join import JoinHook

from setpoint.controller.plan import regrows
from setpoint.distributed import Ranks
from setpoint.errors import LoopError
from setpoint.loop.wrapper import Averaging


class Joining:
    """Lets the ranks of a wrapper count the same steps inside `join()`, in which some make fewer than others.

    Inside, each optimizer step ends with one small all-reduce, in which those that have made it say so, and those that
    have run out of batches learn of it: they count the step too. After a step that not all have made nothing is
    decided; a decision that was due waits until all are back. When the context ends, PyTorch broadcasts the weights of
    the rank that ran longest.

    Whoever is still training answers once for each forward pass whose gradients are averaged: at the optimizer
    step, or, if there was none (a `GradScaler` may skip it, gradients may be accumulated), before the next such pass.

    Args:
        averaging: the wrapper.
        ranks: its processes.
        missed: called on a rank that has run out of batches, for each step that the others have made.
    """

    def __init__(self, averaging: Averaging, ranks: Ranks, missed: Callable[[], None]) -> None:
        self._wrapper: Any = averaging.wrapper
        self._ranks, self._missed = ranks, missed
        self._owing = self._open = False
        self._passes: Any = None
        vars(self._wrapper)["join_hook"] = self._join_hook  # on the instance, which `join()` asks

    @property
    def inside(self) -> bool:
        """Whether a context is open."""
        return bool(self._open and self._wrapper._join_config.enable)

    def check(self, controller: object, by_hooks: bool) -> None:
        """Check before a step that the ranks can go along with each other.

        Args:
            controller: of the loop.
            by_hooks: whether its sensor reads frozen weights, which takes a message of its own.

        Raises:
            LoopError: in a context that was opened before the loop was attached; where what ranks send in a step
                depends on more than the wrapper.
        """
        if self._wrapper._join_config.enable and self._passes is None:
            raise LoopError(
                "DistributedDataParallel.join() was entered before attach: attach first. (If that context is over, "
                "`with model.join(enable=False): pass` tells the wrapper so)"
            )
        if not self.inside:
            return
        if regrows(controller):
            raise LoopError("inside join() units cannot come back: attach with PricedController(regrow=False)")
        if by_hooks:
            raise LoopError(
                "inside join() frozen outgoing weights cannot be read: give every rank as many batches, or leave their "
                "groups out (groups=...)"
            )
        if not self._owing:
            raise LoopError(
                "inside join() each optimizer step follows a forward pass whose gradients are averaged: this one does "
                "not"
            )

    def all_made(self, absent: bool) -> bool:
        """Whether all ranks have made the step that is just over; they all ask.

        Args:
            absent: whether this one has run out of batches; it has been told already.
        """
        if not self.inside:
            return True
        return not absent and self._exchange(stepped=True) == self._ranks.count

    def stop(self) -> None:
        """Leave the wrapper as it was; may be called again."""
        self._wrapper.__dict__.pop("join_hook", None)
        if self._passes is not None:
            self._passes.remove()
            self._passes = None

    def _join_hook(self, **settings: Any) -> JoinHook:
        """What PyTorch runs on a rank that has run out of batches, with our part added."""
        own = type(self._wrapper).join_hook(self._wrapper, **settings)
        self._open, self._owing = True, False
        if self._passes is None:
            self._passes = self._wrapper.register_forward_pre_hook(self._ahead_of_pass)
        return _Absent(own, self)

    def _ahead_of_pass(self, wrapper: Any, args: Any) -> None:
        if self.inside and torch.is_grad_enabled() and wrapper.require_backward_grad_sync:
            if self._owing:
                self._exchange(stepped=False)
            self._owing = True

    def _exchange(self, *, stepped: bool) -> int:
        """How many ranks have made the step of this pass: all tell each other."""
        self._owing = False
        told = torch.tensor([float(stepped)], dtype=torch.float64)
        return int(self._ranks.total(told).item())


class _Absent(JoinHook):
    """A rank that has run out of batches.

    Args:
        own: what PyTorch does there.
        joining: of the loop.
    """

    def __init__(self, own: JoinHook, joining: Joining) -> None:
        self._own, self._joining = own, joining

    def main_hook(self) -> None:
        """For each forward pass of the others."""
        self._own.main_hook()
        if self._joining._wrapper.require_forward_param_sync and self._joining._exchange(stepped=False):
            self._joining._missed()

    def post_hook(self, is_last_joiner: bool) -> None:
        """When all have run out."""
        self._joining._open = False
        self._own.post_hook(is_last_joiner)
