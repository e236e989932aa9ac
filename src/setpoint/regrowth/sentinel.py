"""Sentinels: a few parameters that show how gradients change between the backward pass and the step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.distributed import Ranks, is_sharded_tensor, local, unsharded_tensor

_COUNT = 3
"""A single parameter might take no part in a step."""


def graph_task() -> int:
    """Number of the running backward pass, as `torch.autograd.graph` counts them; -1 outside of any."""
    number: int = torch._C._current_graph_task_id()
    return number


class Sentinels:
    """The smallest trained parameters: their gradients as they arrive, compared with those before the step.

    Gradients that are clipped, unscaled or averaged in between have another scale by then. With `g` the gradients as
    they arrived and `h` those before the step, each in one row, it is `(g . h) / (g . g)`.

    Backward passes give gradients of a sharded parameter to the unsharded tensor that its module holds from the forward
    pass on, which is looked for in forward passes of `model`. There, discarded gradients look like others.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], model: nn.Module | None = None) -> None:
        self._model = model
        trained = [each for each in parameters if each.requires_grad and each.numel() and not each.is_complex()]
        self.parameters = sorted(trained, key=lambda parameter: parameter.numel())[:_COUNT]
        self.arrived: dict[int, Tensor] = {}
        """Sums of the gradients that arrived, by identity of the parameter."""
        self._arriving: dict[int, Tensor] = {}
        self._tasks: dict[int, set[int]] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._handles: list[Any] = []

    def start(self) -> None:
        """Watch all of them; sharded ones only where a model was given."""
        for parameter in self.parameters:
            if not is_sharded_tensor(parameter):
                self.watch(parameter, parameter)
        modules = () if self._model is None else self._model.modules()
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if is_sharded_tensor(parameter) and any(parameter is each for each in self.parameters):
                    self._handles.append(module.register_forward_pre_hook(self._looking_for(parameter, name)))

    def _looking_for(self, parameter: nn.Parameter, name: str) -> Callable[[nn.Module, Any], None]:
        """A pre-forward hook that watches the unsharded tensor in the place of a parameter."""
        me = weakref.ref(self)

        def look(module: nn.Module, args: Any) -> None:
            sentinels, live = me(), module._parameters.get(name)
            if sentinels is not None and live is not None and not is_sharded_tensor(live) and live.requires_grad:
                sentinels.watch(parameter, live)

        return look

    def watch(self, parameter: nn.Parameter, leaf: Tensor) -> None:
        """Record the gradients of `leaf`: a sentinel, or the unsharded tensor in its place in the forward pass."""
        before = self._watched.get(id(leaf))
        if before is not None and before() is leaf:
            return
        self._watched[id(leaf)] = weakref.ref(leaf)
        # Weak: the hooks live as long as the leaf, and must not keep the sentinels alive.
        me, number = weakref.ref(self), id(parameter)

        def arriving(gradient: Tensor) -> None:
            sentinels = me()
            if sentinels is not None:
                # This hook runs before accumulation: no gradient here means that earlier ones were discarded.
                if leaf is parameter and not _has_gradient(parameter):
                    sentinels.arrived.pop(number, None)
                    sentinels._tasks.pop(number, None)
                sentinels._arriving[number] = gradient.detach().to(torch.float64, copy=True)  # clipping works in place

        def accumulated(_: Tensor) -> None:
            """The gradient was accumulated, which `torch.autograd.grad` does not do."""
            sentinels = me()
            if sentinels is not None and number in sentinels._arriving:
                arrived, before = sentinels._arriving.pop(number), sentinels.arrived.get(number)
                sentinels.arrived[number] = arrived if before is None else before + arrived
                sentinels._tasks[number] = sentinels._tasks.get(number, set()) | {graph_task()}

        for handle in (
            leaf.register_hook(arriving),  # type: ignore[no-untyped-call]
            leaf.register_post_accumulate_grad_hook(accumulated),  # type: ignore[no-untyped-call]
        ):
            self._handles.append(handle)
            weakref.finalize(self, handle.remove)  # where nobody calls `stop`

    def stop(self) -> None:
        """Stop watching; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], {}

    def forget(self) -> None:
        """Drop what arrived: it belongs to another step."""
        self.arrived, self._tasks = {}, {}

    @property
    def tasks(self) -> set[int]:
        """Backward passes whose gradients are still there."""
        there = [self._tasks.get(id(p), set()) for p in self.parameters if p.grad is not None]
        return set[int]().union(*there)

    def any_gradient(self) -> bool:
        """Whether any may have a gradient that is not zero: shards get theirs only when ranks average theirs."""
        return any(is_sharded_tensor(each) or _has_gradient(each) for each in self.parameters)

    def left(self) -> dict[int, Tensor]:
        """Of the gradients that arrived, those of parameters that still have one; zero where it was set to zero."""
        found = {}
        for each in self.parameters:
            arrived = self.arrived.get(id(each))
            if arrived is not None and is_sharded_tensor(each):
                found[id(each)] = arrived
            elif arrived is not None and each.grad is not None:
                found[id(each)] = torch.where(each.grad.any(), arrived, 0.0)  # no host sync
        return found

    def gradients(self) -> Tensor | None:
        """What `left` returns as one row, 0 where a parameter has none; None if nothing is left."""
        left = self.left()
        return self._row([left.get(id(each)) for each in self.parameters]) if left else None

    def nothing(self) -> Tensor:
        """A row of zeros of the same length."""
        return self._row([None for _ in self.parameters])

    def factor(self, arrived: Tensor | None) -> Tensor | None:
        """Scale of the present gradients over `arrived`, a row of `gradients` or its mean over ranks; None for None."""
        if arrived is None:
            return None
        now = self._row([None if each.grad is None else unsharded_tensor(each.grad) for each in self.parameters])
        return (arrived * now).sum() / arrived.square().sum()

    def in_scale(self, read: Tensor, ranks: Ranks) -> Tensor:
        """What was read in the backward pass, in the scale of the gradients that are there now.

        Several ranks call this together, and get the mean of what they read. Without a gradient on any of them, NaN: no
        rank could tell by itself, so the step is left out.
        """
        arrived = self.gradients()
        if ranks.count > 1:
            arrived = self.nothing() if arrived is None else arrived
            mean = ranks.total(torch.cat([read.double(), arrived])) / ranks.count
            read, arrived = mean[: len(read)].to(read), mean[len(read) :]
        factor = self.factor(arrived)
        return torch.zeros_like(read) if factor is None else read * factor.to(read)

    def _row(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """A gradient, or zeros, for each parameter as one row, on the device of the first parameter."""
        device = local(self.parameters[0].detach()).device if self.parameters else None
        row = [torch.zeros(0, dtype=torch.float64, device=device)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            values = torch.zeros(parameter.numel()) if gradient is None else gradient.detach().flatten()
            row.append(values.to(device, torch.float64))
        return torch.cat(row)


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(local(parameter.grad).any())
