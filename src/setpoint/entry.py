"""An entry: one decision, what it cost and what it led to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One decision. `spent`, `reference`, `error` and `price` are by resource, per optimizer step.

    Args:
        step: optimizer steps done.
        widths: active units by group, after the decision.
        dropped: origins (original unit indices) dropped, by group.
        grown: origins brought back, by group.
        loss: last observed loss.
        val: last observed validation loss.
        seconds: wall-clock seconds since attach.
        reason: why, and what was skipped.
        spent: cost per step after the decision, as predicted, and corrected by what meters have read so far.
        metered: measured cost per step at the widths before the decision, of what a meter reads.
        predicted: predicted cost at the same widths, of the same resources.
        reference: what the reference allowed.
        error: spent / reference - 1.
        price: loss per unit of resource.
        saliency: of the dropped units, by group, in the order of `dropped`.
        worth: saliency / saving of the dropped units' blocks, by group, in the order of `dropped`.
        sensing_seconds: time spent sensing since the last entry.
        deciding_seconds: time spent deciding.
        resizing_seconds: time spent resizing model and optimizer.
        gain: probed gain of the units brought back, by group, in the order of `grown`.
        grown_worth: gain / cost of their blocks, by group, in the order of `grown`.
        probing_seconds: time spent on probing since the last entry.
        recompiles: how often compiled code was compiled again since the last entry, after the first cut.
        recompiling_seconds: time that took.
        num_dropped: where units are single weights, how many were dropped, by group; they are not listed one by one.
        num_grown: likewise, how many were grown.
        loss_after: loss of the first step after a decision that changed the model; None until it has been observed.
        limit: the budget per step by resource; a fraction is one of what a meter has read of the dense model.
        spent_run: of budgets of the whole run, what it has spent so far.
        learning_rate: the highest of the optimizers' groups in the step before the decision.
    """

    step: int
    widths: Mapping[str, int]
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    grown: Mapping[str, list[int]] = field(default_factory=dict)
    loss: float | None = None
    seconds: float = 0.0
    reason: str = ""
    spent: Mapping[str, float] = field(default_factory=dict)
    metered: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)
    price: Mapping[str, float] = field(default_factory=dict)
    saliency: Mapping[str, list[float]] = field(default_factory=dict)
    worth: Mapping[str, list[float]] = field(default_factory=dict)
    sensing_seconds: float = 0.0
    deciding_seconds: float = 0.0
    resizing_seconds: float = 0.0
    val: float | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    gain: Mapping[str, list[float]] = field(default_factory=dict)
    grown_worth: Mapping[str, list[float]] = field(default_factory=dict)
    probing_seconds: float = 0.0
    recompiles: int = 0
    recompiling_seconds: float = 0.0
    num_dropped: Mapping[str, int] = field(default_factory=dict)
    num_grown: Mapping[str, int] = field(default_factory=dict)
    loss_after: float | None = None
    limit: Mapping[str, float] = field(default_factory=dict)
    spent_run: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None

    @property
    def changed(self) -> bool:
        """Whether the decision dropped anything or brought anything back."""
        return any((*self.dropped.values(), *self.grown.values(), *self.num_dropped.values(), *self.num_grown.values()))
