"""Unclear: what a text that is no budget is read as, and the budgets that are nearest to it."""

import re
from collections.abc import Sequence

from setpoint.messages import did_you_mean

_PARTS = re.compile(
    r"(?P<number>[0-9]*\.?[0-9]+)\s*(?P<unit>%|percent|x|times|thousand|million|billion|min|ms|us|µs|[kmgsh])"
    r"(?:\s+of)?(?:\s+the)?\s*(?P<word>[a-z]*)\s*(?P<per>(?:per\s+(?:run|step))?)",
    re.IGNORECASE,
)
_LARGE = {"thousand": "k", "million": "M", "billion": "G", "k": "k", "m": "M", "g": "G"}
_SECONDS = ("s", "ms", "us", "µs", "min", "h")
_NEAREST = {  # by what a share is of
    "the time": "'{0} latency' (of a training step) or '{0} inference' (of a forward pass)",
    "the size": "'{0} params'",
    "the dense model": "'{0}' (of the FLOPs), '{0} latency' or '{0} params'",
}
_OF = {
    **dict.fromkeys(("time", "seconds", "runtime", "duration", "speed", "faster"), "the time"),
    **dict.fromkeys(("size", "smaller", "weights", "compression"), "the size"),
    "": "the dense model",
}


def unclear(text: str, resources: Sequence[str]) -> str:
    """The message of the error for a text that is no budget.

    >>> unclear("10 M", ("flops",))
    "the budget '10 M' does not say of what: write '10 M params' or '10 MFLOPs'"
    >>> unclear("2x smaller", ("flops",))
    "the budget '2x smaller' is not understood. Read as 50% of the size it is '50% params'"
    """
    parts = _PARTS.fullmatch(text.strip())
    nearest = _nearest(**parts.groupdict()) if parts else ""
    if nearest:
        return f"the budget {text!r} {nearest}"
    last = re.search(r"[a-z]+$", re.sub(r"\s+per\s+(run|step)\s*$", "", text.strip().lower()))
    return (
        f"the budget {text!r} is not understood: {did_you_mean(last[0], resources) if last else ''}write a fraction of "
        "the dense FLOPs, such as '50%', or an amount and a resource, such as '8 ms latency' or '4 GiB memory'; "
        f"resources are {', '.join(resources)}"
    )


def _nearest(number: str, unit: str, word: str, per: str) -> str:
    unit, word = unit.lower(), word.lower()
    if unit in _SECONDS and not word:
        said = f"'{number} {unit}"
        step = f"{said} latency' for a training step, or {said} inference' for a forward pass"
        return "does not say what takes so long: write " + (f"{said} latency per run'" if per.endswith("run") else step)
    if unit in _LARGE and not word:
        large = _LARGE[unit]
        return f"does not say of what: write '{number} {large} params' or '{number} {large}FLOPs'"
    share = float(number)
    if unit in ("x", "times"):
        share = 100 / share if share > 1 else 100 * share
    elif word in ("faster", "smaller"):
        share = 100 - share
    if unit in _LARGE or unit in _SECONDS or word not in _OF or not 0 < share <= 100:
        return ""
    return f"is not understood. Read as {share:.3g}% of {_OF[word]} it is {_NEAREST[_OF[word]].format(f'{share:.3g}%')}"
