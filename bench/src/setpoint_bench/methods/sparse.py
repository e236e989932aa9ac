"""Masks on single weights while the dense model trains: the smallest weights go, at once or little by little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.optimizer_check import check_optimizer
from setpoint.loop.hooks import StepHooks
from setpoint.spending.meter import Stopwatch
from setpoint.weights.masking import mask_gradients, mask_weights
from setpoint_bench.course import Batches, Begun, Course, Outcome
from setpoint_bench.results import Result
from setpoint_bench.scheduled import cubic_density
from setpoint_bench.simple_task import SimpleTask, dense_widths
from setpoint_bench.task import BenchError
from setpoint_bench.weight_flops import WeightFlops, maskable_weights, weight_flops


@final
@dataclass(frozen=True)
class Sparse:
    """The dense model with masks on its weights, whose *theoretical* FLOPs meet the budget.

    Gradual magnitude pruning: all tensors have the same density, which falls along a cubic schedule, and a weight that
    has gone does not come back. With `begin = end = 0` the smallest weights go before the first step.

    Args:
        begin_at: fraction of the run that stays dense.
        end: fraction of the run by which the final density is reached.
        num_updates: number of updates in between, in runs too short for that one per step.
        density: kept fraction of the maskable weights in place of a budget; 0 to go by the budget.

    Raises:
        BenchError: for a setting out of range.

    References:
        Zhu, Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        ICLR workshop 2018. At once: Han, Pool, Tran, Dally: "Learning both weights and connections for efficient
        neural networks", NIPS 2015.
    """

    name: str
    paper: str
    begin_at: float = 0.05
    end: float = 0.7
    num_updates: int = 50
    density: float = 0.0
    learning_rate: float = 1.0
    family: str = "sparse"
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise BenchError(f"density is a share of the weights, up to 1, got {self.density:g}")
        if not 0 <= self.begin_at <= self.end <= 1 or self.num_updates < 1:
            raise BenchError(f"masks need 0 <= begin_at <= end <= 1 and at least one update, got {self!r}")

    @property
    def sized(self) -> bool:
        """Unless it has a density of its own."""
        return not self.density

    def course(self, task: SimpleTask, budget: float, needed: Mapping[str, Result]) -> Course:
        return Course(task.with_learning_rate_factor(self.learning_rate), dense_widths(task))

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        optimizer = task.optimizer(model)
        return optimizer, Masked(model, optimizer, self, task.example(), total_steps=task.steps, budget=budget)

    def densities(self, final: float, total_steps: int) -> dict[int, float]:
        """By number of steps done, the density from then on: evenly from `begin_at` to `end`, the last one final."""
        last = max(0, min(round(self.end * total_steps), total_steps - 1))
        first = min(round(self.begin_at * total_steps), last)
        ramp = {first + round((last - first) * number / self.num_updates) for number in range(1, self.num_updates + 1)}
        return {step: cubic_density((step - first) / (last - first) if last else 1.0, final=final) for step in ramp}


@final
class Masked:
    """The pruner that masks single weights. It saves nothing on this hardware; what it could save is counted apart.

    Raises:
        BenchError: for a budget that no mask can meet.
        OptimizerError: for an optimizer that would move masked weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Sparse,
        example: tuple[Tensor, ...],
        *,
        total_steps: int,
        budget: float,
    ) -> None:
        check_optimizer(optimizer)
        self.watch = Stopwatch(synchronize=True)
        with self.watch:
            self.optimizer, self.weights = optimizer, maskable_weights(model)
            self.flops = weight_flops(model, example)
            self.limit = self.flops.total if method.density else budget * self.flops.total
            self.densities = method.densities(method.density or density_at(self.flops, self.limit), total_steps)
            self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
            self.step, self.train_flops = 0, 0.0
            self._update()
        self.hooks = StepHooks((optimizer,), self._before_step, self._after_step)

    @property
    def widths(self) -> Mapping[str, int]:
        """None: the model keeps its size."""
        return {}

    def observe(self, loss: Tensor) -> None:
        """The loss decides nothing."""

    def finish(self) -> Outcome:
        """Take the hooks away; masked weights are zero."""
        self.hooks.remove()
        theoretical = self.flops.at(self._counts())
        return Outcome(
            widths=self._counts(),
            dense_widths=dict(self.flops.sizes),
            dense_flops=self.flops.total,
            overhead_seconds=self.watch.seconds,
            budget_met=theoretical <= self.limit * (1 + 1e-12),
            density=sum(self._counts().values()) / sum(self.flops.sizes.values()),
            theoretical_flops=theoretical,
            theoretical_train_flops=self.train_flops,
        )

    def _counts(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def _before_step(self, grad_scale: Tensor | None) -> None:
        self.train_flops += self.flops.at(self._counts())
        if self.step:  # the update at step 0 was made before the first step
            with self.watch, torch.no_grad():
                self._update()
        mask_gradients(self.weights, self.masks)

    def _after_step(self) -> None:
        self.step += 1

    def _update(self) -> None:
        """Keep the largest active weights of each tensor where an update is due."""
        if self.step in self.densities:
            for name, count in counts_at(self.flops.sizes, self.densities[self.step]).items():
                scores = self.weights[name].detach().abs().masked_fill(~self.masks[name], -1.0)
                self.masks[name] = highest(scores, count)
            mask_weights(self.weights, self.optimizer, self.masks)


def highest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest scores, of equal ones the first; NaN is lower than anything.

    >>> highest(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 2).tolist()
    [[False, True], [True, False]]
    """
    flat = torch.where(scores.isnan(), -torch.inf, scores).flatten()
    order = flat.argsort(descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def counts_at(sizes: Mapping[str, int], density: float) -> dict[str, int]:
    """Active weights of each tensor, at least one, when all have this density.

    >>> counts_at({"a": 100, "b": 20}, 0.25)
    {'a': 25, 'b': 5}
    """
    return {name: max(1, round(density * size)) for name, size in sizes.items()}


def density_at(flops: WeightFlops, limit: float) -> float:
    """The highest density whose theoretical FLOPs are within the limit.

    Raises:
        BenchError: even one weight in each tensor costs more; the message says how much.
    """

    def fits(density: float) -> bool:
        return flops.at(counts_at(flops.sizes, density)) <= limit

    if not fits(0.0):
        least = flops.at(counts_at(flops.sizes, 0.0)) / flops.total
        raise BenchError(
            f"masks on weights cannot bring the theoretical FLOPs to {limit / flops.total:.4g} of dense: "
            f"what they do not save is {least:.4g}; ask for at least that budget"
        )
    return 1.0 if fits(1.0) else _bisected(fits)


def _bisected(fits: Callable[[float], bool]) -> float:
    """The highest number in [0, 1] that fits, when all lower ones do too."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
