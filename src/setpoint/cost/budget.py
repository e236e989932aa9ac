"""What a run is held to: a budget of a resource, a price for it, or a tolerance of loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from setpoint.errors import BudgetError
from setpoint.messages import did_you_mean, plain_fields

Resource = Literal["flops", "params", "memory", "latency", "inference", "energy"]
RESOURCES: tuple[str, ...] = get_args(Resource)
METERED = ("memory", "latency", "inference", "energy")
"""Resources that are measured where there is a meter."""


def check_resource(name: object) -> None:
    """Refuse a resource that no cost knows, with the nearest name."""
    if name not in RESOURCES:
        hint = did_you_mean(name, RESOURCES)
        raise BudgetError(f"unknown resource {name!r}: {hint}use one of {', '.join(map(repr, RESOURCES))}")


def check_means(resource: str, watts: float | None, example: Any) -> None:
    """Refuse watts that are no power, and watts or an example that a goal on this resource does not use."""
    if watts is not None:
        if not _is_finite(watts) or watts <= 0:
            raise BudgetError(f"watts is the power that a training step draws, a finite number above 0, got {watts!r}")
        if resource != "energy":
            raise BudgetError(
                f"watts is for a budget or a price of 'energy', got one of {resource!r}: add one, or leave watts out"
            )
    if example is not None and resource != "inference":
        raise BudgetError(
            f"example is for a budget or a price of 'inference', got one of {resource!r}: add one, or leave the "
            "example out"
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Budget:
    """The setpoint of the loop: how much of a resource the finished model may spend.

    Args:
        resource: "flops" (of one optimizer step, forward and backward, at the example's batch
            shape), "params" (number of parameters), "memory" (peak bytes of a training step), "latency"
            (seconds per optimizer step on this device), "inference" (seconds of one forward pass in eval mode, without
            autograd, on this device) or "energy" (joules per optimizer step).
        limit: the value not to exceed; a fraction of the dense cost when `relative`.
        per: "step" (the finished model's cost per optimizer step), or "run": what the whole run spends, overhead
            included, for "flops", "latency" (seconds from attach to the last step) and "energy".
        relative: whether `limit` is a fraction of the dense cost.
        deadband: relative error below which the controller rests.
        watts: power that a training step draws, for a budget of "energy" where no meter reads it.
        example: inputs of the timed inference, at its batch size, for a budget of "inference"; by default the
            example that `attach` is given.

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

    def __post_init__(self) -> None:
        plain_fields(self)
        check_resource(self.resource)
        if self.per not in ("step", "run"):
            raise BudgetError(f"per={self.per!r} is not known: use per='step' or per='run'")
        if not _is_finite(self.limit):
            raise BudgetError(f"a budget is a finite number above 0, got {self.limit!r}")
        if self.limit <= 0:
            raise BudgetError(f"a budget must be above 0, got {self.limit!r}: 0.5 keeps half of the dense cost")
        if self.relative and self.limit > 1:
            percent = f" and {self.limit / 100:g} is {self.limit:g} %" if self.limit <= 100 else ""
            raise BudgetError(
                f"a fraction must be at most 1, got {self.limit!r}: 1.0 is the dense model{percent}; "
                f"for an absolute limit use Budget.total({self.limit!r}, of={self.resource!r})"
            )
        if not _is_finite(self.deadband) or not 0 <= self.deadband < 1:
            raise BudgetError(f"deadband is a relative error in [0, 1), got {self.deadband!r}")
        check_means(self.resource, self.watts, self.example)

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
    ) -> Budget:
        """A fraction of what the dense model spends."""
        return cls(of, fraction, per, True, deadband, watts, example)

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
    ) -> Budget:
        """An absolute limit in the resource's own unit: FLOPs, parameters, bytes, seconds, joules.

        >>> Budget.total(0.010, of="latency")  # 10 milliseconds per step
        Budget(resource='latency', limit=0.01, per='step', relative=False, deadband=0.01)
        """
        return cls(of, limit, per, False, deadband, watts, example)

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

    Raises:
        BudgetError: for a rate that is no finite number of at least 0, or an unknown resource; for watts or an example
            that a budget would refuse.

    >>> Price(0.1, of="flops").absolute(dense=2e9)
    5e-11
    """

    rate: float
    of: str
    relative: bool = True
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        check_resource(self.of)
        _check_amount(self.rate, "a rate", "the loss that the cost is worth")
        check_means(self.of, self.watts, self.example)

    @property
    def resource(self) -> str:
        """`of`, by the name that a budget gives it."""
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

    Raises:
        BudgetError: for a loss that is no finite number of at least 0, or an unknown resource; for watts or an example
            that a budget would refuse.

    >>> Tolerance(loss=0.02)
    Tolerance(loss=0.02, of='flops')
    """

    loss: float
    of: str = "flops"
    watts: float | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        plain_fields(self)
        check_resource(self.of)
        _check_amount(self.loss, "a tolerance", "the rise in loss to accept")
        check_means(self.of, self.watts, self.example)

    @property
    def resource(self) -> str:
        """The resource, by the name that a budget gives it."""
        return self.of


def _check_amount(value: Any, name: str, meaning: str) -> None:
    if not _is_finite(value):
        raise BudgetError(f"{name} is a finite number of at least 0, got {value!r}")
    if value < 0:
        raise BudgetError(f"{name} must be at least 0, got {value!r}: it is {meaning}")


UNITS = {"flops": "FLOPs", "params": "params", "memory": "bytes", "latency": "s", "inference": "s", "energy": "J"}
"""Unit of each resource."""
UNIT = {**UNITS, "flops": "FLOP", "params": "parameter", "memory": "byte"}
"""One of it, in words."""
DENSE = {
    **{name: f"dense {name}" for name in METERED},
    "flops": "dense FLOPs",
    "params": "dense parameters",
    "inference": "dense inference time",
    "joint": "dense cost under the leading budget",
}
"""What a share of it is a share of, in words."""
IN_SECONDS = ("latency", "inference")
"""Resources that the clock measures."""
MILLISECONDS = 50
"""A budget of seconds this many times the dense cost is taken for one in milliseconds."""


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
