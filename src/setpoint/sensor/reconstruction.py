"""The reconstruction sensor: saliency from what the layers that read a unit cannot make up for when it is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.arguments import counts
from setpoint.distributed import Ranks, local, unsharded_tensor
from setpoint.errors import GroupError
from setpoint.groups.follow import FOUND_ANEW, ByUnit
from setpoint.groups.group import Group
from setpoint.sensor.consumer import Consumer, by_column, find_consumers, layers_by_weight
from setpoint.sensor.elimination import Map, energy_shares, flops_of
from setpoint.sensor.listener import Listener, rows_kept
from setpoint.sensor.reading import Reading


@dataclass(frozen=True, eq=False)
class Seen:
    """What one consumer of a group was given lately."""

    rows: Mapping[str, ByUnit[Float[Tensor, "units columns rows"]]] = field(default_factory=dict)  # by group: its own
    sizes: tuple[int, ...] = ()  # how many of the last steps, before the least recent were left out for their number
    norm: str = ""  # the BatchNorm that is given what the consumer makes, once it is known

    def __post_init__(self) -> None:
        if any(each.dim() != 3 for each in self.rows.values()):
            raise ValueError("rows have three dims: units, columns of each, and rows")


@dataclass(frozen=True, eq=False)
class ReconstructionState:
    """What the consumers of all groups were given lately, in the order of groups and of their consumers."""

    model: nn.Module = field(metadata={"live": True})
    seen: tuple[Seen, ...]
    skipped_steps: Float[Tensor, ""]  # a 0-dim tensor, so that counting needs no host sync
    num_steps: int = 0  # skipped ones among them
    steps_seen: Mapping[str, int] = field(default_factory=dict)  # by group, steps of which there are rows
    listener: Listener | None = field(default=None, metadata=FOUND_ANEW)


class ReconstructionSensor:
    """Error that a unit's removal leaves in the layers that read it, after these are refitted.

    A layer with weights W reads units x: `y = W^T x`. Let `G = E[x x^T]` be their second moment, uncentred, and
    `P = (G + .01 mean(diag G) I)^-1`. To remove unit j, all other weights being chosen anew, costs an error of
    `trace(W_j^T (P_jj)^-1 W_j)` in y, where W_j are the rows of W that the unit owns: one in a linear layer, one for
    each offset of a kernel, one for each channel of a head. The cheapest unit goes first, W and P are brought up to
    date (optimal brain surgeon), and so on. The saliency of a unit is

        the error at its removal / trace(W^T G W),

    a share of what the layer gives, so that layers can be compared; summed over the layers that read the group, and
    never falling along the order of removal. Units that repeat others are cheap, however large their weights.

    It uses no gradient and is not in units of the loss, so it works with a `Budget` and not a `Price`. Where the output
    goes into a BatchNorm, each output counts in units of the deviation that the norm divides by, times its scale.

    Hooks record what layers are given in ordinary training forwards: up to `rows` positions of each forward, picked
    evenly and without random numbers, in the `steps` steps before a decision; at most `rows * steps` in all, and at
    most 8 million numbers a layer. After the decision they are dropped: a reading in between shows nothing. Nothing is
    multiplied before a reading. Then G, P and the removals are worked out in float64, layer by layer; units of a layer
    with more than 1,024 columns are split into blocks, between which no unit makes up for another. Where ranks share
    batches, each gives an equal part of the rows.

    It reads linear layers, also those of transformers' `Conv1D`, and convolutions without groups; depthwise ones inside
    a group are passed through. Groups that anything else reads are not pruned, by name: those of attention of
    `nn.MultiheadAttention`, which calls no layer, of transposed convolutions, of queries and keys, and all of them in
    compiled code, which runs no hooks. Units that come back are not read.

    Args:
        rows: noted of what a layer is given in one forward, on all ranks together.
        steps: that are read before each decision.

    Raises:
        ValueError: if either is not a positive integer.

    References:
        Hassibi, Stork: "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992. Luo, Wu, Lin:
        "ThiNet", ICCV 2017, and He, Zhang, Sun: "Channel pruning for accelerating very deep neural networks", ICCV 2017
        (channels by what the next layer can reconstruct).

    >>> import setpoint
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> sensor = ReconstructionSensor()
    >>> with setpoint.attach(model, optimizer, "50% flops", total_steps=30, sensor=sensor, example=(x,)) as loop:
    ...     for _ in range(30):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.summary.budget_met
    True
    """

    reads_shards = averages_hooks = True
    returns = in_loss = False

    def __init__(self, rows: int = 256, steps: int = 4, ranks: Ranks | None = None) -> None:
        self.rows, self.steps = counts(rows=rows, steps=steps)
        self.ranks = Ranks() if ranks is None else ranks

    @property
    def steps_ahead(self) -> int:
        """Steps before a decision that are shown to it."""
        return self.steps

    def over(self, ranks: Ranks) -> ReconstructionSensor:
        """The sensor where each rank sees batches of its own."""
        return ReconstructionSensor(self.rows, self.steps, ranks)

    def by_hooks(self, group: Group, model: nn.Module) -> bool:
        """Whether a group is read by hooks: each is."""
        return True

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """The groups that linear layers and convolutions read, and nothing else."""
        layers = layers_by_weight(model)
        return tuple(group for group in groups if find_consumers(group, model, layers))

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> ReconstructionState:
        """Nothing seen yet, hooks on the model; GroupError for a group that is not `readable`."""
        readable = {group.name for group in self.readable(groups, model)}
        unreadable = sorted(group.name for group in groups if group.name not in readable)
        if unreadable:
            raise GroupError(
                f"groups {unreadable} are read by something else than linear layers and convolutions, so that the "
                "reconstruction sensor cannot read them: leave them out (ReconstructionSensor.readable picks the "
                "others) or use another sensor"
            )
        first = next((local(each.detach()) for each in model.parameters()), torch.zeros(()))
        seen = tuple(Seen() for _ in _consumers(groups, model))
        none = torch.zeros((), dtype=torch.promote_types(first.real.dtype, torch.float32), device=first.device)
        return ReconstructionState(
            model, seen, none, 0, {group.name: 0 for group in groups}, self._listen(groups, model)
        )

    def _listen(self, groups: tuple[Group, ...], model: nn.Module) -> Listener:
        # Of a number of ranks that is no divisor, some rows stay empty, which count for nothing.
        return Listener(_consumers(groups, model), model, max(1, self.rows // self.ranks.count), self.rows * self.steps)

    def listen(
        self, state: ReconstructionState, groups: tuple[Group, ...], model: nn.Module, *, sensed: bool
    ) -> ReconstructionState:
        """The next step begins: hooks listen to it if it is to be taken in; else nothing is kept of those before."""
        if sensed:
            return state if state.listener is not None else replace(state, listener=self._listen(groups, model))
        if state.listener is None and not any(each.rows for each in state.seen):
            return state
        self.release(state)
        seen, none = tuple(Seen(norm=each.norm) for each in state.seen), dict.fromkeys(state.steps_seen, 0)
        return replace(state, listener=None, seen=seen, steps_seen=none)

    @torch.no_grad()
    def update(
        self,
        state: ReconstructionState,
        groups: tuple[Group, ...],
        model: nn.Module,
        grad_scale: Tensor | None = None,
    ) -> ReconstructionState:
        """Take in what was seen since the last step. No host sync."""
        listener = state.listener or self._listen(groups, model)
        consumers = listener.consumers
        noted = self._shared(consumers, listener.take(), state.skipped_steps)
        called = {each.group for each, rows in zip(consumers, noted, strict=True) if rows is not None}
        sums = [rows.sum() for rows in noted if rows is not None]
        finite = torch.isfinite(torch.stack([each.to(state.skipped_steps) for each in sums]).sum()) if sums else None
        if grad_scale is not None:
            known = torch.isfinite(grad_scale).to(state.skipped_steps.device)
            finite = known if finite is None else finite & known
        seen = tuple(
            self._added(before, each, rows, finite, listener.norms.get(each.layer, before.norm))
            for before, each, rows in zip(state.seen, consumers, noted, strict=True)
        )
        return replace(
            state,
            model=model,
            seen=seen,
            skipped_steps=state.skipped_steps + (0.0 if finite is None else (~finite).to(state.skipped_steps)),
            num_steps=state.num_steps + 1,
            steps_seen={name: steps + (name in called) for name, steps in state.steps_seen.items()},
            listener=listener,
        )

    def _shared(self, consumers: tuple[Consumer, ...], noted: list[Tensor | None], like: Tensor) -> list[Tensor | None]:
        """The rows of all ranks: each has places for its own, which are empty on the others."""
        count = self.ranks.count
        if count == 1:
            return noted
        parts = []
        for each, rows in zip(consumers, noted, strict=True):
            own = rows_kept(each, max(1, self.rows // count))
            places = like.new_zeros(each.num_units, each.num_columns, count, own)
            if rows is not None:
                some = rows[..., torch.linspace(0, rows.shape[2] - 1, min(own, rows.shape[2])).long().to(rows.device)]
                places[:, :, self.ranks.own, : some.shape[2]] = some.to(places)
            parts.append(places.flatten(2))
        total = self.ranks.total(torch.cat([each.flatten() for each in parts]))
        pieces = torch.split(total, [each.numel() for each in parts])
        return [one.view_as(each) for one, each in zip(pieces, parts, strict=True)]

    def _added(self, before: Seen, consumer: Consumer, rows: Tensor | None, finite: Tensor | None, norm: str) -> Seen:
        """What was seen in the last steps and the new rows, which are empty where a number is not finite."""
        fresh = None if rows is None or finite is None else torch.where(finite.to(rows.device), rows, 0.0)
        sizes = (*before.sizes, 0 if fresh is None else fresh.shape[2])[-self.steps :]
        parts = [each for each in (before.rows.get(consumer.group), fresh) if each is not None]
        kept = min(sum(sizes), rows_kept(consumer, self.rows * self.steps))
        if not kept:
            return Seen({}, sizes, norm)
        both = torch.cat([each.to(parts[-1].device) for each in parts], 2)
        return Seen({consumer.group: both[..., -kept:].clone()}, sizes, norm)

    def forget(self, state: ReconstructionState) -> None:
        """A step passes that is not taken in: what was noted of it does not count."""
        if state.listener is not None:
            state.listener.forget()

    def release(self, state: ReconstructionState) -> None:
        """Take the hooks off the model."""
        if state.listener is not None:
            state.listener.stop()

    def hooked(self, state: ReconstructionState) -> bool:
        """Whether anything is read by hooks, in this step or before the next decision."""
        return bool(state.seen)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of a reading on each rank, in equal parts on the `steps` updates before it, which only copy."""
        total = 0.0
        for each in _consumers(groups, model):
            weight = model.get_submodule(each.layer).weight
            outputs = by_column(model.get_submodule(each.layer), weight).shape[2]  # type: ignore[arg-type]
            total += flops_of(each.num_units, each.num_columns, outputs, rows_kept(each, self.rows * self.steps))
        return total / self.steps

    @torch.no_grad()
    def read(self, state: ReconstructionState, groups: tuple[Group, ...], step: int) -> Reading:
        """Saliency of all units by the present weights, which all ranks must ask for where they are sharded."""
        by_group: dict[str, list[Map]] = {group.name: [] for group in groups}
        consumers = state.listener.consumers if state.listener else _consumers(groups, state.model)
        for seen, consumer in zip(state.seen, consumers, strict=True):
            weight = consumer.weight(state.model) * norm_scale(
                state.model, seen.norm
            )  # of all: ranks gather them together
            if consumer.group in seen.rows:
                by_group[consumer.group].append((seen.rows[consumer.group], weight))
        nothing = {group.name: np.zeros(group.num_units) for group in groups}
        saliency = {**nothing, **{name: energy_shares(maps) for name, maps in by_group.items() if maps}}
        skipped = round(float(state.skipped_steps))
        return Reading(
            step,
            saliency,
            num_samples=1,
            in_loss=False,
            num_steps=state.num_steps - skipped,
            skipped_steps=skipped,
            steps_seen=dict(state.steps_seen),
        )


def _consumers(groups: tuple[Group, ...], model: nn.Module) -> tuple[Consumer, ...]:
    layers = layers_by_weight(model)
    return tuple(consumer for group in groups for consumer in find_consumers(group, model, layers))


def norm_scale(model: nn.Module, norm: str) -> Tensor | float:
    """What a BatchNorm multiplies each of its inputs with, without its sign; 1 without a norm or its statistics."""
    if not norm:
        return 1.0
    layer: Any = model.get_submodule(norm)
    if layer.running_var is None:
        return 1.0
    deviation = (unsharded_tensor(layer.running_var) + layer.eps).sqrt()
    scale: Tensor = (
        1.0 / deviation if layer.weight is None else unsharded_tensor(layer.weight.detach()).abs() / deviation
    )
    return scale
