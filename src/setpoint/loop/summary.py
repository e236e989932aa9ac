"""A summary: what a finished run came to, in FLOPs and in seconds, everything counted, and how that reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from setpoint.cost.budget import amount
from setpoint.ledger import Entry, without_nan
from setpoint.loop.control import Control
from setpoint.messages import counted, warn
from setpoint.spending.metrics import totals, verdict


@dataclass(frozen=True)
class Summary:
    """Result of a run: whether the budget is met, the final size, and what training and overhead have cost.

    FLOPs are those of forward and backward passes at the example's batch shape. The overhead is all of
    Setpoint's own work; `train_flops` and `seconds` include it. On a GPU, sensing seconds are the
    host's only.

    Args:
        budget_met: whether the model ends within the budget, and the last decision was made or none was needed.
        steps: optimizer steps done.
        total_steps: optimizer steps announced at attach.
        widths: active units by group, now.
        dense_widths: units by group, of the dense model.
        dense_flops: FLOPs of one optimizer step of the dense model.
        final_flops: FLOPs of one optimizer step of the finished model.
        final_params: parameters of the finished model, masked ones not counted.
        train_flops: FLOPs of the whole run, overhead included.
        overhead_flops: FLOPs of verification, sensing and probing.
        seconds: wall-clock seconds from attach to finish, attach included.
        overhead: seconds of Setpoint's own work by kind: "attach" (tracing and verification), "sensing" (reading
            gradients before each step), "deciding" (readings and decisions), "resizing" (cutting model and optimizer),
            "probing" (taking resting units in and out, and what probed steps took longer).
        resizes: number of cuts.
        limit: the budget, by resource, in the resource's own unit.
        spent: cost of one optimizer step of the finished model by resource, as predicted, and corrected by what meters
            have read so far; in theory, where single weights are masked.
        break_even_step: first step at which the seconds saved exceed the overhead, None if never.
        reason: why the budget is met or not.
        note: a hint about the run; "" for none.
        metered: the same as `spent`, measured; what no meter has read is not there.
        sources: by resource, what it was "measured" or "modelled" by.
        dropped_units: units that were dropped at least once.
        regrown_units: units that came back at least once.
        limit_run: by resource, what the whole run may spend (`per="run"`); `limit` then is what that left per step.
        spent_run: by resource of a run budget, what the run has spent, overhead included.
        gave_way: which goal lost when budget and loss could not both be met; "" if none did.
        theoretical_flops: FLOPs of one optimizer step of the finished model if masked weights cost nothing; None where
            whole units are cut. Dense hardware does not get faster: `final_flops` is what it computes.
        theoretical_train_flops: the same for the whole run, with the gradients of masked weights where they were read.
        final_loss: last observed loss; the losses right after each cut stand in the ledger (`Entry.loss_after`).

    >>> import torch, setpoint
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> with setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(x,)) as loop:
    ...     for _ in range(30):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.summary.budget_met, loop.summary.final_flops_ratio, loop.summary.widths
    (True, 0.5, {'0': 16})
    """

    budget_met: bool
    steps: int
    total_steps: int
    widths: Mapping[str, int]
    dense_widths: Mapping[str, int]
    dense_flops: float
    final_flops: float
    final_params: int
    train_flops: float
    overhead_flops: float
    seconds: float
    overhead: Mapping[str, float]
    resizes: int
    limit: Mapping[str, float]
    spent: Mapping[str, float]
    break_even_step: int | None
    reason: str
    note: str = ""
    metered: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    dropped_units: int = 0
    regrown_units: int = 0
    limit_run: Mapping[str, float] = field(default_factory=dict)
    spent_run: Mapping[str, float] = field(default_factory=dict)
    gave_way: str = ""
    theoretical_flops: float | None = None
    theoretical_train_flops: float | None = None
    final_loss: float | None = None

    @property
    def final_flops_ratio(self) -> float:
        """`final_flops / dense_flops`."""
        return self.final_flops / self.dense_flops if self.dense_flops else 1.0

    @property
    def overhead_flops_ratio(self) -> float:
        """`overhead_flops / train_flops`."""
        return self.overhead_flops / self.train_flops if self.train_flops else 0.0

    @property
    def overhead_seconds(self) -> float:
        """All seconds of Setpoint's own work."""
        return sum(self.overhead.values())

    def to_dict(self) -> dict[str, Any]:
        """All fields in values that JSON can hold; `Summary(**fields)` gives them back. NaN and infinity are None."""
        fields: dict[str, Any] = without_nan(asdict(self))
        return fields

    def __str__(self) -> str:
        units, dense_units = (sum(widths.values()) for widths in (self.widths, self.dense_widths))
        cost = [f"{amount(self.final_flops, 'flops')} per step, {100 * self.final_flops_ratio:.1f} % of dense"]
        if self.theoretical_flops is not None:
            cost.append(f"{amount(self.theoretical_flops, 'flops')} if masked weights cost nothing")
        for name, limit in self.limit.items():
            if name not in self.limit_run:
                how = " metered" if name in self.metered else "" if name == "params" else " predicted"
                spent = "" if name == "flops" else f"{amount(self.metered.get(name, self.spent[name]), name)}{how}, "
                cost.append(f"{spent}a budget of {amount(limit, name)}")
        for name, limit in self.limit_run.items():
            cost.append(f"{amount(self.spent_run[name], name)} of {amount(limit, name)} for the run")
        saved = "less than the overhead"
        if self.break_even_step is not None:
            saved = f"more than the overhead from step {self.break_even_step:,} on, by the clock of this run"
        loss = "" if self.final_loss is None else f", loss {self.final_loss:.4g} at the end"
        parts = [f"{name} {value:.1f}" for name, value in self.overhead.items() if value >= 0.05 or name == "attach"]
        lines = {
            "verdict": f"{'' if self.budget_met else 'budget NOT met: '}{self.reason}",
            "note": self.note,
            "cost": "; ".join(cost),
            "size": f"{self.final_params:,} parameters; {units:,} of {dense_units:,} units in "
            f"{counted(len(self.dense_widths), 'group')}, {counted(self.resizes, 'cut')}",
            "training": f"{self.steps:,} of {self.total_steps:,} steps in {self.seconds:.1f} s{loss}",
            "overhead": f"{100 * self.overhead_flops_ratio:.1f} % of the FLOPs, {self.overhead_seconds:.1f} s "
            f"({', '.join(parts)})",
            "time saved": saved,
        }
        return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


