"""Parse what a user wrote into budgets: 0.5, "8 ms latency" or {"latency": "8 ms", "memory": "4 GiB"}."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from setpoint.cost.budget import RESOURCES, Budget, Price, Tolerance, check_resource
from setpoint.errors import BudgetError
from setpoint.messages import did_you_mean

_TIMES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0}
_BYTES = {"b": 1.0, **{f"{prefix}b": value for prefix, value in _TIMES.items() if prefix}} | {
    f"{prefix}ib": 1024.0**power for power, prefix in enumerate("kmgt", start=1)
}
_COUNTS = {**_TIMES, "b": 1e9}
_FLOPS = {f"{prefix}{unit}": value for prefix, value in _TIMES.items() for unit in ("flop", "flops", "")}
_JOULES = {"j": 1.0, "mj": 1e-3, "kj": 1e3, "MJ": 1e6, "wh": 3600.0, "kwh": 3.6e6}
UNITS: dict[str, dict[str, float]] = {
    "flops": _FLOPS,
    "params": {**_COUNTS, "params": 1.0, "parameters": 1.0},
    "memory": _BYTES,
    "latency": _SECONDS,
    "inference": _SECONDS,
    "energy": _JOULES,
}
"""By resource, what a unit is worth in the resource's own; letters of any case, but mJ and MJ."""
_SAYS = {
    **{unit: "flops" for unit in _FLOPS if "flop" in unit and unit != "flops"},
    **{unit: "memory" for unit in _BYTES if len(unit) > 1},
    **dict.fromkeys(_JOULES, "energy"),
}
"""Resource of a unit that no other resource has. "b" may be bytes or billions, "flops" is the resource itself."""

_AMOUNT = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ%]*)\s*", re.IGNORECASE)
_WORDS = re.compile(r"(?P<amount>.*?)(?:\bof\b)?\s*\b(?P<of>[a-z]+)\s*", re.IGNORECASE)
_PER = re.compile(r"\s+per\s+(?P<per>run|step)\s*$", re.IGNORECASE)


def parse_budget(budget: Any) -> Any:
    """A budget, or several, from what a user writes; `Budget`, `Price` and `Tolerance` objects are taken as they are.

    A number is a fraction of the dense model's FLOPs per optimizer step, and so is a number or a percentage alone in a
    text, `"0.5"` or `"50%"`. Other texts have an amount and a resource, `"50% flops"`, `"8 ms latency"`, `"40% of flops
    per run"`, or an amount whose unit says the resource: `"3 GFLOPs"`, `"4 GiB"`. A budget is per step, and may say so:
    `"8 ms latency per step"`. A mapping has an amount by resource, with "flops/run" or "flops per run" for the bill of
    the whole run. Up to 1, FLOPs and parameters are fractions.

    >>> parse_budget(0.5)
    Budget(resource='flops', limit=0.5, per='step', relative=True, deadband=0.01)
    >>> all(parse_budget(text) == parse_budget(0.5) for text in ("0.5", "50%", "50% flops", "0.5 flops"))
    True
    >>> [budget.limit for budget in parse_budget({"latency": "8 ms", "memory": "4 GiB"})]
    [0.008, 4294967296.0]
    >>> parse_budget("4 M parameter") == parse_budget("4 M params") == parse_budget({"parameters": "4 M"})
    True
    >>> parse_budget("3 GFLOPs") == parse_budget("3 GFLOPs flops") == parse_budget({"flops": "3 G"})
    True
    >>> [parse_budget(text).per for text in ("50% flops per run", "4 MFLOPs per step", {"flops per run": 0.5})]
    ['run', 'step', 'run']
    >>> [(budget.limit, budget.per) for budget in parse_budget({"flops": "25%", "flops/run": "100%"})]
    [(0.25, 'step'), (1.0, 'run')]
    """
    if isinstance(budget, (Budget, Price, Tolerance)):
        return budget
    if _number(budget):
        return Budget.fraction(float(budget), of="flops")
    if isinstance(budget, str):
        return _by_words(budget)
    if isinstance(budget, Mapping):
        found = [_amount(*_per(str(resource)), amount) for resource, amount in budget.items()]
        return found[0] if len(found) == 1 else found
    if isinstance(budget, Sequence):
        return [parse_budget(part) for part in budget]
    return budget


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def is_time(text: Any) -> bool:
    """Whether a text is a time and does not say of what.

    >>> is_time("4 ms"), is_time("4 ms latency")
    (True, False)
    """
    value, unit = _parsed(_PER.sub("", text) if isinstance(text, str) else text)
    return value is not None and unit in _SECONDS


