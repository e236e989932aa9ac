"""A rehearsal: the live forward on copies of a model whose tensors have shapes but no data."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from setpoint.groups.export import Example, computed, inputs_of, tensors_of
from setpoint.groups.rng import preserved_rng_state


class Rehearsal:
    """Forwards of copies of a model, on the first of meta, fake and real tensors that do; the model is not touched."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.model, self.example = model, example
        self._kinds: tuple[Any, ...] = (torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True), None)
        self._enough: dict[bool, Any] = {}
        self._stand_ins: dict[Any, dict[int, Any]] = {}

    def run(
        self, prepare: Callable[[nn.Module], None] = lambda twin: None, *, other_mode: bool = False
    ) -> tuple[torch.Size, ...]:
        """Shapes of what a copy returns, or what its forward raises; `prepare` gets each copy before it runs."""
        kinds = (self._enough[other_mode],) if other_mode in self._enough else self._kinds
        with _quiet():
            for kind in kinds:
                try:
                    shapes = self._run(kind, prepare, other_mode)
                except Exception:
                    if kind is kinds[-1]:
                        raise
                else:
                    self._enough[other_mode] = kind
                    return shapes
        raise AssertionError("the last kind of tensors either runs or raises")

    def _run(self, kind: Any, prepare: Callable[[nn.Module], None], other_mode: bool) -> tuple[torch.Size, ...]:
        # The memo makes deepcopy take the stand-ins for the tensors, so no data is copied.
        twin = copy.deepcopy(self.model, {**self._tensors(kind), **_hook_tables(self.model)})
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: _stand_in(x, kind), inputs_of(self.example))
        with kind or nullcontext(), preserved_rng_state(self.model):
            if other_mode:
                twin.train(not self.model.training)
            prepare(twin)
            return tuple(tensor.shape for tensor in tensors_of(twin(*args, **kwargs)))

    def _tensors(self, kind: Any) -> dict[int, Any]:
        """Stand-ins for the tensors of a copy, by id of the original; without data they serve all copies."""
        if kind in self._stand_ins:
            return self._stand_ins[kind]
        result = {key: _stand_in(tensor, kind) for key, tensor in computed(self.model).items()}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in result:
                new = _stand_in(tensor, kind)
                trained = isinstance(tensor, nn.Parameter)
                result[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if trained else new
        if kind is not None:
            self._stand_ins[kind] = result
        return result


def _stand_in(tensor: torch.Tensor, kind: Any) -> torch.Tensor:
    if kind is None:
        return tensor.detach().clone()
    if isinstance(kind, torch.device):
        return tensor.detach().to(kind)
    result: torch.Tensor = kind.from_tensor(tensor.detach())
    return result


def _hook_tables(model: nn.Module) -> dict[int, Any]:
    """The copy's tables of hooks, by id: without the user's, but with torch's, which compute weights (weight norm)."""
    return {
        id(table): OrderedDict(
            (k, hook) for k, hook in table.items() if type(hook).__module__.startswith("torch.nn.utils")
        )
        for module in model.modules()
        for name, table in vars(module).items()
        if isinstance(table, OrderedDict) and "_hooks" in name
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what fake tensors log about a failing forward: the next kind of tensors may do."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
