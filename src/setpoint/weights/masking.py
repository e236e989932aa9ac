"""Masking: the actuator where units are single weights: masks that are set, held and changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from setpoint.controller.plan import Plan
from setpoint.distributed import local
from setpoint.errors import CheckpointError, GroupError
from setpoint.groups.follow import Change
from setpoint.groups.group import Group, widths_of
from setpoint.host.host import Host
from setpoint.sensor.reading import Reading
from setpoint.weights.cost import WeightFlops
from setpoint.weights.drop_and_grow import drop_and_grow
from setpoint.weights.find import Pattern, as_mask, with_active
from setpoint.weights.mask import mask_weights


@dataclass(frozen=True, eq=False)
class NewMasks:
    """What a plan does to masks."""

    masks: Mapping[str, Bool[Tensor, "..."]]  # by group, True = active from here on
    dropped: Mapping[str, Bool[Tensor, "..."]]  # by group, weights that go
    grown: Mapping[str, Bool[Tensor, "..."]]  # by group, weights that come in, with the value zero


@final
@dataclass(frozen=True)
class Masking:
    """`attach(actuator=Masking("2:4"))`: single weights of linear layers and convolutions are masked.

    Masks save FLOPs and parameters in theory only: dense hardware does not get faster.

    Args:
        pattern: "unstructured" or "N:M", such as "2:4", by whole tensors.

    Raises:
        GroupError: for an unknown pattern.

    >>> import setpoint
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> masking = Masking("2:4")
    >>> with setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(x,), actuator=masking) as loop:
    ...     for _ in range(30):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.summary.masked_params, {name: int(mask.sum()) for name, mask in loop.masks.items()}
    (96, {'0.weight': 64, '2.weight': 32})
    """

    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        Pattern.named(self.pattern)


class Accumulated:
    """The gradient of a leaf parameter as the last backward pass left it."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._left: tuple[Tensor | None, int] = None, -1

    def note(self) -> None:
        """Remember the present gradient as what a backward pass left."""
        gradient = self._parameter.grad
        # The version counts in-place changes, of which identity alone shows none.
        self._left = gradient, -1 if gradient is None else gradient._version

    @property
    def untouched(self) -> bool:
        """Whether the gradient is that object, unchanged."""
        gradient, (left, version) = self._parameter.grad, self._left
        return gradient is not None and gradient is left and gradient._version == version

    @property
    def discarded(self) -> bool:
        """Whether it is gone or zero, as after `zero_grad`; a host sync if it was changed."""
        gradient = self._parameter.grad
        return gradient is None or not (self.untouched or bool(local(gradient).any()))