def _by_words(text: str) -> Budget:
    period = _PER.search(text)
    words, run = _PER.sub("", text), period is not None and period["per"].lower() == "run"
    per, (value, unit) = "run" if run else "step", _parsed(words)
    if value is not None and unit in ("", "%"):
        return _share(text, value / 100 if unit else value, "flops", per)
    if value is not None and unit in _SAYS:
        return Budget.total(value * UNITS[_SAYS[unit]][unit], of=_SAYS[unit], per=per)
    if is_time(words):
        amount = words.strip()
        of_a_step = f"'{amount} latency' for a training step, or '{amount} inference' for a forward pass"
        form = f"'{amount} latency per run'" if run else of_a_step
        raise BudgetError(f"the budget {text!r} does not say what takes so long: write {form}")
    match = _WORDS.fullmatch(words)
    if match is None or _resource(match["of"]) not in RESOURCES:
        hint = did_you_mean(match["of"], RESOURCES) if match else ""
        raise BudgetError(
            f"the budget {text!r} is not understood: {hint}{'Write' if hint else 'write'} a fraction of the dense "
            "FLOPs, such as '50%', or an amount and a resource, such as '8 ms latency' or '4 GiB memory'; resources "
            f"are {', '.join(RESOURCES)}"
        )
    return _amount(_resource(match["of"]), per, match["amount"])


def _per(key: str) -> tuple[str, str]:
    """Resource and period of a mapping's key, such as "flops" or "flops/run"."""
    period = _PER.search(key)
    before, _, after = (_PER.sub("", key), "", period["per"]) if period else key.partition("/")
    resource, per = before.strip(), after.strip().lower()
    if per not in ("", "step", "run"):
        raise BudgetError(f"{key!r} is not understood: write the resource alone, or {resource}/run for the whole run")
    return _resource(resource), per or "step"


def _resource(word: str) -> str:
    return "params" if word.lower() in ("parameters", "parameter", "param") else word.lower()


def _amount(resource: str, per: str, amount: Any) -> Budget:
    check_resource(resource)
    if _number(amount) and resource in ("flops", "params"):
        return Budget(resource, float(amount), per, relative=float(amount) <= 1)
    value, unit = _parsed(amount)
    if value is not None and not unit and value <= 1 and resource in ("flops", "params"):
        return Budget.fraction(value, of=resource, per=per)
    if value is not None and unit == "%":
        return _share(amount, value / 100, resource, per)
    if isinstance(amount, str) and (period := _PER.search(amount)):
        raise BudgetError(
            f"the budget of {resource} {amount!r} names a period: in a mapping it stands in the key, as in "
            f"{{'{resource}/{period['per'].lower()}': {_PER.sub('', amount)!r}}}"
        )
    if value is None or unit not in UNITS[resource]:
        units = {"flops": "GFLOPs", "params": "M", "memory": "GiB", "latency": "ms", "inference": "ms", "energy": "J"}
        raise BudgetError(
            f"the budget of {resource} {amount!r} is not understood: write a share such as '50%', or an amount with "
            f"its unit, such as '8 {units[resource]}'"
        )
    return Budget.total(value * UNITS[resource][unit], of=resource, per=per)


def _share(text: str, value: float, resource: str, per: str) -> Budget:
    if value > 1:
        whole = "run" if per == "run" else "model"
        longer = f", or 100% and {value:g} times the total_steps" if per == "run" else ""
        raise BudgetError(
            f"the budget {text!r} is more than the dense {whole} costs: write a share of at most 100%, such as '50%', "
            f"or an amount with its unit, such as '3 GFLOPs'{longer}"
        )
    return Budget.fraction(value, of=resource, per=per)


def _parsed(text: Any) -> tuple[float | None, str]:
    """The number and the unit in a text; no number in anything else."""
    match = _AMOUNT.fullmatch(text) if isinstance(text, str) else None
    try:
        return (float(match[1]), match[2] if match[2] == "MJ" else match[2].lower()) if match else (None, "")
    except ValueError:
        return None, ""
