"""Masking: what of a model may be masked, and the actuator where units are single weights: masks that change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Muon
from torch.utils.hooks import RemovableHandle

from setpoint.actuator.actuator import Actuator, Origins
from setpoint.actuator.tensors import Optimizers, as_sequence, moments_of
from setpoint.controller.plan import Controller, Plan
from setpoint.cost.budget import Budget, Price, Tolerance
from setpoint.errors import BudgetError, CheckpointError, GroupError, LoopError
from setpoint.groups.example import Example
from setpoint.groups.follow import Change
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import trace_step
from setpoint.host.host import Host
from setpoint.loop.candidates import Candidates, check_copies, check_some, in_hand
from setpoint.sensor.consumer import weakly
from setpoint.sensor.reading import Reading, Sensor
from setpoint.weights.find import Pattern, WeightFlops, active_params, as_mask, chosen, weight_flops, with_active
from setpoint.weights.taylor import WeightTaylorSensor

_SOURCES = {  # what can be saved, and what is said of it
    "flops": "modelled: theoretical FLOPs, as if masked weights cost nothing; dense hardware does not get faster",
    "params": "modelled: weights that are not masked; zeros are stored too, and dense hardware does not get faster",
}
NewMasks = dict[str, Tensor]  # by group, a boolean tensor of the weight's shape


@final
@dataclass(frozen=True)
class Masking:
    """`attach(actuator=Masking("2:4"))`: single weights of linear layers and convolutions are masked.

    Masks save FLOPs and parameters in theory only: dense hardware does not get faster.

    Args:
        pattern: "unstructured" or "N:M", such as "2:4", by whole tensors; GroupError for an unknown one.

    >>> import setpoint
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> masking = Masking("2:4")
    >>> with setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(x,), actuator=masking) as loop:
    ...     for _ in range(30):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> {name: (mask.numel(), int(mask.sum())) for name, mask in loop.masks.items()}
    {'0.weight': (128, 64), '2.weight': (64, 32)}
    """

    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        Pattern.named(self.pattern)


def check_resources(budgets: Collection[Budget]) -> None:
    """Refuse what zeros do not save, and a budget of the whole run."""
    for budget in budgets:
        if budget.resource not in _SOURCES:
            raise BudgetError(
                f"masks on single weights save no {budget.resource}: zeros are stored and multiplied like others. "
                "Hold them to of='params' or to of='flops' (in theory), or leave the actuator to attach"
            )
        if budget.per == "run":
            raise BudgetError(
                "masks on single weights save FLOPs in theory only, so what the whole run spends cannot be cut by "
                "them: use per='step', or leave the actuator to attach"
            )


def check_run(
    goal: Price | Tolerance | None, budgets: Sequence[Budget], controller: Controller[Any], sensor: Sensor[Any]
) -> WeightTaylorSensor:
    """Refuse what masks do not save, a tolerance, and a controller or a sensor of whole units."""
    if isinstance(goal, Tolerance):
        raise BudgetError(
            "a Tolerance takes cuts back through the reserve, which holds no single weights: give a Budget or a Price"
        )
    check_resources((Budget.fraction(1.0, of=goal.resource), *budgets) if isinstance(goal, Price) else budgets)
    if controller.conduct.regrow:
        raise LoopError(
            "single weights come back by drop and grow, not from a reserve: use regrow=False, and "
            "DropAndGrowController(controller) around it"
        )
    if not isinstance(sensor, WeightTaylorSensor):
        raise LoopError(
            f"{type(sensor).__name__} reads whole units: leave the sensor to attach, or give WeightTaylorSensor(...)"
        )
    return sensor


def weight_candidates(
    host: Host, example: Example, pattern: Pattern, wanted: Sequence[Group] | None, passes: int
) -> tuple[Candidates, Masks]:
    """What may be masked in a pattern, and the masks; nothing is tried out: a mask is exact on any model.

    `wanted` is out of `find_weights(model, pattern)`, or None for all.
    """
    model = host.model
    groups, frozen = in_hand(host, chosen(model, pattern, wanted))
    by_matrix = [optimizer for optimizer in host.optimizers if isinstance(optimizer, Muon)]
    mixed = {id(p) for optimizer in by_matrix for settings in optimizer.param_groups for p in settings["params"]}
    frozen |= {
        group.name: "Muon steps by the whole matrix, in which a single weight that is masked has no twin"
        for group in groups
        if id(model.get_parameter(group.name)) in mixed
    }
    groups = tuple(group for group in groups if group.name not in frozen)
    check_copies(host, groups)
    check_some(groups, frozen or {"weights": "no linear layer or convolution is trained"})
    traced = trace_step(model, example, passes)
    host.no_backward = traced.no_backward
    flops = weight_flops(model, traced, groups)
    costs = {"flops": flops.cost(), "params": active_params(model, groups)}
    found = Candidates(groups, frozen, costs, sources=_SOURCES, header={"pattern": str(pattern)})
    return found, Masks(host, groups, pattern, flops)


@final
class Masks(Actuator):
    """The masks of a run; they change at each decision.

    A masked weight is zero, and so is its gradient; optimizers remember nothing of it. Gradients are masked as they are
    accumulated, so that clipping sees what a model frozen by hand would show, and once more ahead of the step. Where
    weights are to be grown, the gradients of masked ones are put aside, as they are when the first optimizer steps.
    """

    kind, by_unit = "masking", False
    groups: tuple[Group, ...] = ()
    masks: dict[str, Tensor] = {}  # by name, True = active

    def __init__(self, host: Host, groups: tuple[Group, ...], pattern: Pattern, flops: WeightFlops) -> None:
        self._flops, self._pattern, self._host = flops, pattern, host
        self._dense = self.groups = groups
        self._weights = {group.name: host.model.get_parameter(group.name) for group in groups}
        self.masks = {group.name: as_mask(group, self._weights[group.name]) for group in groups}
        self._num_dropped = {name: torch.zeros_like(mask, dtype=torch.uint8) for name, mask in self.masks.items()}
        self._handles: dict[str, tuple[RemovableHandle, RemovableHandle]] = {}
        self._gone: dict[str, Tensor] = {}  # by name of a weight that lost any, True = masked
        self._resting: dict[str, Tensor] = {}  # gradients of masked weights, where drop and grow wants to know them
        self._looking, self._settled = False, frozenset[str]()
        self.train_flops, self._step_flops = 0.0, flops.total

    @property
    def origin(self) -> Origins:
        return {name: np.flatnonzero(mask.cpu().numpy()) for name, mask in self.masks.items()}

    def broken(self) -> str:
        return next((n for n, mask in self.masks.items() if bool(self._weights[n].masked_fill(mask, 0.0).any())), "")

    def prepare(self, step: int, *, due: bool, open_still: bool) -> tuple[Change, bool]:
        # A decision after this step may want gradients of masked weights.
        self._looking, self._resting, self._settled = due and open_still, {}, frozenset()
        return Change(), due

    @torch.no_grad()
    def before_step(self, grad_scale: Tensor | None) -> None:
        """Mask gradients once more: noise, or another optimizer, may have changed them since the backward pass."""
        for name, gone in self._gone.items():
            self._forget_discarded(name)
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.masked_fill_(gone, 0.0)
        self._settled = frozenset(self._resting)

    @torch.no_grad()
    def after_step(self) -> None:
        """Mask weights, whatever the optimizer did, and count what the step costs in theory."""
        for name, gone in self._gone.items():
            self._weights[name].masked_fill_(gone, 0.0)
        self.train_flops += self._step_flops
        if self._resting:
            self.train_flops += self._flops.dense_gradients(widths_of(self.groups))

    def _forget_discarded(self, name: str, _: Tensor | None = None) -> None:
        """A gradient is about to be accumulated, or used: what was put aside goes if the gradients before are gone."""
        if name in self._resting and name not in self._settled:
            gradient = self._weights[name].grad
            if gradient is None or not bool(gradient.any()):  # `zero_grad`, with and without set_to_none
                del self._resting[name]

    @torch.no_grad()
    def _accumulated(self, name: str, weight: Tensor) -> None:
        """A gradient was accumulated: mask it, and put aside what drop and grow wants to know."""
        if weight.grad is None:
            return
        # Once the first optimizer has stepped, a later backward pass may be that of another loss.
        if self._looking and name not in self._settled:
            resting = weight.grad.detach().masked_fill(self.masks[name], 0.0)
            self._resting[name] = self._resting[name] + resting if name in self._resting else resting
        weight.grad.masked_fill_(self._gone[name], 0.0)

    def _planned(self, plan: Plan, scores: Mapping[str, Float[Tensor, "..."]]) -> tuple[NewMasks, NewMasks, NewMasks]:
        """The masks of a plan, what goes, and what comes in with the value zero; nothing is changed yet."""
        masks, all_dropped, all_grown = {}, {}, {}
        for name, before in self.masks.items():
            kept, grown = before.clone(), torch.zeros_like(before)
            if name in plan.keep:
                kept.view(-1)[before.view(-1)] = torch.from_numpy(plan.keep[name]).to(before.device)
            self._check(name, kept)
            dropped = before & ~kept
            if plan.drop_and_grow and name in self._resting:
                gradient, share = self._resting[name], plan.drop_and_grow
                out, grown = drop_and_grow(kept, ~before, scores[name], gradient, share, self._pattern)
                dropped |= out
            masks[name], all_dropped[name], all_grown[name] = (before & ~dropped) | grown, dropped, grown
        return masks, all_dropped, all_grown

    def _check(self, name: str, mask: Tensor) -> None:
        per_block = self._pattern.blocks(mask).sum(-1)
        if not self._pattern.free and bool((per_block != per_block.flatten()[0]).any()):
            raise GroupError(
                f"the plan leaves blocks of {self._pattern.block} in {name!r} with different numbers of weights: a "
                "controller must drop the least salient ones, in whole `multiple_of`"
            )

    def act(self, plan: Plan, reading: Reading) -> Change:
        # All that can fail comes before anything changes.
        masks, dropped, grown = self._planned(plan, reading.scores() if plan.drop_and_grow and self._resting else {})
        for name, gone in dropped.items():
            times = self._num_dropped[name]
            self._num_dropped[name] = times + (gone & (times < 255)).to(torch.uint8)
        self.groups = self._set(masks)
        num_dropped, num_grown = (
            {name: count for name, mask in masks.items() if (count := int(mask.sum()))} for masks in (dropped, grown)
        )
        return Change(keep=plan.keep, grown=grown, counted=True, num_dropped=num_dropped, num_grown=num_grown)

    def _set(self, masks: Mapping[str, Tensor]) -> tuple[Group, ...]:
        self.masks = dict(masks)
        self._gone = {name: ~mask for name, mask in masks.items() if name in self._gone or not bool(mask.all())}
        for name in self._gone:
            if name not in self._handles:
                ahead, behind = (partial(weakly(own), name) for own in (self._forget_discarded, self._accumulated))
                weight = self._weights[name]
                self._handles[name] = (
                    weight.register_hook(ahead),  # type: ignore[no-untyped-call]
                    weight.register_post_accumulate_grad_hook(behind),  # type: ignore[no-untyped-call]
                )
        held = {name: masks[name] for name in self._gone}
        mask_weights(self._weights, self._host.optimizers, held)
        # An average of weights from before would bring masked ones back.
        for copied in self._host.copies:
            # `AveragedModel` keeps its model under this name.
            own = {name.removeprefix("module."): p for name, p in copied.named_parameters(remove_duplicate=False)}
            mask_weights(own, None, {name: mask.to(own[name].device) for name, mask in held.items()})
        self._resting, self._settled = {}, frozenset()
        groups = self._groups(masks)
        self._step_flops = self._flops.cost().total(widths_of(groups))
        return groups

    def stop(self) -> None:
        for handle in chain.from_iterable(self._handles.values()):
            handle.remove()
        self._handles, self._gone = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "masks": {name: mask.cpu().clone() for name, mask in self.masks.items()},
            "num_dropped": {name: times.cpu().clone() for name, times in self._num_dropped.items()},
            "train_flops": self.train_flops,
        }

    def check(self, state: Mapping[str, Any]) -> tuple[Group, ...]:
        masks: Mapping[str, Tensor] = state["masks"]
        if {name: mask.shape for name, mask in masks.items()} != {name: m.shape for name, m in self.masks.items()}:
            raise CheckpointError("the masks of the state are not one for each weight of this model")
        for name, mask in masks.items():
            self._check(name, mask.contiguous())
        return self._groups(masks)

    def _groups(self, masks: Mapping[str, Tensor]) -> tuple[Group, ...]:
        return tuple(with_active(group, masks[group.name].cpu().numpy().reshape(-1)) for group in self._dense)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        masks, self._num_dropped = (
            {name: state[part][name].to(mask.device, copy=True).contiguous() for name, mask in self.masks.items()}
            for part in ("masks", "num_dropped")
        )
        self.train_flops = float(state["train_flops"])
        self.groups = self._set(masks)

    def totals(self) -> dict[str, Any]:
        masked = {name: ~mask for name, mask in self.masks.items()}
        return {
            "dense_flops": self._flops.total,
            "final_flops": self._flops.total,
            "theoretical_flops": self._flops.cost().total(widths_of(self.groups)),
            "theoretical_train_flops": self.train_flops,
            "dropped_units": sum(int((times > 0).sum()) for times in self._num_dropped.values()),
            # A weight that is masked now has come back once less than it was dropped.
            "regrown_units": sum(int((times > masked[name]).sum()) for name, times in self._num_dropped.items()),
        }


# Optimizers with a state that does not begin at zero, its name, and the setting that it begins with.
_FIRST_VALUES = ((torch.optim.Rprop, "step_size", "lr"), (torch.optim.Adagrad, "sum", "initial_accumulator_value"))


@torch.no_grad()
def mask_weights(
    weights: Mapping[str, nn.Parameter], optimizer: Optimizers, masks: Mapping[str, Bool[Tensor, "..."]]
) -> None:
    """Zero every weight that is not active; the optimizer remembers nothing of it, as of one that it has never moved.

    An optimizer that treats every entry in one way then keeps it at zero, as long as its gradient is zero too:
    call `mask_gradients` ahead of each step.
    """
    for name, mask in masks.items():
        weight, gone = weights[name], ~mask
        weight.masked_fill_(gone, 0.0)
        for one in as_sequence(optimizer):
            for _, moment in moments_of(one, weight):
                moment.masked_fill_(gone, 0.0)
            for kind, part, setting in _FIRST_VALUES:
                if isinstance(one, kind) and part in one.state.get(weight, {}):
                    # By identity: `in` compares tensors element by element.
                    group = next(group for group in one.param_groups if any(weight is held for held in group["params"]))
                    one.state[weight][part].masked_fill_(gone, float(group.get(setting, 0.0)))
    mask_gradients(weights, masks)


@torch.no_grad()
def mask_gradients(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Bool[Tensor, "..."]]) -> None:
    for name, mask in masks.items():
        gradient = weights[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask, 0.0)


@torch.no_grad()
def drop_and_grow(
    active: Bool[Tensor, "..."],
    resting: Bool[Tensor, "..."],
    scores: Float[Tensor, "..."],
    gradient: Float[Tensor, "..."],
    share: float,
    pattern: Pattern,
) -> tuple[Bool[Tensor, "..."], Bool[Tensor, "..."]]:
    """Which weights go, and which come in; as many, in an N:M pattern in each block (one at most).

    The least salient `share` of the active weights goes, rounded down. Those of the resting weights, without any that
    have just been dropped, come in whose gradients are largest, finite and not zero.
    """
    # Rounded down: a share of few weights may be none.
    size, wanted = gradient.abs(), int(share * int(active.sum()))
    may = resting & (size > 0) & size.isfinite()
    dropped, grown = torch.zeros_like(active), torch.zeros_like(active)
    if pattern.free:
        count = min(wanted, int(may.sum()))
        return lowest(scores, active, count), lowest(-size, may, count)
    weakest = pattern.blocks(scores.masked_fill(~active, torch.inf).contiguous()).min(-1)
    strongest = pattern.blocks(size.masked_fill(~may, -1.0).contiguous()).max(-1)
    able = weakest.values.isfinite() & (strongest.values > 0)
    chosen = lowest(weakest.values, able, min(wanted, int(able.sum())))[..., None]
    pattern.blocks(dropped).scatter_(-1, weakest.indices[..., None], chosen)
    pattern.blocks(grown).scatter_(-1, strongest.indices[..., None], chosen)
    return dropped, grown


def lowest(scores: Float[Tensor, "..."], among: Bool[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """A mask of the `count` lowest scores among these elements, of equal ones the first. Time O(elements)."""
    mask = torch.zeros(among.shape, dtype=torch.bool, device=among.device)  # row-major, whatever `among` is
    if count < 1:
        return mask
    flat = torch.where(among & ~scores.isnan(), scores, torch.inf).flatten()
    # Linear time, where sorting a layer of a language model takes seconds.
    bound = flat.kthvalue(count).values
    chosen = mask.view(-1)
    # Ties are broken by place, so that the same run has the same masks on every machine.
    chosen |= flat < bound
    chosen[(flat == bound).nonzero().flatten()[: count - int(chosen.sum())]] = True
    return mask