@final
class Masks:
    """The masks of a run; they change at each decision.

    A masked weight is zero, and so is its gradient; optimizers remember nothing of it. Gradients are masked as they are
    accumulated, so that clipping sees what a model frozen by hand would show, and once more ahead of the step. Before
    weights are grown, the gradients of masked ones are put aside first. They go when the gradients that they came with
    are thrown away, and what counts is what is there when the first optimizer steps.
    """

    def __init__(self, host: Host, groups: tuple[Group, ...], pattern: Pattern, flops: WeightFlops) -> None:
        self._flops, self._pattern, self._host, self._optimizers = flops, pattern, host, host.optimizers
        self._dense = self.groups = groups
        self.kind, self.by_unit, self.brings_back, self.within_step = "masking", False, False, False
        names = [group.name for group in groups]
        self._weights = {name: host.model.get_parameter(name) for name in names}
        self.masks = {group.name: as_mask(group, self._weights[group.name]) for group in groups}
        self._num_dropped = {name: torch.zeros_like(mask, dtype=torch.uint8) for name, mask in self.masks.items()}
        self._shapes = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        self._handles: dict[str, tuple[RemovableHandle, RemovableHandle]] = {}
        self._looking, self._aside, self._ready = False, dict[str, Tensor](), dict[str, Tensor]()
        self._gone: dict[str, Tensor] = {}
        self._masked: dict[str, Accumulated] = {}
        self.train_flops = 0.0
        self._step_flops = flops.total

    @property
    def origin(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """By group, the position of each active weight in its tensor, in row-major order."""
        return {name: np.flatnonzero(mask.cpu().numpy()) for name, mask in self.masks.items()}

    @property
    def num_masked(self) -> int:
        """How many weights are masked."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.masks.values())

    def counts(self) -> tuple[int, int, int]:
        """How many weights were dropped at least once, came back at least once, and were dropped more than once."""
        times = [(each, (~self.masks[name]).to(torch.uint8)) for name, each in self._num_dropped.items()]
        counts = ((each > 0, each > masked, each > 1) for each, masked in times)
        dropped, back, again = (sum(int(each.sum()) for each in kind) for kind in zip(*counts, strict=True))
        return dropped, back, again

    def broken(self) -> str:
        """The first tensor in which a masked weight is not zero, or ""."""
        return next((n for n, mask in self.masks.items() if bool(self._weights[n].masked_fill(mask, 0.0).any())), "")

    def prepare(self, step: int, *, due: bool, open_still: bool) -> bool:
        """The next step begins; where a decision comes after it, it may want gradients of masked weights."""
        self._looking, self._aside, self._ready = due and open_still, {}, {}
        return due

    def extras(self, step: int) -> Mapping[str, Any]:
        """Nothing is known besides."""
        return {}

    @torch.no_grad()
    def before_step(self, grad_scale: Tensor | None) -> None:
        """Mask the gradients that were set or changed by something other than a backward pass."""
        for name, gone in self._gone.items():
            self._forget_discarded(name)
            gradient, masked = self._weights[name].grad, self._masked.get(name)
            if gradient is not None and not (masked and masked.untouched):
                gradient.masked_fill_(gone, 0.0)
        self._masked, self._ready = {}, dict(self._aside)

    @torch.no_grad()
    def after_step(self) -> None:
        """Mask weights, whatever the optimizer did, and count what the step costs in theory."""
        for name, gone in self._gone.items():
            self._weights[name].masked_fill_(gone, 0.0)
        self.train_flops += self._step_flops
        if self._resting:
            self.train_flops += self._flops.dense_gradients(widths_of(self.groups))

    @property
    def _resting(self) -> dict[str, Tensor]:
        """Gradients of masked weights, where some were put aside; an optimizer that steps late may add its own."""
        return {**self._aside, **self._ready}

    def _forget_discarded(self, name: str, _: Tensor | None = None) -> None:
        """A gradient is about to be accumulated, or used: what was put aside goes if the gradients before are gone."""
        if name in self._aside and (self._masked.get(name) or Accumulated(self._weights[name])).discarded:
            del self._aside[name]

    @torch.no_grad()
    def _accumulated(self, name: str, weight: Tensor) -> None:
        """A gradient was accumulated: mask it, and put aside what drop and grow wants to know."""
        if weight.grad is None:
            return
        if self._looking:
            resting = weight.grad.detach().masked_fill(self.masks[name], 0.0)
            self._aside[name] = self._aside[name] + resting if name in self._aside else resting
        weight.grad.masked_fill_(self._gone[name], 0.0)
        masked = self._masked[name] = Accumulated(weight)
        masked.note()

    def planned(self, plan: Plan, scores: Mapping[str, Float[Tensor, "..."]]) -> NewMasks:
        """What a plan does to masks, which are not changed yet; GroupError for one that does not fit the pattern."""
        masks, all_dropped, all_grown, resting = {}, {}, {}, self._resting
        for name, before in self.masks.items():
            kept = before.clone()
            keep = plan.keep.get(name)
            if keep is not None and not keep.all():
                at = before.view(-1).nonzero().flatten()[torch.from_numpy(~keep).to(before.device)]
                kept.view(-1)[at] = False
            self._check(name, kept)
            dropped, grown = before & ~kept, torch.zeros_like(before)
            if plan.drop_and_grow and name in resting:
                out, grown = drop_and_grow(
                    kept, ~before, scores[name], resting[name], plan.drop_and_grow, self._pattern
                )
                dropped |= out
            masks[name], all_dropped[name], all_grown[name] = (before & ~dropped) | grown, dropped, grown
        return NewMasks(masks, all_dropped, all_grown)

    def _check(self, name: str, mask: Tensor) -> None:
        per_block = self._pattern.blocks(mask).sum(-1)
        if not self._pattern.free and bool((per_block != per_block.flatten()[0]).any()):
            raise GroupError(
                f"the plan leaves blocks of {self._pattern.block} in {name!r} with different numbers of weights: under "
                f"the pattern {self._pattern} a controller must drop the least salient weights, in whole `multiple_of`"
            )

    def act(self, plan: Plan, reading: Reading) -> Change:
        """Carry a plan out; all that can fail comes before anything changes."""
        change = self.planned(plan, reading.scores() if plan.drop_and_grow and self._resting else {})
        self.groups = self.carry_out(change)
        dropped, grown = (
            {name: count for name, mask in each.items() if (count := int(mask.sum()))}
            for each in (change.dropped, change.grown)
        )
        return Change(keep=plan.keep, grown=change.grown, counted=True, num_dropped=dropped, num_grown=grown)

    def release(self) -> None:
        """Nothing was kept: masks hold until the end."""

    def carry_out(self, change: NewMasks) -> tuple[Group, ...]:
        """Set the masks; what goes is zero from here on, with moments, in copies too. Returns the active groups."""
        for name, dropped in change.dropped.items():
            times = self._num_dropped[name]
            self._num_dropped[name] = times + (dropped & (times < 255)).to(torch.uint8)
        return self._set(change.masks)

    def _set(self, masks: Mapping[str, Tensor]) -> tuple[Group, ...]:
        self.masks = dict(masks)
        self._gone = {name: ~mask for name, mask in masks.items() if name in self._gone or not bool(mask.all())}
        for name in self._gone:
            if name not in self._handles:
                ahead, behind = _weakly(self._forget_discarded, name), _weakly(self._accumulated, name)
                weight = self._weights[name]
                self._handles[name] = (
                    weight.register_hook(ahead),  # type: ignore[no-untyped-call]
                    weight.register_post_accumulate_grad_hook(behind),  # type: ignore[no-untyped-call]
                )
        held = {name: masks[name] for name in self._gone}
        mask_weights(self._weights, self._optimizers, held)
        for each in (_parameters(copied, list(held)) for copied in self._host.copies):
            mask_weights(each, None, {name: mask.to(each[name].device) for name, mask in held.items()})
        self._aside, self._ready = {}, {}
        groups = self._groups(masks)
        self._step_flops = self._flops.at(widths_of(groups))
        return groups

    def stop(self) -> None:
        """Let go: weights stay as they are, and nothing holds them any more."""
        for handle in chain.from_iterable(self._handles.values()):
            handle.remove()
        self._handles, self._gone = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors and numbers."""
        return {
            "kind": self.kind,
            "masks": {name: mask.cpu().clone() for name, mask in self.masks.items()},
            "num_dropped": {name: times.cpu().clone() for name, times in self._num_dropped.items()},
            "train_flops": self.train_flops,
        }

    def check(self, state: Mapping[str, Any]) -> tuple[Group, ...]:
        """Check that a state fits before anything changes, or raise CheckpointError; the groups at its masks."""
        float(state["train_flops"])
        for name, dtype in (("masks", torch.bool), ("num_dropped", torch.uint8)):
            tensors = state[name]
            shapes = {key: tuple(each.shape) for key, each in tensors.items() if each.dtype == dtype}
            if shapes != self._shapes:
                raise CheckpointError(f"the {name} of the state are not one for each weight of this model")
        masks: Mapping[str, Tensor] = state["masks"]
        for group in self._dense:
            if int(masks[group.name].sum()) < group.min_units:
                raise CheckpointError(f"the mask of {group.name!r} leaves fewer weights than {self._pattern} allows")
            self._check(group.name, masks[group.name].contiguous())
        return self._groups(masks)

    def _groups(self, masks: Mapping[str, Tensor]) -> tuple[Group, ...]:
        return tuple(with_active(group, masks[group.name].cpu().numpy().reshape(-1)) for group in self._dense)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the masks of a state that was checked."""
        masks, self._num_dropped = (
            {name: state[part][name].to(mask.device, copy=True).contiguous() for name, mask in self.masks.items()}
            for part in ("masks", "num_dropped")
        )
        self.train_flops = float(state["train_flops"])
        self.groups = self._set(masks)

    def totals(self) -> dict[str, Any]:
        """What a summary says of single weights."""
        dropped, back, again = self.counts()
        return {
            "dense_flops": self._flops.total,
            "final_flops": self._flops.total,
            "final_flops_ratio": 1.0,
            "theoretical_flops": self._flops.at(widths_of(self.groups)),
            "theoretical_train_flops": self.train_flops,
            "masked_params": self.num_masked,
            "dropped_units": dropped,
            "regrown_units": back,
            "dropped_again": again,
        }


def _parameters(copy: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    own = {name.removeprefix("module."): each for name, each in copy.named_parameters(remove_duplicate=False)}
    return {name: own[name] for name in names}


def _weakly(method: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    """A hook that calls the method as long as its owner lives: a weight must not keep a loop alive."""
    found = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        if (alive := found()) is not None:
            alive(name, tensor)

    return hook
