"""A tap: gate gradients of the inputs of a frozen weight, read from activations and their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.distributed import Ranks, is_sharded_tensor, plain_kind, unsharded_tensor
from setpoint.groups.group import Group, Slice
from setpoint.sensor.consumer import parameter_named

_TAPPED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight has their input's channels, which have a dim of their own in the input, along its dim 1."""


def tappable(group: Group, model: nn.Module) -> frozenset[str]:
    """Names of the frozen outgoing weights that taps can read, of a group that trained weights write; else none."""
    if not _trained_writers(group, model):
        return frozenset()
    readers = [place for place in group.slices if place.role == "consume"]
    found = ((place, parameter_named(model, place.tensor)) for place in readers)
    frozen = [place for place, parameter in found if parameter is not None and not parameter.requires_grad]
    return frozenset(place.tensor for place in frozen if _layer(place, model) is not None)


def _trained_writers(group: Group, model: nn.Module) -> list[nn.Parameter]:
    written = (parameter_named(model, place.tensor) for place in group.slices if place.role != "consume")
    return [parameter for parameter in written if parameter is not None and parameter.requires_grad]


def _layer(place: Slice, model: nn.Module) -> nn.Module | None:
    """The layer that a frozen weight belongs to, if its input can be tapped."""
    owner, _, key = place.tensor.rpartition(".")
    layer = model.get_submodule(owner)
    plain = plain_kind(layer) in _TAPPED and getattr(layer, "groups", 1) == 1
    return layer if plain and key == "weight" and place.dim == 1 else None


class Tap:
    """Sums `x * dL/dx` over everything but the channels of a layer's input x, as the layer itself passes it on.

    With `y = W x` the sum is what `sum over o of W[o, u] dL/dW[o, u]` would be if W were trained, for every channel u:
    both are `dL/dg` of a gate g on it. It takes one multiplication of the activations in the backward pass, until which
    they stay in memory. Compiled code runs no tap.

    Sums of several backward passes add up like gradients, and are discarded like them: a forward pass before which no
    trained parameter has a gradient starts from zero.
    """

    def __init__(self, place: Slice, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self._total: Tensor | None = None
        layer = _layer(place, model)
        assert layer is not None, "a weight that is tapped is tappable"
        # Weak: the hook lives on the layer, and must not keep a tap alive that nothing reads any more.
        me = weakref.ref(self)

        def ahead(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            tap = me()
            if tap is None or torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
                return None
            if not (torch.is_grad_enabled() and args[0].requires_grad) or layer.weight.requires_grad:
                return None
            # Shards get their gradients only when ranks average theirs, so that they show nothing of discarded ones.
            if tap.seen and all(p.grad is None and not is_sharded_tensor(p) for p in trained):
                tap.take()
            # A hook on a view sees the gradient that comes through this layer, and no other.
            passed = args[0].view_as(args[0])
            channels = passed.dim() - layer.weight.dim() + 1  # type: ignore[operator]
            passed.register_hook(partial(tap.note, args[0].detach(), channels))  # type: ignore[no-untyped-call]
            return (passed, *args[1:])

        self._handle = layer.register_forward_pre_hook(ahead)
        weakref.finalize(self, self._handle.remove)

    @property
    def seen(self) -> bool:
        return self._total is not None

    def note(self, x: Tensor, channels: int, gradient: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        others = [dim for dim in range(x.dim()) if dim != channels]
        product = x.to(wide) * gradient.detach().to(wide)
        summed = unsharded_tensor(product.sum(others) if others else product)
        self._total = summed if self._total is None else self._total + summed

    def take(self) -> Tensor | None:
        """The sums since the last reading, by channel of the input; None if there were none."""
        total, self._total = self._total, None
        return total

    def stop(self) -> None:
        self._handle.remove()


class GradientScale:
    """How gradients are scaled between the backward pass, in which taps read, and the step: unscaled, or clipped.

    With `g` the gradient of one trained parameter after the last backward pass and `h` the one before the step, that is
    `(g . h) / (g . g)`. It is 1 for a sharded parameter, of which no hook sees the gradient.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._after_backward: Tensor | None = None
        me = weakref.ref(self)

        def accumulated(parameter: Tensor) -> None:
            scale = me()
            if scale is not None and parameter.grad is not None:
                # In float64, since squares of loss-scaled gradients overflow; copied, since clipping works in place.
                scale._after_backward = parameter.grad.detach().to(torch.float64, copy=True)

        self._handle = parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
        weakref.finalize(self, self._handle.remove)

    @classmethod
    def of(cls, groups: tuple[Group, ...], model: nn.Module, tapped: frozenset[str]) -> GradientScale:
        """The scale of the smallest trained weight that writes units of a group whose outgoing weights are tapped."""
        read = (group for group in groups if any(place.tensor in tapped for place in group.slices))
        writers = [parameter for group in read for parameter in _trained_writers(group, model)]
        return cls(min(writers, key=lambda parameter: parameter.numel()))

    def applied(self, read: Tensor, ranks: Ranks) -> Tensor:
        """What taps have read, at the scale of the present gradients, as the mean over ranks; a collective call."""
        before, self._after_backward = self._after_backward, None
        if is_sharded_tensor(self._parameter):
            return ranks.total(read) / ranks.count
        if before is None:
            before = torch.zeros_like(self._parameter, dtype=torch.float64)
        before = before.to(read.device).flatten()
        if ranks.count > 1:
            # The hook has seen this rank's own gradient, before the wrapper averaged it.
            mean = ranks.total(torch.cat([read.double(), before])) / ranks.count
            read, before = mean[: len(read)].to(read), mean[len(read) :]
        now = before if self._parameter.grad is None else self._parameter.grad.flatten().to(before)
        square = before.square().sum()
        return read * torch.where(square > 0, (before * now).sum() / square, 1.0).to(read)

    def forget(self) -> None:
        """Drop the gradient of a step that is not read: a cut may come before the next one."""
        self._after_backward = None

    def stop(self) -> None:
        self._handle.remove()
