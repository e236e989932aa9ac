"""Values of a JSON line, read leniently: a value of another kind counts as missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from setpoint.checkpoint.fields import LARGEST


def number(value: Any) -> float | None:
    """A finite float of a size that is measured, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST else None  # NaN is not


def integer(value: Any) -> int | None:
    """An integer, or None for anything else."""
    return None if (found := number(value)) is None else int(found)


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, empty for anything else."""
    return value if isinstance(value, dict) else {}


def quantities(value: Any) -> dict[str, float]:
    """Finite numbers by name; other values are dropped."""
    return {str(key): found for key, item in mapping(value).items() if (found := number(item)) is not None}


def finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not know.

    >>> finite({"loss": float("nan"), "widths": (1.0, 2)})
    {'loss': None, 'widths': [1.0, 2]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return value
