"""Balancing: the coordinates in which every state is reached as strongly as it is heard, ranked by Hankel value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from setpoint.errors import StateSpaceError
from setpoint.groups.state_space import DiagonalSystem
from setpoint.states.gramian import gramian_factors
from setpoint.states.system import DenseSystem, System, check_system, real_form

_RESOLVED = 1e-8
"""The least Hankel value that is resolved, as a fraction of the largest."""


@dataclass(frozen=True, eq=False)
class Balance:
    """A balancing pair: `x = expand @ z` and `z = reduce @ x`, with `reduce @ expand = I`.

    In the coordinates z both Gramians are `diag(values)`.

    Args:
        values: Hankel singular values, descending, >= 0, shape (..., states): those of the real form.
        expand: shape (..., states, states); columns of states whose value is 0 are 0.
        reduce: shape (..., states, states); rows of such states are 0.
    """

    values: Float[Tensor, "*batch states"]
    expand: Float[Tensor, "*batch states states"]
    reduce: Float[Tensor, "*batch states states"]


def hankel_values(system: System, what: str = "the system") -> Float[Tensor, "*batch states"]:
    """Hankel singular values of a system, descending: `sqrt(eig(P Q))`, for the Gramians P and Q of its real form.

    Computed as the singular values of `H^T R` for factors `P = R R^T` and `Q = H H^T`, so that values down to
    about 1e-8 of the largest are resolved, and none is ever NaN.

    Args:
        system: a diagonal system with n modes has 2 n values, a dense one with n real states n.

    Raises:
        StateSpaceError: as `check_system`.

    References:
        Moore: "Principal component analysis in linear systems", IEEE TAC 26(1), 1981.
    """
    check_system(system, what)
    reached, heard = gramian_factors(system)
    values: Tensor = torch.linalg.svdvals(heard.mT @ reached)
    missing = _real_states(system) - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def balance(system: System, what: str = "the system") -> Balance:
    """The balancing pair of a system's real form, by the square-root method.

    With `H^T R = U diag(values) V^T`: `expand = R V diag(values)^-1/2` and `reduce = diag(values)^-1/2 U^T H^T`.
    States that cannot be reached or heard (value below rounding) get neither.

    Raises:
        StateSpaceError: as `check_system`.

    References:
        Laub, Heath, Paige, Ward: "Computation of system balancing transformations", IEEE TAC 32(2), 1987.
    """
    check_system(system, what)
    reached, heard = gramian_factors(system)
    left, values, right = torch.linalg.svd(heard.mT @ reached, full_matrices=False)
    floor = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., :1]
    root = torch.where(values > floor, values.clamp_min(1e-300).rsqrt(), 0.0)
    expand, reduce = reached @ right.mT * root[..., None, :], root[..., :, None] * (left.mT @ heard.mT)
    missing = _real_states(system) - values.shape[-1]
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
        expand = torch.nn.functional.pad(expand, (0, missing))
        reduce = torch.nn.functional.pad(reduce, (0, 0, 0, missing))
    return Balance(values, expand, reduce)


def _real_states(system: System) -> int:
    return system.num_states * (2 if isinstance(system, DiagonalSystem) else 1)


def truncate(system: System, num_states: int, basis: Balance | None = None) -> DenseSystem:
    """Balanced truncation to a real dense system of `num_states` states.

    Its transfer function differs from the full one by at most `error_bound(values, num_states)` at any frequency.

    Args:
        system: stable and finite; of a diagonal one the real form is reduced.
        num_states: real states to keep, from 1 to all.
        basis: `balance(system)`, if it is known.

    Raises:
        StateSpaceError: as `check_system`, or for a number of states that there is not.

    References:
        Pernebo, Silverman: "Model reduction via balanced state space representations", IEEE TAC 27(2), 1982.
    """
    if not 1 <= num_states <= _real_states(system):
        raise StateSpaceError(f"num_states must be from 1 to {_real_states(system)}, got {num_states}")
    basis = balance(system) if basis is None else basis
    dense = real_form(system) if isinstance(system, DiagonalSystem) else system
    expand, reduce = basis.expand[..., :num_states], basis.reduce[..., :num_states, :]
    return DenseSystem(
        reduce @ dense.dynamics.detach().double() @ expand,
        reduce @ dense.inputs.detach().double(),
        dense.outputs.detach().double() @ expand,
    )


def error_bound(values: Float[Tensor, "*batch states"], num_states: int) -> Float[Tensor, "*batch"]:
    """Twice the sum of the dropped Hankel values: the largest error of the truncation's gain at any frequency.

    Of descending values the first `num_states` are kept. A value below 1e-8 of the largest, which is the least that is
    resolved, counts as that much; 0 counts as 0.

    References:
        Al-Saggaf, Franklin: "An error bound for a discrete reduced order model", IEEE TAC 32(9), 1987.
    """
    dropped = values[..., num_states:]
    return 2.0 * torch.where(dropped > 0, torch.maximum(dropped, _RESOLVED * values[..., :1]), 0.0).sum(-1)
