"""A model that one process has to itself, and what a loop asks of any host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import Ranks
from setpoint.groups.group import Group
from setpoint.host.agreement import SharedLosses, on_all_ranks, shared_reading
from setpoint.host.compiled import DynamicWidths
from setpoint.host.copies import Copies
from setpoint.host.guards import Trained
from setpoint.host.refuse import check_unsharded, watch_for_wrapper
from setpoint.sensor.reading import Reading

Agreed = Callable[[], None]


class Local:
    """A `Host` of one process: the model, and what is to follow when its sizes change."""

    wrapped: bool = False
    mesh: Any = None

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[Any], *, compiled: bool = False
    ) -> None:
        self.model, self.optimizers, self.averages = model, tuple(optimizers), Copies(model, copies)
        self.compiled = compiled
        self._widths, self._priced = DynamicWidths(()), Trained(model)  # until a loop begins
        self._stop_watching: Callable[[], None] = lambda: None

    @property
    def copies(self) -> tuple[nn.Module, ...]:
        return tuple(part.module() for part in self.averages.parts)

    @property
    def ranks(self) -> Ranks:
        return Ranks()

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def single_process(self) -> bool:
        return self.ranks.count == 1

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        return on_all_ranks(self.ranks, what) if self.ranks.count > 1 else nullcontext({})

    def unsharded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mean(self, read: Callable[[], Reading], losses: SharedLosses, step: int) -> Reading:
        return shared_reading(self.ranks, read, losses, step) if self.ranks.count > 1 else read()

    @contextmanager
    def resizable(self, what: str, groups: Iterable[Group]) -> Iterator[Agreed]:
        """Inside, tensors of these groups may change their shape, on all ranks; as `Host` says."""
        changing = tuple(groups)

        def agree() -> None:
            with self.together(what):
                pass

        with self.together(what) as facts:
            with self._open(changing, agree) as agreed:
                yield agreed
            self._widths.follow(self.model)
            # Gradients of different shapes would be averaged without an error, and wrongly.
            facts["shapes"] = [tuple(tensor.shape) for tensor in named_tensors(self.model).values()]

    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> AbstractContextManager[Agreed]:
        """Inside, the tensors of these groups are unsharded; at the end what is around the model follows."""
        return nullcontext(agree)

    def begin(self, *, steps: Callable[[], int], missed: Callable[[], None], groups: tuple[Group, ...]) -> None:
        self._widths, self._priced = DynamicWidths(groups), Trained(self.model)
        if not self.wrapped:
            self._stop_watching = watch_for_wrapper(self.model)

    def before_step(self, *, first: bool, regrows: bool, by_hooks: bool) -> None:
        """Check that the set-up is the one that was given."""
        if first:  # a look at all modules, too slow for every step
            check_unsharded(self.model)
        self._priced.check()

    def complete(self) -> bool:
        return True

    def stop(self) -> None:
        self._stop_watching()
        self._widths.stop()
