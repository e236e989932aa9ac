"""Linear state-space systems: Gramians, Hankel singular values, balanced truncation."""

from setpoint.ssm.balance import Balance, balance, error_bound, hankel_values, truncate
from setpoint.ssm.gramian import Gramians, gramian_factors, gramians
from setpoint.ssm.layer import StateSpaceLayer, StateWeights
from setpoint.ssm.modes import BalancedPairs, Basis, Modes, beside, reduce_modes, residual_modes
from setpoint.ssm.system import DenseSystem, DiagonalSystem, check_system, real_form, transfer

__all__ = [
    "Balance",
    "BalancedPairs",
    "Basis",
    "DenseSystem",
    "DiagonalSystem",
    "Gramians",
    "Modes",
    "StateSpaceLayer",
    "StateWeights",
    "balance",
    "beside",
    "check_system",
    "error_bound",
    "gramian_factors",
    "gramians",
    "hankel_values",
    "real_form",
    "reduce_modes",
    "residual_modes",
    "transfer",
    "truncate",
]
