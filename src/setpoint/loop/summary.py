"""What a person asks of a run: what it came to, in FLOPs and seconds, and what became of one unit, and why."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from setpoint.checkpoint.plain import without_nan
from setpoint.controller.selection import ROUNDING
from setpoint.cost.budget import amount, of_dense
from setpoint.errors import GroupError
from setpoint.ledger import Entry
from setpoint.loop.control import Control
from setpoint.messages import counted, listed, warn
from setpoint.spending.metrics import totals, verdict


@dataclass(frozen=True)
class Summary:
    """Result of a run: whether the budget is met, the final size, and what training and overhead have cost.

    FLOPs are those of forward and backward passes at the example's batch shape. The overhead is all of Setpoint's own
    work; `train_flops` and `seconds` include it. On a GPU, sensing seconds are the host's only.

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
            gradients), "deciding", "resizing" (cutting model and optimizer), "probing" (visits of resting units).
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
        theoretical_flops: `final_flops` if masked weights cost nothing, which dense hardware does not offer; None where
            whole units are cut.
        theoretical_train_flops: the same for the whole run, with the gradients of masked weights where they were read.
        final_loss: last observed loss.

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
        share = of_dense(self.final_flops_ratio, "flops")
        cost = [f"{amount(self.final_flops, 'flops')} per step{'' if share in self.reason else f', {share}'}"]
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
        shares = {name: self.widths[name] / width for name, width in self.dense_widths.items()}
        least = [name for name in sorted(shares, key=shares.__getitem__) if shares[name] < 0.1]
        narrow = [f"{name} {self.dense_widths[name]} -> {self.widths[name]}" for name in least]
        lines = {
            "verdict": f"{'' if self.budget_met else 'budget NOT met: '}{self.reason}",
            "note": self.note,
            "cost": "; ".join(cost),
            "size": f"{self.final_params:,} parameters; {units:,} of {dense_units:,} units in "
            f"{counted(len(self.dense_widths), 'group')}, {counted(self.resizes, 'cut')}",
            "narrow": f"{listed(narrow, 3)}: below a tenth of the width"
            if narrow and self.theoretical_flops is None  # else single weights are counted
            else "",
            "training": f"{self.steps:,} of {self.total_steps:,} steps in {self.seconds:.1f} s{loss}",
            "overhead": f"{100 * self.overhead_flops_ratio:.1f} % of the FLOPs, {self.overhead_seconds:.1f} s "
            f"({', '.join(parts)})",
            "time saved": saved,
        }
        return "\n".join(f"{name:12}{text}" for name, text in lines.items() if text)


Event = Entry | Summary | None
"""What a callback is given: a decision, the summary at the end, or None after a step without a decision."""


def summarise(control: Control) -> Summary:
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
    elif not budget_met and (last := [entry.reason for entry in control.ledger][-1:]) and "NaN or infinite" in last[0]:
        reason = f"{reason}; {last[0]}"
    summary = Summary(
        **spent,
        budget_met=budget_met,
        reason=reason,
        widths=widths,
        dense_widths=dict(spending.dense_widths),
        final_params=num_params,
        dropped_units=_num_units(entry.dropped for entry in control.ledger),
        regrown_units=_num_units(entry.grown for entry in control.ledger),
        gave_way=f"{now.gave_way}; the budget was {'met' if budget_met else 'missed'}" if now.gave_way else "",
        final_loss=control.losses.loss,
    )
    return replace(summary, note=_unspent(summary) or _rounding(summary, control), **actuator.totals())


def _num_units(moved: Iterable[Mapping[str, list[int]]]) -> int:
    return len({(name, unit) for groups in moved for name, units in groups.items() for unit in units})


def _unspent(summary: Summary) -> str:
    """What a run left of its bill, a budget per run beside one per step, that ended before the bill did."""
    bill = summary.limit_run.get("flops") if summary.limit else None
    unused = 0.0 if bill is None else 1 - summary.spent_run["flops"] / bill
    if unused <= 0.01 or summary.steps >= summary.total_steps:
        return ""
    return (
        f"the run ended at step {summary.steps:,}, and {unused:.0%} of the run budget is unused: train for "
        f"loop.total_steps steps, which are {summary.total_steps:,} now"
    )


def _rounding(summary: Summary, control: Control) -> str:
    """What of a budget per step is unused since no block of units fits into it any more; "" for little."""
    shares = {name: summary.spent[name] / limit for name, limit in summary.limit.items()}
    name = max(shares, key=shares.__getitem__, default="")
    other = summary.limit_run or shares.keys() - {"flops", "params"} or not (summary.budget_met and summary.resizes)
    if other or not shares or shares[name] >= 1 - ROUNDING:
        return ""
    from setpoint.controller.finer import finest

    limit, back = summary.limit[name], dict[str, float]()
    for group in control.groups:
        width = group.num_units + (block := finest(group))
        if width <= summary.dense_widths[group.name]:
            wider = {**summary.widths, group.name: width}
            back[group.name] = control.spending.costs[name].saving(wider, group.name, block) / limit
    least = min(back, key=back.__getitem__, default="")
    if not least or shares[name] + back[least] <= 1:
        return ""  # a budget that was raised after the cuts is unused for another reason
    unused, taken = 100 * (1 - shares[name]), 100 * back[least]
    why = f"the smallest block that could return, of {least}, takes {taken:.1f} %"
    return f"rounding leaves {unused:.1f} % of the budget unused: {why}"


