"""What a run is held to: a budget of a resource, a price for it, or a tolerance of loss; and how users write it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from setpoint.errors import BudgetError
from setpoint.messages import is_number, plain_fields

Resource = Literal["flops", "params", "memory", "latency", "inference", "energy"]
RESOURCES: tuple[str, ...] = get_args(Resource)
METERED = ("memory", "latency", "inference", "energy")  # resources that are measured where there is a meter


def check_resource(name: object) -> None:
    if name not in RESOURCES:
        from setpoint.cost.parse import unknown  # it reads texts, of which many runs have none

        raise unknown(name)


def _check_common(goal: Any) -> None:
    """The resource, and what says how it is measured; a runtime that was written as text becomes one."""
    if goal.runtime is not None:
        from setpoint.runtimes import as_runtime

        object.__setattr__(goal, "runtime", as_runtime(goal.runtime))
    plain_fields(goal)
    check_resource(goal.resource)
    if goal.watts is not None and not (_is_finite(goal.watts) and goal.watts > 0):
        raise BudgetError(f"watts is the power that a training step draws, a finite number above 0, got {goal.watts!r}")
    for name, used_by in (("watts", "energy"), ("example", "inference"), ("runtime", "inference")):
        if getattr(goal, name) is not None and goal.resource != used_by:
            raise BudgetError(f"{name} is for a budget or a price of {used_by!r}, got one of {goal.resource!r}")


def _check_amount(value: Any, name: str, meaning: str) -> None:
    if not _is_finite(value) or value < 0:
        raise BudgetError(f"{name} is a finite number of at least 0, {meaning}, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Budget:
    """The setpoint of the loop: how much of a resource the finished model may spend.

    Args:
        resource: "flops" (of one optimizer step, forward and backward, at the example's batch
            shape), "params" (number of parameters), "memory" (peak bytes of a training step), "latency"
            (seconds per optimizer step on this device), "inference" (seconds of one forward in a runtime, by default
            in PyTorch without autograd, operation by operation, which nobody serves) or "energy" (joules per optimizer
            step).
        limit: the value not to exceed; a fraction of the dense cost when `relative`.
        per: "step" (the finished model's cost per optimizer step), or "run": what the whole run spends, overhead
            included, for "flops", "latency" (seconds from attach to the last step) and "energy".
        relative: whether `limit` is a fraction of the dense cost.
        deadband: relative error below which the controller rests.
        watts: power that a training step draws, for a budget of "energy" where no meter reads it.
        example: inputs of the timed inference, at its batch size, for a budget of "inference"; by default the
            example that `attach` is given, and of that one sample where a runtime is named.
        runtime: where "inference" is timed: one of `setpoint.runtimes`, its name, or a function
            `(model, example) -> seconds`.

    Raises:
        BudgetError: for a limit that is not a positive finite number, a fraction over 1, an unknown resource, or
            what `check_means` refuses.

    >>> Budget.fraction(0.5, of="flops").limit
    0.5
    """

    resource: str
    limit: float
    per: str = "step"
    relative: bool = False
    deadband: float = 0.01
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)
    runtime: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_common(self)
        if self.per not in ("step", "run"):
            raise BudgetError(f"per={self.per!r} is not known: use per='step' or per='run'")
        if not _is_finite(self.limit) or self.limit <= 0:
            raise BudgetError(
                f"a budget is a finite number above 0, got {self.limit!r}: 0.5 keeps half of the dense cost"
            )
        if self.relative and self.limit > 1:
            raise BudgetError(
                f"a fraction must be at most 1, got {self.limit!r}: 1.0 is the dense model and 0.5 is 50 %; for an "
                f"absolute limit use Budget.total({self.limit!r}, of={self.resource!r})"
            )
        if not _is_finite(self.deadband) or not 0 <= self.deadband < 1:
            raise BudgetError(f"deadband is a relative error in [0, 1), got {self.deadband!r}")

    @classmethod
    def fraction(
        cls,
        fraction: float,
        *,
        of: str,
        per: str = "step",
        deadband: float = 0.01,
        watts: float | None = None,
        example: Any = None,
        runtime: Any = None,
    ) -> Budget:
        """A fraction of what the dense model spends."""
        return cls(of, fraction, per, True, deadband, watts, example, runtime)

    @classmethod
    def total(
        cls,
        limit: float,
        *,
        of: str,
        per: str = "step",
        deadband: float = 0.01,
        watts: float | None = None,
        example: Any = None,
        runtime: Any = None,
    ) -> Budget:
        """An absolute limit in the resource's own unit: FLOPs, parameters, bytes, seconds, joules.

        >>> Budget.total(0.010, of="latency")  # 10 milliseconds per step
        Budget(resource='latency', limit=0.01, per='step', relative=False, deadband=0.01)
        """
        return cls(of, limit, per, False, deadband, watts, example, runtime)

    @property
    def named(self) -> str:
        """As a user writes what it is of: the resource, or the runtime."""
        return self.resource if self.runtime is None else str(self.runtime.name)

    def absolute(self, dense: float) -> float:
        """The limit in the resource's own unit, given the dense cost."""
        return self.limit * dense if self.relative else float(self.limit)


@dataclass(frozen=True)
class Price:
    """An exchange rate between loss and a resource; the size of the model follows from it.

    The loop then minimises

        loss + rate * cost(widths) / cost(dense)      with relative=True, the default,
        loss + rate * cost(widths)                    with relative=False,

    so a block of units stays while its saliency is at least the rate times its saving. A rate of 0.1 says: the whole
    dense cost is worth 0.1 of loss, hence a unit that costs a hundredth of it must earn 0.001.

    To choose a rate, decide what rise in loss you would accept for halving the cost, and double that rise. If you have
    a tariff, multiply the money that a run costs at dense size by the loss that you would give for a unit of money.

    Args:
        rate: loss for the dense cost, or for a unit of the resource; at least 0. At 0 nothing is dropped.
        of: the resource.
        relative: whether the rate is for the dense cost.
        watts: power that a training step draws, for "energy" where no meter reads it.
        example: inputs of one inference, for "inference"; by default the example that `attach` is given.
        runtime: where "inference" is timed, as of a `Budget`.

    Raises:
        BudgetError: for a rate that is no finite number of at least 0, and for what a budget would refuse.

    >>> Price(0.1, of="flops").absolute(dense=2e9)
    5e-11
    """

    rate: float
    of: str
    relative: bool = True
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)
    runtime: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_common(self)
        _check_amount(self.rate, "a rate", "the loss that the cost is worth")

    @property
    def resource(self) -> str:
        return self.of

    def absolute(self, dense: float) -> float:
        """Loss per unit of the resource, given the dense cost in that unit."""
        return self.rate / dense if self.relative and dense > 0 else float(self.rate)