Event = Entry | Summary | None
"""What a callback is given: a decision, the summary at the end, or None after a step without a decision."""


def summarise(control: Control) -> Summary:
    """The summary of a run that has ended."""
    now, spending, actuator, widths = control.state, control.spending, control.actuator, control.widths
    masked = sum(int((~mask).sum()) for mask in actuator.masks.values())
    num_params = sum(parameter.numel() for parameter in control.host.model.parameters()) - masked
    accounted, broken = spending.costs["params"].total(widths), actuator.broken()
    spent = totals(spending, now.step, widths)
    budget_met, reason = verdict(spending, now.step, widths, now.plan)
    # The model is counted, not believed: a budget is of no use for a model that others have changed.
    if broken:
        budget_met = False
        reason = f"masked weights of {broken!r} are not zero: something other than this loop changed them"
    elif num_params != accounted:
        budget_met = False
        reason = (
            f"the model has {num_params:,} parameters, but its widths account for {accounted:,.0f}: "
            "it was changed by something other than this loop"
        )
    entries = tuple(control.ledger)
    outcome = "the budget was met" if budget_met else "the budget was missed"
    summary = Summary(
        **spent,
        budget_met=budget_met,
        reason=reason,
        widths=widths,
        dense_widths=dict(spending.dense_widths),
        final_params=num_params,
        dropped_units=_num_units(entry.dropped for entry in entries),
        regrown_units=_num_units(entry.grown for entry in entries),
        gave_way=f"{now.gave_way}; {outcome}" if now.gave_way else "",
        final_loss=control.losses.loss,
    )
    return replace(summary, note=_unspent(summary), **actuator.totals())


def _num_units(moved: Iterable[Mapping[str, list[int]]]) -> int:
    """How many units moved at least once."""
    return len({(name, unit) for groups in moved for name, units in groups.items() for unit in units})


def _unspent(summary: Summary) -> str:
    """What a run left of its bill, a budget per run beside one per step, that ended before the bill did."""
    bill = summary.limit_run.get("flops") if summary.limit else None
    unused = 0.0 if bill is None else 1 - summary.spent_run["flops"] / bill
    if unused <= 0.01 or summary.steps >= summary.total_steps:
        return ""
    return (
        f"the run ended at step {summary.steps:,}, and {unused:.0%} of the bill is unused: train for loop.total_steps "
        f"steps, which are {summary.total_steps:,} now"
    )


def warn_of_miss(summary: Summary, passes: int) -> None:
    """Warn if a run has missed its budget; `passes` are the backward passes since the last step."""
    if summary.budget_met and summary.note:
        warn(
            f"{summary.note}. A Trainer needs SetpointCallback(..., total_steps=N), N dense steps, and a larger "
            "max_steps"
        )
    began = summary.steps or passes  # where nothing was trained nobody can have missed anything
    if summary.budget_met or not {**summary.limit, **summary.limit_run} or not began:
        return
    known = {**summary.spent, **summary.metered}
    words = [
        f"a step takes {amount(known[name], name)}, the limit is {amount(limit, name)}"
        for name, limit in summary.limit.items()
        if name not in summary.limit_run
    ]
    words += [
        f"{amount(summary.spent_run[name], name)} spent, the limit of the run is {amount(limit, name)}"
        for name, limit in summary.limit_run.items()
    ]
    unseen = f"; {passes} backward passes came after the last step that was seen" if passes > 1 else ""
    warn(f"the budget is not met: {summary.reason} ({'; '.join(words)}){unseen}")
