"""Compares the facts of a run with those that are kept, and says in words what differs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

SECTIONS = ("header", "plan", "numbers", "weights", "words")
TOLERANCE = {12: 1e-6, 6: 1e-2}
"""Relative, by the digits that are kept: how far another processor or torch may carry a number off."""
MOST = 6
"""Differences that are told of a section."""


def differences(kept: dict[str, Any], found: dict[str, Any], *, exact: bool, digits: int = 12) -> list[str]:
    """What differs, a line each, section by section and entry by entry; empty if nothing does.

    Args:
        kept: recorded facts.
        found: facts of today's code.
        exact: in the environment in which they were recorded all must be equal. In another one the header and the plan
            must be, numbers and norms of weights must be near, and numbers in words are not looked at.
        digits: that are kept.
    """
    told = []
    for section in SECTIONS:
        steps = [entry["step"] for entry in kept["plan"]["entries"]]
        near = None if exact or section in ("header", "plan") else TOLERANCE[digits]
        lines = [f"{section}: {line}" for line in walk(kept[section], found[section], (), near, steps)]
        told += lines[:MOST] + ([f"{section}: and {len(lines) - MOST} more"] if len(lines) > MOST else [])
    return told


def walk(kept: Any, found: Any, path: tuple[Any, ...], near: float | None, steps: list[int]) -> Iterator[str]:
    """What differs below this place."""
    if isinstance(kept, dict) and isinstance(found, dict):
        for key in [*kept, *(key for key in found if key not in kept)]:
            if key not in found or key not in kept:
                what = "is no more" if key in kept else "is new"
                yield f"{place((*path, key), steps)} {what}: {short(kept.get(key, found.get(key)))}"
            elif not (near and key == "digest"):
                yield from walk(kept[key], found[key], (*path, key), near, steps)
    elif isinstance(kept, list) and isinstance(found, list) and (path == ("entries",) or len(kept) == len(found)):
        for number, (one, other) in enumerate(zip(kept, found, strict=False)):
            yield from walk(one, other, (*path, number), near, steps)
        if len(kept) != len(found):
            yield f"{len(kept)} entries were kept, now there are {len(found)}"
    elif not same(kept, found, near):
        yield f"{place(path, steps)} was {short(kept)}, is {short(found)}"


def same(kept: Any, found: Any, near: float | None) -> bool:
    if near and isinstance(kept, float | int) and isinstance(found, float | int):
        return math.isclose(kept, found, rel_tol=near, abs_tol=near * 1e-3)
    if near and isinstance(kept, str) and isinstance(found, str):
        return re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", kept) == re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", found)
    return bool(kept == found)


def place(path: tuple[Any, ...], steps: list[int]) -> str:
    """The place in words: `entry 3 (step 42) price.flops`."""
    if path[:1] == ("entries",) and len(path) > 1:
        number, rest = path[1], path[2:]
        step = f" (step {steps[number]})" if number < len(steps) else ""
        return f"entry {number}{step} {place(rest, steps)}".rstrip()
    return ".".join(map(str, path))


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:100] + " ... " + text[-50:]
