"""A summary: what a finished run came to, in FLOPs and in seconds, everything counted, and how that reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from setpoint.actuator.actuator import Actuator
from setpoint.cost.budget import amount
from setpoint.groups.group import widths_of
from setpoint.ledger import Ledger, without_nan
from setpoint.loop.losses import Losses
from setpoint.loop.state import RunState
from setpoint.messages import counted, warn
from setpoint.spending.metrics import totals, verdict
from setpoint.spending.spending import Spending


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
        parts = [f"{name} {value:.1f}" for name, value in self.overhead.items() if value >= 0.05 or name == "attach"]
        return "\n".join(
            (
                f"verdict     {'' if self.budget_met else 'budget NOT met: '}{self.reason}"
                + (f"\nnote        {self.note}" if self.note else ""),
                f"cost        {'; '.join(cost)}",
                f"size        {self.final_params:,} parameters; {units:,} of {dense_units:,} units in "
                f"{counted(len(self.dense_widths), 'group')}, {counted(self.resizes, 'cut')}",
                f"training    {self.steps:,} of {self.total_steps:,} steps in {self.seconds:.1f} s"
                + (f", loss {self.final_loss:.4g} at the end" if self.final_loss is not None else ""),
                f"overhead    {100 * self.overhead_flops_ratio:.1f} % of the FLOPs, {self.overhead_seconds:.1f} s "
                f"({', '.join(parts)})",
                f"time saved  {saved}",
            )
        )


def summarise(
    now: RunState,
    spending: Spending,
    ledger: Ledger,
    actuator: Actuator,
    num_params: int,
    dense_widths: Mapping[str, int],
    losses: Losses,
) -> Summary:
    """The summary of a run that ended in the state `now`; `num_params` of the finished model, without masked ones."""
    widths = widths_of(actuator.groups)
    spent = totals(spending, now.step, widths)
    budget_met, reason = _verdict(now, spending, actuator, num_params, widths)
    dropped = {(name, unit) for entry in ledger for name, units in entry.dropped.items() for unit in units}
    returned = {(name, unit) for entry in ledger for name, units in entry.grown.items() for unit in units}
    outcome = "the budget was met" if budget_met else "the budget was missed"
    summary = Summary(
        **spent,
        budget_met=budget_met,
        reason=reason,
        widths=widths,
        dense_widths=dense_widths,
        final_params=num_params,
        dropped_units=len(dropped),
        regrown_units=len(returned),
        gave_way=f"{now.gave_way}; {outcome}" if now.gave_way else "",
        final_loss=losses.loss,
    )
    note = "; ".join(filter(None, (_unspent(summary), _cut_late(ledger))))
    return replace(summary, note=note, **actuator.totals())


def warn_of_miss(summary: Summary, now: RunState, passes: int) -> None:
    """Warn if a run has missed its budget; `passes` are the backward passes since the last step."""
    if summary.budget_met and (unspent := _unspent(summary)):
        warn(f"{unspent}. A Trainer needs SetpointCallback(..., total_steps=N), N dense steps, and a larger max_steps")
    began = summary.steps or passes  # where nothing was trained nobody can have missed anything
    if summary.budget_met or not {**summary.limit, **summary.limit_run} or not began:
        return
    known = {**summary.spent, **summary.metered}
    words = [
        f"a step takes {amount(known[name], name)}, the limit is {amount(limit, name)}"
        for name, limit in summary.limit.items()
        if name not in summary.limit_run
    ] + [
        f"{amount(summary.spent_run[name], name)} spent, the limit of the run is {amount(limit, name)}"
        for name, limit in summary.limit_run.items()
    ]
    unseen = f"; {passes} backward passes came after the last step that was seen" if passes > 1 else ""
    text = f"the budget is not met: {summary.reason} ({'; '.join(words)}){unseen}"
    if now.waits and not now.budget_met:
        text = (
            "decisions were due while ranks had run out of batches inside join(), and all were never back: the run "
            "has not met its budget. Use one join() for each epoch, and ranks of about as many batches"
        )
    warn(text)


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


def _cut_late(ledger: Ledger) -> str:
    """A hint where the last cut fell late in the learning rate's way down: what is cut then recovers little.

    Renda, Frankle, Carbin, "Comparing rewinding and fine-tuning in neural network pruning", ICLR 2020.
    """
    rates = [entry.learning_rate for entry in ledger if entry.learning_rate is not None]
    last = next((entry for entry in reversed(list(ledger)) if entry.dropped or entry.num_dropped), None)
    if last is None or last.learning_rate is None or last.learning_rate >= _LATE * max(rates):
        return ""
    share = last.learning_rate / max(rates)
    return (
        f"the last cut, at step {last.step:,}, fell when the learning rate was {share:.0%} of the highest at a "
        "decision, and what is cut then recovers little: cut earlier (controller=PricedController(Schedule(settle="
        "...))), or let the rate fall later"
    )


_LATE = 0.25
"""Share of the highest learning rate below which a cut is late."""


def _verdict(
    now: RunState, spending: Spending, actuator: Actuator, num_params: int, widths: Mapping[str, int]
) -> tuple[bool, str]:
    """Whether the budget is met, and why or why not."""
    # The model is counted, not believed: a budget is of no use for a model that others have changed.
    broken, accounted = actuator.broken(), spending.costs["params"].total(widths)
    if broken:
        return False, f"masked weights of {broken!r} are not zero: something other than this loop changed them"
    if num_params != accounted:
        return False, (
            f"the model has {num_params:,} parameters, but its widths account for {accounted:,.0f}: "
            "it was changed by something other than this loop"
        )
    return verdict(spending, now.step, widths, now.plan)
