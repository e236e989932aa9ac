"""How each op carries units: one small function per op, registered when this package is imported."""

from setpoint.groups.rules import attention, contract, elementwise, index, norm, reduce, shape

__all__ = ["attention", "contract", "elementwise", "index", "norm", "reduce", "shape"]
