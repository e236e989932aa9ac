"""Unclear: what a text that is no budget may mean, and the budgets that are nearest to it."""

import re
from collections.abc import Sequence

from setpoint.messages import did_you_mean
from setpoint.runtimes import NAMES

_PARTS = re.compile(
    r"([0-9]*\.?[0-9]+)\s*(%|(?:percent|x|times|thousand|million|billion|(?:milli)?seconds?|minutes?|hours?|min|[mu]s"
    r"|µs|[kmgt]i?b|[kmgsh])(?![a-z]))(?:\s+of)?(?:\s+the)?\s*([a-z ]*?)\s*(?:per\s+(run|step))?"
)
_UNIT = {"x": "%", "times": "%", "percent": "%", "thousand": "k", "million": "M", "billion": "G", "m": "M", "g": "G"}
_UNIT |= {"milliseconds": "ms", "second": "s", "seconds": "s", "minutes": "min", "hour": "h", "hours": "h"}
_BY_UNIT = {  # what an amount may be of, the likely ones first; bytes are of memory
    "%": ("flops", "latency", "params", "inference", "memory", "energy"),
    **dict.fromkeys(("k", "M", "G"), ("params", "flops")),
    **dict.fromkeys(("us", "µs", "ms", "s", "min", "h"), ("latency", "inference")),
}
_BY_WORD = {  # what users call a resource
    **dict.fromkeys(("time", "seconds", "runtime", "duration", "speed", "faster"), ("latency", "inference")),
    **dict.fromkeys(("inference time", "inference latency"), ("inference",)),
    **dict.fromkeys(("size", "model size", "smaller", "weights", "compression"), ("params",)),
    **dict.fromkeys(("vram", "ram", "gpu", "gpu memory", "peak memory"), ("memory",)),
    **dict.fromkeys(("compute", "less", "cheaper"), ("flops",)),
}
_GLOSS = {"latency": " (of a training step)", "inference": " (of a forward pass)"}


def meant(word: object, resources: Sequence[str]) -> str:
    """The hint of an error message that names the resources which a word may mean; "" where none is near."""
    known = [name for name in _BY_WORD.get(str(word).lower(), ()) if name in resources]
    runtimes = NAMES if "inference" in resources else ()
    return f"did you mean {' or '.join(known)}? " if known else did_you_mean(word, (*resources, *runtimes))


def unclear(text: str, resources: Sequence[str]) -> str:
    """The message of the error for a text that is no budget of these resources: how to write what it may mean."""
    several = [part.strip() for part in re.split(r",|;|\s(?:and|\+|&)\s", text)]
    if len(several) > 1 and all(any(name in part.lower() for name in resources) for part in several):
        return f"the budget {text!r} is several: give attach a list, {several}, and compress one of them"
    parts = _PARTS.fullmatch(text.strip().lower())
    if parts and (forms := _forms(resources, *parts.groups())):
        return f"the budget {text!r} {'is not understood' if parts[3] else 'does not say of what'}: write {forms}"
    hint = meant("".join(re.sub(r"\s+per\s.*|[^a-z]", " ", text.lower()).split()[-1:]), resources)
    return (
        f"the budget {text!r} is not understood: {hint}write a fraction of the dense FLOPs, such as '50%', or an "
        f"amount and a resource, such as '3 GFLOPs' or '4 M params'; resources are {', '.join(resources)}"
        + (f", and seconds in {', '.join(NAMES)}" if "inference" in resources else "")
    )


def _forms(resources: Sequence[str], number: str, unit: str, word: str, per: str | None) -> str:
    known, share = _UNIT.get(unit, unit), float(number)
    if unit in ("x", "times"):
        share = 100 / share if share > 1 else 100 * share
    elif word in ("faster", "smaller", "less", "cheaper"):
        share = 100 - share
    said = f"{share:.3g}%" if known == "%" else f"{number} {known}"
    after = " per run" if per == "run" or known in ("min", "h") else ""
    able = [name for name in resources if not after or name in ("flops", "latency", "energy")]
    named = _BY_WORD.get(word, (word,)) if word else able
    fits = [name for name in _BY_UNIT.get(known, ("memory",)) if name in able and name in named]
    if known == "%":
        fits = (fits or ["flops"] * (word in _BY_WORD)) if 0 < share <= 100 else []
    return " or ".join(f"'{said} {name}{after}'{'' if after else _GLOSS.get(name, '')}" for name in fits[:3])
