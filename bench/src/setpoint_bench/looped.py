"""A loop as a benchmark sees it: it tells its widths, and in the end what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from setpoint.loop.loop import Loop
from setpoint_bench.beside import Beside
from setpoint_bench.course import Outcome


@final
class Looped:
    """The pruner that is a Setpoint loop, whatever its controller and sensor.

    Args:
        loop: attached to the model.
        beside: what acts on the same training, if anything does.
        notes: what a reader of the result must know.
    """

    def __init__(self, loop: Loop, beside: Beside | None = None, notes: str = "") -> None:
        self.loop = loop
        self.beside = beside
        self.notes = notes
        self._masked = "pattern" in loop.ledger.header

    @property
    def widths(self) -> Mapping[str, int]:
        """Active units by group; none where single weights are masked, since the model keeps its size."""
        return {} if self._masked else self.loop.widths

    def observe(self, loss: Tensor) -> None:
        """Hand the loss on."""
        if self.beside is not None:
            self.beside.observe(loss)
        self.loop.observe(loss=loss)

    def finish(self) -> Outcome:
        """Finish the loop; its summary in a benchmark's words."""
        seconds = flops = 0.0
        if self.beside is not None:
            self.beside.remove()
            seconds, flops = self.beside.seconds, self.beside.flops
        summary = self.loop.finish()
        return Outcome(
            widths=dict(summary.widths),
            dense_widths=dict(summary.dense_widths),
            dense_flops=float(summary.dense_flops),
            claimed_flops=float(summary.final_flops),
            overhead_flops=float(summary.overhead_flops) + flops,
            overhead_seconds=float(summary.overhead_seconds) + seconds,
            resizes=summary.resizes,
            budget_met=summary.budget_met,
            break_even_step=summary.break_even_step,
            density=sum(summary.widths.values()) / sum(summary.dense_widths.values()) if self._masked else None,
            theoretical_flops=summary.theoretical_flops,
            theoretical_train_flops=summary.theoretical_train_flops,
            notes=self.notes,
            ledger=self.loop.ledger,
        )
