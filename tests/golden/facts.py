"""Facts: what of a run is compared, under names that stay.

On the left of each table stands the golden name, which is in the files and never changes; on the right where the code
has it today. A field that is renamed is changed here, on the right, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import setpoint


def unchanged(*names: str) -> dict[str, str]:
    """Fields that have their golden names today."""
    return {name: name for name in names}


# Of an entry: what was decided, on what grounds, and what a person reads.
PLAN = unchanged("step", "widths", "dropped", "grown", "num_dropped", "num_grown")
NUMBERS = unchanged("loss", "val", "spent", "reference", "error", "price", "saliency", "worth", "gain", "grown_worth")
NUMBERS |= unchanged("loss_after", "limit", "spent_run")
WORDS = unchanged("reason")

HEADER = {
    **unchanged("groups"),
    "frozen": lambda header: sorted(header["frozen"]),
    **unchanged("dense", "limit", "limit_run", "total_steps"),
}
HEADER_WORDS = unchanged("frozen")

SUMMARY_PLAN = {
    **unchanged("budget_met", "steps"),
    "final_widths": "widths",
    **unchanged("resizes", "dropped_units", "regrown_units"),
}
SUMMARY_NUMBERS = {
    **unchanged("final_flops", "final_params", "train_flops", "overhead_flops", "final_loss"),
    "final_spent": "spent",
    "final_limit": "limit",
}
SUMMARY_WORDS = {"summary": "reason", "gave_way": "gave_way"}

SHOWN = ("final_widths", "final_loss", "final_params", "train_flops")
"""What stands beside the digests for a person to read."""

Place = str | Callable[[Any], Any]


def read(thing: Any, places: Mapping[str, Place]) -> dict[str, Any]:
    """Values by golden name; a place is an attribute (of an attribute), a key of a dictionary, or a function."""
    found = {}
    for name, place in places.items():
        value = thing
        if callable(place):
            value = place(thing)
        else:
            for each in place.split("."):
                value = value[each] if isinstance(value, Mapping) else getattr(value, each)
        found[name] = value
    return found


def facts_of(loop: setpoint.Loop, models: Mapping[str, nn.Module], digits: int) -> dict[str, Any]:
    """All facts of a finished run, in five sections; on several ranks each one calls it.

    Args:
        loop: finished.
        models: by name, the model as the user calls it and its copies.
        digits: significant digits of numbers that are kept.
    """
    ledger, summary = loop.ledger, loop.summary
    sections = {
        "header": {"digits": digits, **read(ledger.header, HEADER)},
        "plan": {
            "entries": [read(entry, PLAN) for entry in ledger],
            **read(summary, SUMMARY_PLAN),
            "probed_steps": loop.spending.account.probed_steps,
            "origin": {name: digest(each) for name, each in loop.origin.items()} if loop.masks else loop.origin,
        },
        "numbers": {"entries": [read(entry, NUMBERS) for entry in ledger], **read(summary, SUMMARY_NUMBERS)},
        "words": {
            "entries": [read(entry, WORDS) for entry in ledger],
            **read(summary, SUMMARY_WORDS),
            **read(ledger.header, HEADER_WORDS),
        },
        "weights": {name: weights_of(model, digits) for name, model in models.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(plainly(sections, digits)))
    return plain


def weights_of(model: nn.Module, digits: int) -> dict[str, Any]:
    """By name of each tensor of the model: its shape, norm, and a digest of its rounded values."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    found = {}
    for name, tensor in model.state_dict().items():
        values = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy()
        norm = float(np.linalg.norm(values.astype(np.float64)))
        found[name] = {"shape": list(values.shape), "norm": norm, "digest": digest(values, digits)}
    return found


def digest(values: Any, digits: int = 12) -> str:
    """Of an array, its values rounded; of anything else, its JSON."""
    if isinstance(values, np.ndarray):
        form = f"%.{digits - 1}e"
        text = ",".join("0" if value == 0 else form % value for value in values.ravel().tolist())
    else:
        text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plainly(value: Any, digits: int, name: str = "") -> Any:
    """What JSON can hold, with floats rounded. An `error` is a difference from 1 and has as many digits behind the
    point, since those of its own are noise where it is nearly zero.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            return str(value)
        return round(float(value), digits) + 0.0 if name == "error" else float(f"{value:.{digits - 1}e}") + 0.0
    if isinstance(value, Mapping):
        return {
            str(key): plainly(each, digits, name or ("error" if key == "error" else "")) for key, each in value.items()
        }
    if isinstance(value, Tensor):
        return plainly(value.tolist(), digits, name)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plainly(each, digits, name) for each in value]
    return value
