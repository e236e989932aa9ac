"""Methods that prune the dense model while it trains, whole units or single weights, through a Setpoint loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn

import setpoint
from setpoint.controller.plan import Controller
from setpoint.groups.example import num_samples
from setpoint.loop.loop import Loop
from setpoint.sensor.reading import Sensor
from setpoint.weights.taylor import WeightTaylorSensor
from setpoint_bench.course import Batches, Begun, OneModel, Outcome
from setpoint_bench.simple_task import SimpleTask


@final
@dataclass(frozen=True)
class Setpoint(OneModel):
    """The dense model, pruned by a loop to the budget while it trains; a variant is another value of this class.

    Args:
        controller: decides what goes and when; None for Setpoint's own.
        sensor: makes what takes the readings; None for Setpoint's own.
        paper: where the variant comes from.
        resource: what the budget is a fraction of the dense model's, per step.
        granularity: "unit", or "weight" for masks on single weights, whose *theoretical* FLOPs meet the budget.
    """

    name: str = "setpoint"
    controller: Controller[Any] | None = None
    sensor: Callable[[], Sensor[Any]] | None = None
    family: str = field(default="setpoint", kw_only=True)
    granularity: str = "unit"
    resource: str = "flops"

    def begin(self, task: SimpleTask, model: nn.Module, budget: float, batches: Batches) -> Begun:
        optimizer = task.optimizer(model)
        loop = setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(budget, of=self.resource),
            example=task.example(),
            total_steps=task.steps,
            controller=self.controller,
            sensor=self._sensor(task),
            actuator=setpoint.Masking() if self.granularity == "weight" else None,
        )
        return optimizer, Looped(loop)

    def _sensor(self, task: SimpleTask) -> Sensor[Any] | None:
        """What takes the readings; attach's own default counts rows, so it is told where tokens are the samples."""
        if self.sensor is not None:
            return self.sensor()
        samples = task.num_samples()
        if samples == num_samples(task.example()):
            return None
        return WeightTaylorSensor(samples) if self.granularity == "weight" else setpoint.TaylorSensor(samples)


@final
class Looped:
    """The pruner that is a Setpoint loop, whatever its controller and sensor.

    Args:
        loop: attached to the model.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._masked = "pattern" in loop.ledger.header

    @property
    def widths(self) -> Mapping[str, int]:
        """Active units by group; none where single weights are masked, since the model keeps its size."""
        return {} if self._masked else self.loop.widths

    def observe(self, loss: Tensor) -> None:
        self.loop.observe(loss=loss)

    def finish(self) -> Outcome:
        """Finish the loop; its summary in a benchmark's words."""
        summary = self.loop.finish()
        return Outcome(
            widths=dict(summary.widths),
            dense_widths=dict(summary.dense_widths),
            dense_flops=float(summary.dense_flops),
            claimed_flops=float(summary.final_flops),
            overhead_flops=float(summary.overhead_flops),
            overhead_seconds=float(summary.overhead_seconds),
            resizes=summary.resizes,
            budget_met=summary.budget_met,
            break_even_step=summary.break_even_step,
            density=sum(summary.widths.values()) / sum(summary.dense_widths.values()) if self._masked else None,
            theoretical_flops=summary.theoretical_flops,
            theoretical_train_flops=summary.theoretical_train_flops,
            ledger=self.loop.ledger,
        )
