"""Parse: budgets as users write them in texts and mappings, and what may be meant by one that is none."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from setpoint.errors import BudgetError
from setpoint.messages import did_you_mean, is_number
from setpoint.runtimes import NAMES

Fields = dict[str, Any]  # of a `Budget`, by name

_TIMES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0}
_BYTES = {"b": 1.0, **{f"{prefix}b": value for prefix, value in _TIMES.items() if prefix}} | {
    f"{prefix}ib": 1024.0**power for power, prefix in enumerate("kmgt", start=1)
}
_FLOPS = {f"{prefix}{unit}": value for prefix, value in _TIMES.items() for unit in ("flop", "flops", "")}
_JOULES = {"j": 1.0, "mj": 1e-3, "kj": 1e3, "MJ": 1e6, "wh": 3600.0, "kwh": 3.6e6}
_UNITS: dict[str, dict[str, float]] = {  # in the unit of the resource; letters of any case, but mJ and MJ
    "flops": _FLOPS,
    "params": {**_TIMES, "b": 1e9, "params": 1.0, "parameters": 1.0},
    "memory": _BYTES,
    "latency": _SECONDS,
    "inference": _SECONDS,
    "energy": _JOULES,
}
_SAYS = {  # resource of a unit that no other has: "b" may be bytes or billions, "flops" is the resource itself
    **{unit: "flops" for unit in _FLOPS if "flop" in unit and unit != "flops"},
    **{unit: "memory" for unit in _BYTES if len(unit) > 1},
    **dict.fromkeys(_JOULES, "energy"),
}

_AMOUNT = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ%]*)\s*", re.IGNORECASE)
_WORDS = re.compile(r"(?P<amount>.*?)(?:\bof\b)?\s*\b(?P<of>[a-z]+)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9.e+-]+|nan|inf)\s*[a-zµ%]*\s*", re.IGNORECASE)  # also one that is no amount
_PER = re.compile(r"\s+per\s+(?P<per>run|step)\s*$", re.IGNORECASE)
_BY_WORD = {  # what users call a resource
    **dict.fromkeys(("time", "seconds", "runtime", "duration", "speed", "faster"), ("latency", "inference")),
    **dict.fromkeys(("size", "smaller", "weights", "compression"), ("params",)),
    **dict.fromkeys(("vram", "ram", "gpu"), ("memory",)),
    **dict.fromkeys(("compute", "less", "cheaper"), ("flops",)),
}


def parse(budget: str | Mapping[Any, Any], resources: Sequence[str]) -> list[Fields]:
    """The fields of each budget in a text or a mapping; `resources` are those that an error names."""
    if isinstance(budget, str):
        return [_by_words(budget, resources)]
    return [_amount(*_per(str(resource)), amount) for resource, amount in budget.items()]


def _fields(resource: str, limit: float, per: str, *, relative: bool = False) -> Fields:
    return {"resource": resource, "limit": limit, "per": per, "relative": relative}


def _by_words(text: str, resources: Sequence[str]) -> Fields:
    period = _PER.search(text)
    words, per = _PER.sub("", text), period["per"].lower() if period else "step"
    value, unit = _parsed(words)
    if value is not None and unit in ("", "%"):
        return _share(text, value / 100 if unit else value, "flops", per)
    if value is not None and unit in _SAYS:
        return _fields(_SAYS[unit], value * _UNITS[_SAYS[unit]][unit], per)
    match = _WORDS.fullmatch(words)
    if match is None or not _known(_resource(match["of"])) or not _NUMBER.fullmatch(match["amount"]):
        raise BudgetError(_unclear(text, resources))
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


def _known(word: str) -> bool:
    """Whether a word is a resource, or a runtime, which stands for the seconds of a forward there."""
    return word in _UNITS or word in NAMES


def _amount(resource: str, per: str, amount: Any, named: str = "") -> Fields:
    if resource in NAMES:
        return {**_amount("inference", per, amount, resource), "runtime": resource}
    if resource not in _UNITS:
        raise unknown(resource)
    counted = resource in ("flops", "params")
    if is_number(amount) and counted:
        return _fields(resource, float(amount), per, relative=float(amount) <= 1)
    value, unit = _parsed(amount)
    if value is not None and not unit and value <= 1 and counted:
        return _fields(resource, value, per, relative=True)
    if value is not None and unit == "%":
        return _share(amount, value / 100, resource, per)
    if value is None or unit not in _UNITS[resource]:
        units = {"flops": "GFLOPs", "params": "M", "memory": "GiB", "latency": "ms", "inference": "ms", "energy": "J"}
        bill = "" if named else f"; of the whole run, as {resource}/run"
        raise BudgetError(
            f"the budget of {named or resource} {amount!r} is not understood: write a share such as '50%', or an "
            f"amount with its unit, such as '8 {units[resource]}'{bill}"
        )
    return _fields(resource, value * _UNITS[resource][unit], per)


def _share(text: str, value: float, resource: str, per: str) -> Fields:
    if value > 1:
        whole = "run" if per == "run" else "model"
        longer = f", or 100% and {value:g} times the total_steps" if per == "run" else ""
        raise BudgetError(
            f"the budget {text!r} is more than the dense {whole} costs: write a share of at most 100%, such as '50%', "
            f"or an amount with its unit, such as '3 GFLOPs'{longer}"
        )
    return _fields(resource, value, per, relative=True)


def _parsed(text: Any) -> tuple[float | None, str]:
    """The number and the unit in a text; no number in anything else."""
    match = _AMOUNT.fullmatch(text) if isinstance(text, str) else None
    try:
        return (float(match[1]), match[2] if match[2] == "MJ" else match[2].lower()) if match else (None, "")
    except ValueError:
        return None, ""


def unknown(name: object) -> BudgetError:
    """The error for what is no resource."""
    hint = "" if name in NAMES else _meant(name, tuple(_UNITS))
    return BudgetError(
        f"unknown resource {name!r}: {hint}use one of {', '.join(map(repr, _UNITS))}; seconds "
        f"in a runtime ({', '.join(NAMES)}) are 'inference' with runtime=, or a text such as '50% onnxruntime'"
    )


def _meant(word: object, resources: Sequence[str]) -> str:
    """The hint of an error message that names the resources which a word may mean; "" where none is near."""
    known = [name for name in _BY_WORD.get(str(word).lower(), ()) if name in resources]
    runtimes = NAMES if "inference" in resources else ()
    return f"did you mean {' or '.join(known)}? " if known else did_you_mean(word, (*resources, *runtimes))


def _unclear(text: str, resources: Sequence[str]) -> str:
    """The message of the error for a text that is no budget of these resources: how to write what it may mean."""
    several = [part.strip() for part in re.split(r",|;|\s(?:and|\+|&)\s", text)]
    if len(several) > 1 and all(any(name in part.lower() for name in resources) for part in several):
        return f"the budget {text!r} is several: give attach a list, {several}, and compress one of them"
    hint = _meant("".join(re.sub(r"\s+per\s.*|[^a-z]", " ", text.lower()).split()[-1:]), resources)
    return (
        f"the budget {text!r} is not understood: {hint}write a fraction of the dense FLOPs, such as '50%', or an "
        f"amount and a resource, such as '3 GFLOPs' or '4 M params'; resources are {', '.join(resources)}"
        + (f", and seconds in {', '.join(NAMES)}" if "inference" in resources else "")
    )