def warn_of_miss(summary: Summary, passes: int) -> None:
    """Warn if a run has missed its budget; `passes` are the backward passes since the last step."""
    if summary.budget_met and (unspent := _unspent(summary)):
        warn(f"{unspent}. A Trainer needs SetpointCallback(..., total_steps=N), N dense steps, and a larger max_steps")
    if summary.budget_met or not (summary.steps or passes) or not {**summary.limit, **summary.limit_run}:
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
    early = summary.steps < summary.total_steps and not summary.limit_run
    length = f". total_steps counts optimizer steps, not batches, and this run had {summary.steps:,}" if early else ""
    warn(f"the budget is not met: {summary.reason} ({'; '.join(words)}){unseen}{length}")


@dataclass(frozen=True)
class Explanation:
    """What became of one unit.

    Args:
        group: name of the group.
        origin: index of the unit in the dense model.
        what: what a unit is: "channel", "neuron", "head".
        alive: whether it is still part of the model.
        step: the step at which it was dropped, or that of the last reading; None if there was none.
        saliency: estimated loss increase if it is dropped, at that step; NaN if there was no reading.
        worth: saliency of its block / what the block saves, at that step; NaN where it was not evaluated.
        price: loss per unit of resource at that step; NaN if there was no decision yet.
        reason: the decision's own words.
        returned: the last step at which it came back from the reserve; None if it never did.
        gain: what its probe promised then; NaN if it never came back.
    """

    group: str
    origin: int
    what: str
    alive: bool
    step: int | None
    saliency: float
    worth: float
    price: float
    reason: str
    returned: int | None = None
    gain: float = math.nan

    def __str__(self) -> str:
        unit = f"{self.what} {self.origin} of {self.group}"
        if self.step is None:
            return f"{unit} is alive; no decision has been made yet."
        fate = "is alive" if self.alive else f"was dropped at step {self.step}"
        if self.returned is not None:
            # A cut that was taken back for the sake of the loss was not probed.
            promise = "" if math.isnan(self.gain) else f", promising to lower the loss by {self.gain:.3g},"
            fate = f"came back at step {self.returned}{promise} and {fate}"
        saliency = "unknown" if math.isnan(self.saliency) else f"{self.saliency:.3g}"
        price = "unknown" if math.isnan(self.price) else f"{self.price:.3g}"
        worth = "" if math.isnan(self.worth) else f"worth {self.worth:.3g}, "
        when = f", as read at step {self.step}" if self.alive else ""
        numbers = f"dropping it costs {saliency} of loss; {worth}price {price} (loss per unit of resource)"
        return f"{unit} {fate}: {numbers}{when}. {self.reason}".rstrip()


def explain(control: Control, group: str, origin: int, price: float, resource: str) -> Explanation:
    """What became of a unit, and why; `price` is that of the resource at the last decision."""
    dense = {candidate.name: candidate for candidate in control.dense}
    if group not in dense:
        raise GroupError(f"no group {group!r} is pruned here: use one of {', '.join(dense)}")
    if not 0 <= origin < dense[group].num_units:
        raise GroupError(f"group {group!r} has units 0 to {dense[group].num_units - 1}, got {origin}")
    what = dense[group].what
    entries = list(reversed(control.ledger[:]))
    returned, gain = None, math.nan
    back = next((entry for entry in entries if origin in entry.grown.get(group, ())), None)
    if back is not None:
        returned, gain = back.step, _at(back.gain, group, back.grown[group].index(origin))
    active = np.flatnonzero(control.actuator.origin[group] == origin)
    if not len(active):
        drop = next(entry for entry in entries if origin in entry.dropped.get(group, ()))
        at, price = drop.dropped[group].index(origin), drop.price.get(resource, math.nan)
        saliency, worth = _at(drop.saliency, group, at), _at(drop.worth, group, at)
        return Explanation(group, origin, what, False, drop.step, saliency, worth, price, drop.reason, returned, gain)
    now, at = control.state, int(active[0])
    saliency, worth = _at(now.saliency, group, at), _at(now.worth, group, at)
    step, reason, price = (now.plan.step, now.plan.reason, price) if now.plan else (None, "", math.nan)
    return Explanation(group, origin, what, True, step, saliency, worth, price, reason, returned, gain)


def _at(values: Mapping[str, Any], group: str, position: int) -> float:
    own = values.get(group, ())
    return float(own[position]) if position < len(own) else math.nan
