"""How each op carries units: one small function per op, registered when this package is imported."""

from setpoint.groups.rules import contract, convolve, elementwise, norm, sequence, shape

__all__ = ["contract", "convolve", "elementwise", "norm", "sequence", "shape"]
