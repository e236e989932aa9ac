"""The ledger: an append-only record of every decision and what it cost."""

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
        seconds: wall-clock seconds since attach.
        reason: why, and what was skipped.
        spent: predicted cost per step after the decision.
        reference: what the reference allowed.
        error: spent / reference - 1.
        price: loss per unit of resource.
        saliency: of the dropped units, by group, in the order of `dropped`.
        worth: saliency / saving of the dropped units' blocks, by group, in the order of `dropped`.
        sensing_seconds: time spent sensing since the last entry.
        deciding_seconds: time spent deciding.
        resizing_seconds: time spent resizing model and optimizer.
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
