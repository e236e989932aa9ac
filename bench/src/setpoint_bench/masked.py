"""Training with masks on single weights: a rule chooses them, hooks on the optimizer keep them, FLOPs are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.optimizer_check import check_optimizer
from setpoint.loop.hooks import StepHooks
from setpoint.spending.seconds import Stopwatch
from setpoint.weights.masking import mask_gradients, mask_weights
from setpoint_bench.baselines.erk import erk_densities
from setpoint_bench.baselines.rule import Allocation, Masks, Rule, Sight, Target
from setpoint_bench.course import Outcome
from setpoint_bench.task import BenchError
from setpoint_bench.weight_flops import WeightFlops, maskable_weights, weight_flops


@final
class Masked:
    """The pruner that masks single weights. It saves nothing on this hardware; what it could save is counted beside.

    Args:
        model: the model; its masked weights are zero from here on.
        optimizer: trains it, and treats every entry alike.
        rule: chooses the masks.
        example: positional inputs, at the batch shape to count FLOPs at.
        total_steps: optimizer steps of the run.
        budget: theoretical FLOPs of a step at the end, as a fraction of dense.
        density: kept fraction of the maskable weights instead, if not None.

    Raises:
        BenchError: for a budget or density that no mask can meet.
        OptimizerError: for an optimizer that would move masked weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: Rule,
        example: tuple[Tensor, ...],
        *,
        total_steps: int,
        budget: float,
        density: float | None = None,
    ) -> None:
        check_optimizer(optimizer)
        self.watch = Stopwatch(synchronize=True)
        with self.watch:
            self.optimizer, self.rule, self.total_steps = optimizer, rule, total_steps
            self.weights = maskable_weights(model)
            self.flops = weight_flops(model, example)
            self.limit = budget * self.flops.total
            shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
            if density is None:
                self.target = target_at_flops(shapes, self.flops, rule.allocation, self.limit)
            else:
                self.target = target_at_density(shapes, rule.allocation, density)
                self.limit = self.flops.total
            self.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
            self.step, self.train_flops = 0, 0.0
            self._set(rule.start(self._values(), self.target, self.generator))
        self.hooks = StepHooks((optimizer,), self._before_step, self._after_step)

    @property
    def widths(self) -> Mapping[str, int]:
        """None: the model keeps its size."""
        return {}

    def observe(self, loss: Tensor) -> None:
        """No rule looks at the loss."""

    def finish(self) -> Outcome:
        """Take the hooks away; masked weights are zero."""
        self.hooks.remove()
        sizes = dict(self.flops.sizes)
        theoretical = self.flops.at(self.counts)
        return Outcome(
            widths=dict(self.counts),
            dense_widths=sizes,
            dense_flops=self.flops.total,
            overhead_seconds=self.watch.seconds,
            budget_met=theoretical <= self.limit * (1 + 1e-12),
            density=sum(self.counts.values()) / sum(sizes.values()),
            theoretical_flops=theoretical,
            theoretical_train_flops=self.train_flops,
        )

    def _before_step(self, grad_scale: Tensor | None) -> None:
        self.train_flops += self.flops.at(self.counts)
        if self.rule.due(self.step, self.total_steps):
            with self.watch, torch.no_grad():
                if self.rule.dense_gradient:
                    self.train_flops += self.flops.dense_gradients(self.counts)
                gradients = {name: _gradient(weight) for name, weight in self.weights.items()}
                sight = Sight(self.step, self.total_steps, self._values(), gradients, self.masks)
                self._set(self.rule.update(sight, self.target, self.generator))
        mask_gradients(self.weights, self.masks)

    def _after_step(self) -> None:
        self.step += 1

    def _values(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}

    def _set(self, masks: Masks) -> None:
        self.masks = dict(masks)
        self.counts = {name: int(mask.sum()) for name, mask in masks.items()}
        mask_weights(self.weights, self.optimizer, self.masks)


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


Shapes = Mapping[str, tuple[int, ...]]


def counts_at(shapes: Shapes, allocation: Allocation, density: float) -> dict[str, int]:
    """Active weights of each tensor, at least one, when all together have this density.

    Args:
        shapes: of the maskable weights, by name.
        allocation: how the density is spread.
        density: kept fraction of them all, in [0, 1].

    >>> counts_at({"a": (10, 10), "b": (4, 5)}, "uniform", 0.25)
    {'a': 25, 'b': 5}
    """
    each = erk_densities(shapes, density) if allocation == "erk" else dict.fromkeys(shapes, density)
    return {name: max(1, round(each[name] * torch.Size(shape).numel())) for name, shape in shapes.items()}


def target_at_density(shapes: Shapes, allocation: Allocation, density: float) -> Target:
    """The target of a density; rules that rank all tensors together may keep so many weights in all.

    Raises:
        BenchError: for a density that is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise BenchError(f"a density is the kept fraction of the weights, above 0 and at most 1, got {density:g}")
    counts = counts_at(shapes, allocation, density)
    return Target(counts, dict.fromkeys(shapes, 1.0), float(sum(counts.values())))


def target_at_flops(shapes: Shapes, flops: WeightFlops, allocation: Allocation, limit: float) -> Target:
    """The target of the highest density whose theoretical FLOPs are within the limit.

    Raises:
        BenchError: even one weight in each tensor costs more; the message says how much.
    """

    def fits(density: float) -> bool:
        return flops.at(counts_at(shapes, allocation, density)) <= limit

    if not fits(0.0):
        least = flops.at(counts_at(shapes, allocation, 0.0)) / flops.total
        raise BenchError(
            f"masks on weights cannot bring the theoretical FLOPs to {limit / flops.total:.4g} of dense: "
            f"what they do not save is {least:.4g}; ask for at least that budget"
        )
    density = _highest(fits)
    return Target(counts_at(shapes, allocation, density), flops.per_weight(), limit - flops.fixed())


def _highest(fits: Callable[[float], bool]) -> float:
    """The highest number in [0, 1] that fits, when all lower ones do too."""
    low, high = 0.0, 1.0
    if fits(high):
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
