"""A model that one process has to itself, and what a loop asks of any host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.shrink import named_tensors
from setpoint.distributed import Ranks
from setpoint.groups.group import Group
from setpoint.host.compiled import Recompiled, Recompiling
from setpoint.host.refuse import check_unsharded, check_unwrapped
from setpoint.host.together import SharedLosses, shared_reading, together
from setpoint.sensor.reading import Reading

Agreed = Callable[[], None]


class Local:
    """A `Host` of one process: the model, and what is to follow when its sizes change."""

    wrapper: str = ""
    """What is around the model, for messages; empty in one process."""
    mesh: Any = None
    """The ranks that the weights are sharded over; None where each has all of them."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[nn.Module], *, compiled: bool = False
    ) -> None:
        self.model, self.optimizers, self.copies = model, tuple(optimizers), tuple(copies)
        self.compiled = compiled
        self._code = Recompiling(lambda seconds, count: None, 0)  # until a loop begins

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        return Ranks()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @property
    def alone(self) -> bool:
        """Whether one process has all of the model and its gradients."""
        return self.ranks.count == 1

    def together(self, what: str) -> AbstractContextManager[dict[str, Any]]:
        """What is done inside is done by all ranks, with the same outcome, or raises on all of them."""
        return together(self.ranks, what) if self.ranks.count > 1 else nullcontext({})

    def unsharded(self) -> AbstractContextManager[None]:
        """Inside, model and copies are plain and whole on each rank."""
        return nullcontext()

    def mean(self, read: Callable[[], Reading], losses: SharedLosses, step: int) -> Reading:
        """The reading that all ranks decide on; the losses are then the means over ranks."""
        return shared_reading(self.ranks, read, losses, step) if self.ranks.count > 1 else read()

    @contextmanager
    def resizable(self, what: str, groups: Iterable[Group]) -> Iterator[Agreed]:
        """Inside, tensors of these groups may change their shape, on all ranks alike; as `Host` says."""
        changing = tuple(groups)

        def agree() -> None:
            with self.together(what):
                pass

        with self.together(what) as facts:
            with self._open(changing, agree) as agreed:
                yield agreed
            self._code.follow(self.model, changing)
            facts["shapes"] = [tuple(tensor.shape) for tensor in named_tensors(self.model).values()]

    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> AbstractContextManager[Agreed]:
        """Inside, these groups' tensors lie here whole; at the end what is around the model follows."""
        return nullcontext(agree)

    def begin(
        self, *, steps: Callable[[], int], missed: Callable[[], None], recompiled: Recompiled, num_groups: int
    ) -> None:
        """A loop begins."""
        self._code = Recompiling(recompiled, num_groups)

    def before_step(self, *, first: bool, regrows: bool, by_hooks: bool) -> None:
        """Check that the set-up is the one that was given."""
        if first:
            check_unsharded(self.model)
            check_unwrapped(self.model)

    def complete(self) -> bool:
        """Whether all ranks have made the step that is just over; asked once after each."""
        return True

    def stop(self) -> None:
        """Leave everything around the model as it was; may be called again."""
        self._code.stop()
