"""Patterned readings: saliencies of single weights, so that the least salient go as an N:M pattern lets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import numpy as np
from jaxtyping import Float64
from torch import Tensor, nn

from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading, Sensor
from setpoint.weights.find import Pattern, active_of
from setpoint.weights.taylor import Weighing


@dataclass(frozen=True, eq=False)
class PatternedState:
    """The inner sensor's state, and the shapes of the weight tensors by group."""

    inner: Any
    shapes: Mapping[str, tuple[int, ...]] = field(metadata={"live": True})


@final
class Patterned(Sensor[PatternedState]):
    """A sensor of single weights whose readings keep to a pattern."""

    def __init__(self, inner: Sensor[Any], pattern: Pattern) -> None:
        self._inner, self._pattern = inner, pattern
        self.traits = inner.traits

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """What the inner sensor can read."""
        return self._inner.readable(groups, model)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> PatternedState:
        """The inner sensor's state."""
        shapes = {group.name: tuple(model.get_parameter(group.name).shape) for group in groups}
        return PatternedState(self._inner.init(groups, model), shapes)

    def update(
        self, state: PatternedState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> PatternedState:
        """Take in one optimizer step."""
        return replace(state, inner=self._inner.update(state.inner, groups, model, grad_scale))

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update."""
        return self._inner.flops(groups, model)

    def read(self, state: PatternedState, groups: tuple[Group, ...], step: int) -> Reading:
        """Saliencies as the pattern has them; scores are the inner sensor's own."""
        reading = self._inner.read(state.inner, groups, step)
        scores = partial(self._inner.scores, state.inner) if isinstance(self._inner, Weighing) else reading.scores
        return replace(patterned(reading, groups, state.shapes, self._pattern), scores=scores)


def patterned(
    reading: Reading, groups: tuple[Group, ...], shapes: Mapping[str, tuple[int, ...]], pattern: Pattern
) -> Reading:
    """The reading with saliencies raised where the pattern, unless it is free, holds a weight back.

    A tensor loses `pattern.stride` weights of each block at a time, the least salient of the block. So that the least
    salient weights of the tensor are just these, what goes later counts as at least a hair more than all that go
    earlier.
    """
    if pattern.free or not reading.finite():
        return reading
    return replace(
        reading, saliency={g.name: _raised(reading.saliency[g.name], g, shapes[g.name], pattern) for g in groups}
    )


def _raised(
    saliency: Float64[np.ndarray, " units"], group: Group, shape: tuple[int, ...], pattern: Pattern
) -> Float64[np.ndarray, " units"]:
    active = active_of(group)
    whole = np.full(active.size, -np.inf)
    whole[active] = saliency
    blocks = pattern.blocks(whole.reshape(shape))
    ranks = np.argsort(np.argsort(blocks, axis=-1, kind="stable"), axis=-1)
    ranks -= np.isneginf(blocks).sum(-1, keepdims=True)
    raised, floor = blocks.copy(), -np.inf
    for stride in range(-(-pattern.block // pattern.stride)):
        here = (ranks >= stride * pattern.stride) & (ranks < (stride + 1) * pattern.stride)
        raised[here] = np.maximum(raised[here], floor)
        if here.any():
            floor = np.nextafter(raised[here].max(), np.inf)
    result: Float64[np.ndarray, " units"] = np.moveaxis(raised, -1, 2).reshape(-1)[active]
    return result