@dataclass(frozen=True)
class Tolerance:
    """How far the observed loss may rise over its trend; the size of the model follows from it.

    Each cut is judged by the loss that `loop.observe(loss=...)` reports: how far that loss lies above its trend before
    the cut. The rises of all cuts are added up. A cut that takes the sum beyond the tolerance is taken back.

    Args:
        loss: highest rise over the trend, in the unit of the loss; at least 0.
        of: the resource to save.
        watts: power that a training step draws, for "energy" where no meter reads it.
        example: inputs of one inference, for "inference"; by default the example that `attach` is given.
        runtime: where "inference" is timed, as of a `Budget`.

    Raises:
        BudgetError: for a loss that is no finite number of at least 0, and for what a budget would refuse.

    >>> Tolerance(loss=0.02)
    Tolerance(loss=0.02, of='flops')
    """

    loss: float
    of: str = "flops"
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)
    runtime: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_common(self)
        _check_amount(self.loss, "a tolerance", "the rise in loss to accept")

    @property
    def resource(self) -> str:
        return self.of


# Resources and amounts in words.

UNITS = {"flops": "FLOPs", "params": "params", "memory": "bytes", "latency": "s", "inference": "s", "energy": "J"}
UNIT = {**UNITS, "flops": "FLOP", "params": "parameter", "memory": "byte"}  # one of it, in words
DENSE = {  # what a share of it is a share of, in words
    **{name: f"dense {name}" for name in METERED},
    "flops": "dense FLOPs",
    "params": "dense parameters",
    "inference": "dense inference time",
    "joint": "dense cost under the leading budget",
}
IN_SECONDS = ("latency", "inference")  # resources that the clock measures
MILLISECONDS = 50  # a budget of seconds this many times the dense cost is taken for one in milliseconds


