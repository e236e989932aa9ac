"""A loop as a benchmark sees it: it tells its widths, and in the end what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from setpoint.loop.loop import Loop
from setpoint_bench.course import Outcome


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
