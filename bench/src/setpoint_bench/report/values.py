"""Values of a JSON line of results, read leniently: one of another kind counts as missing."""

from __future__ import annotations

from typing import Any

from setpoint.report.record import integer, mapping, number


def numbers(value: Any) -> tuple[float, ...]:
    """The finite numbers of a list; empty for anything else."""
    items = value if isinstance(value, list) else []
    return tuple(found for item in items if (found := number(item)) is not None)


def texts(value: Any) -> dict[str, str]:
    """Values by name, each as text."""
    return {str(key): str(item) for key, item in mapping(value).items()}


def counts(value: Any) -> dict[str, int]:
    """Integers by name; other values are dropped."""
    return {str(key): count for key, item in mapping(value).items() if (count := integer(item)) is not None}
