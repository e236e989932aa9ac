"""A cut before the first step whose readers are refitted: `setpoint.compress`, then training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import setpoint
from setpoint.spending.meter import Stopwatch
from setpoint_bench.counter import step_flops
from setpoint_bench.course import AlreadyCut, Batches, Begun, OneModel, Outcome
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import BenchError


@final
@dataclass(frozen=True)
class Fitted(OneModel):
    """The model is cut by `setpoint.compress`, which refits the layers that read the cut units in closed form.

    The data of the cut are the first batches of the training. Forwards on them count, and the matrix products of scores
    and fits; their decompositions and inverses do not, which are a few per cent of these.

    Args:
        even: the same share of all groups stays.
        num_samples: that the cut looks at.

    Raises:
        BenchError: the cut is to look at no sample.
    """

    name: str = "fitted-first"
    even: bool = False
    num_samples: int = 512
    family: str = field(default="setpoint", kw_only=True)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise BenchError(f"num_samples is at least 1, got {self.num_samples}")

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        """Cut at once, and make an optimizer for what is left."""
        dense_flops, watch = float(step_flops(model, task.example())), Stopwatch(synchronize=True)
        # The counter knows attention by its products alone.
        with watch, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            data: list[tuple[Tensor, Tensor]] = []
            while sum(len(inputs) for inputs, _ in data) < self.num_samples:
                data.append(next(batches))
            limit = setpoint.Budget.fraction(budget, of="flops")
            found = setpoint.compress(model, data, limit, even=self.even, num_samples=self.num_samples)
        outcome = Outcome(
            widths=dict(found.widths),
            dense_widths=dict(found.dense_widths),
            dense_flops=dense_flops,
            overhead_flops=counter.get_total_flops(),
            overhead_seconds=watch.seconds,
            resizes=1,
            budget_met=True,  # compress raises where it is not
        )
        return task.optimizer(model), AlreadyCut(outcome)