def amount(value: float, resource: str) -> str:
    """A cost in words, with its unit.

    >>> amount(12345678.0, "flops"), amount(0.01234, "latency"), amount(1234567, "params")
    ('12.35 MFLOPs', '12.3 ms', '1,234,567 params')
    """
    if UNITS[resource] == "s" and value < 1:
        return f"{1000 * value:.3g} ms"
    if UNITS[resource] in ("s", "J"):
        return f"{value:.3g} {UNITS[resource]}"
    if resource == "params":
        return f"{value:,.0f} params"
    power = min(int(math.log10(value) // 3), 5) if value >= 1000 else 0
    unit = "FLOPs" if resource == "flops" else "B" if power else "bytes"
    return f"{value / 1000**power:.4g} {' kMGTP'[power].strip()}{unit}"


def of_dense(ratio: float, resource: str) -> str:
    """A share of what the dense model spends: "49.9 % of the dense FLOPs"."""
    return f"{100 * ratio:.1f} % of the {DENSE.get(resource, resource)}"


def parse_budget(budget: Any, resources: Sequence[str] = RESOURCES) -> Any:
    """A budget, or several, from what a user writes; `Budget`, `Price` and `Tolerance` objects are taken as they are.

    A number, or a number or a percentage alone in a text, is a fraction of the dense model's FLOPs per optimizer step.
    Other texts have an amount and a resource, `"8 ms latency"`, `"40% of flops per run"`, or an amount whose unit says
    the resource, `"3 GFLOPs"`. A runtime stands for the seconds of a forward there, `"8 ms onnxruntime"`. A mapping
    has an amount by resource, with "flops/run" or "flops per run" for the whole run. Up to 1, FLOPs and
    parameters are fractions.

    >>> parse_budget(0.5)
    Budget(resource='flops', limit=0.5, per='step', relative=True, deadband=0.01)
    >>> all(parse_budget(text) == parse_budget(0.5) for text in ("0.5", "50%", "50% flops", "0.5 flops"))
    True
    >>> [budget.limit for budget in parse_budget({"latency": "8 ms", "memory": "4 GiB"})]
    [0.008, 4294967296.0]
    >>> budget = parse_budget("8 ms compiled")
    >>> budget, budget.runtime
    (Budget(resource='inference', limit=0.008, per='step', relative=False, deadband=0.01), Compiled())
    >>> parse_budget("4 M parameter") == parse_budget("4 M params") == parse_budget({"parameters": "4 M"})
    True
    >>> [(budget.limit, budget.per) for budget in parse_budget({"flops": "25%", "flops/run": "100%"})]
    [(0.25, 'step'), (1.0, 'run')]
    """
    if is_number(budget):
        return Budget.fraction(float(budget), of="flops")
    if isinstance(budget, (str, Mapping)):
        from setpoint.cost.parse import parse

        found = [Budget(**fields) for fields in parse(budget, resources)]
        return found[0] if len(found) == 1 else found
    if isinstance(budget, Sequence):
        return [parse_budget(part) for part in budget]
    return budget
