"""Linear state-space systems: Gramians, Hankel singular values, balanced truncation; their states read and turned."""

from setpoint.groups.states import DiagonalSystem, StateSpaceLayer, StateWeights
from setpoint.states.balance import (
    Balance,
    DenseSystem,
    balance,
    check_system,
    error_bound,
    gramian_factors,
    hankel_values,
    real_form,
    truncate,
)
from setpoint.states.modes import BalancedPairs, Modes, beside, reduce_modes, residual_modes

__all__ = [
    "Balance", "BalancedPairs", "DenseSystem", "DiagonalSystem", "Modes", "StateSpaceLayer", "StateWeights",
    "balance", "beside", "check_system", "error_bound", "gramian_factors", "hankel_values", "real_form",
    "reduce_modes", "residual_modes", "truncate",
]  # fmt: skip
