"""Gramians: how strongly each direction of the state space is reached by inputs, and how strongly it is heard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from setpoint.errors import StateSpaceError
from setpoint.groups.state_space import DiagonalSystem
from setpoint.states.system import System


@dataclass(frozen=True, eq=False)
class Gramians:
    """Controllability and observability Gramian of the real form, in float64.

    `P = sum over t of A^t B B^T (A^T)^t` solves `A P A^T - P + B B^T = 0`, and
    `Q = sum over t of (A^T)^t C^T C A^t` solves `A^T Q A - Q + C^T C = 0`.

    Args:
        controllability: P, shape (..., states, states); a diagonal system with n modes has 2 n real states.
        observability: Q, of the same shape.
    """

    controllability: Float[Tensor, "*batch states states"]
    observability: Float[Tensor, "*batch states states"]


def gramians(system: System) -> Gramians:
    """Both Gramians of a stable system.

    Of a diagonal system they are known in closed form, with `l` the eigenvalues: the state's
    covariance is `E[x x^H]_ij = (B B^H)_ij / (1 - l_i conj(l_j))` and its pseudo-covariance
    `E[x x^T]_ij = (B B^T)_ij / (1 - l_i l_j)`; those of the real and imaginary parts follow. Of a dense one they
    are summed by doubling.

    Raises:
        StateSpaceError: for B or C so large that they are not finite.

    >>> from setpoint.states import DenseSystem
    >>> half = DenseSystem(torch.tensor([[0.5]]), torch.ones(1, 1), torch.ones(1, 1))
    >>> round(gramians(half).controllability.item(), 6)  # 1 / (1 - 0.25)
    1.333333
    """
    if isinstance(system, DiagonalSystem):
        return _diagonal_gramians(system)
    reached, heard = gramian_factors(system)
    return Gramians(_finite(reached @ reached.mT), _finite(heard @ heard.mT))


def gramian_factors(
    system: System,
) -> tuple[Float[Tensor, "*batch states columns"], Float[Tensor, "*batch states columns_too"]]:
    """Factors `R` and `H` of the Gramians: `P = R R^T` and `Q = H H^T`, in float64.

    Products of factors are all that balancing needs. Working with `P Q` itself would square the condition.

    Raises:
        StateSpaceError: for B or C so large that the Gramians are not finite.
    """
    if isinstance(system, DiagonalSystem):
        both = _diagonal_gramians(system)
        return _factor(both.controllability), _factor(both.observability)
    dynamics = system.dynamics.detach().double()
    inputs, outputs = system.inputs.detach().double(), system.outputs.detach().double()
    return _finite(_doubled(dynamics, inputs)), _finite(_doubled(dynamics.mT, outputs.mT))


def _diagonal_gramians(system: DiagonalSystem) -> Gramians:
    values = system.eigenvalues.detach().to(torch.complex128)
    inputs, outputs = (part.detach().to(torch.complex128) for part in (system.inputs, system.outputs))
    apart = 1.0 - values[..., :, None] * values.conj()[..., None, :]
    alike = 1.0 - values[..., :, None] * values[..., None, :]
    covariance, pseudo = inputs @ inputs.mH / apart, inputs @ inputs.mT / alike
    heard, heard_pseudo = outputs.mH @ outputs / apart.conj(), outputs.mT @ outputs / alike
    total, difference = covariance + pseudo, covariance - pseudo
    controllability = _blocks(total.real, -difference.imag, total.imag, difference.real)
    total, difference = heard + heard_pseudo, heard - heard_pseudo
    observability = _blocks(total.real, -total.imag, difference.imag, difference.real)
    return Gramians(_finite(controllability), _finite(observability))


def _finite(gramian: Tensor) -> Tensor:
    if not bool(torch.isfinite(gramian).all()):
        raise StateSpaceError("B or C is so large that a Gramian is not finite: the states cannot be ranked")
    return gramian


def _blocks(upper_left: Tensor, upper_right: Tensor, lower_left: Tensor, lower_right: Tensor) -> Tensor:
    """Half of the block matrix, made exactly symmetric."""
    whole = torch.cat([torch.cat([upper_left, upper_right], -1), torch.cat([lower_left, lower_right], -1)], -2)
    result: Tensor = (whole + whole.mT) / 4
    return result


def _factor(gramian: Tensor) -> Tensor:
    """`F` with `F F^T = gramian`: scaled to a unit diagonal first, small negative eigenvalues count as 0.

    The scaling takes out what states differ by their mere size, so that only true dependence between them
    is left to be resolved.
    """
    size = gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    inverse = torch.where(size > 0, 1.0 / size.clamp_min(1e-300), 0.0)
    values, vectors = torch.linalg.eigh(inverse[..., :, None] * gramian * inverse[..., None, :])
    floor = torch.finfo(values.dtype).eps * gramian.shape[-1] * values[..., -1:].clamp_min(0.0)
    root = torch.where(values > floor, values, 0.0).clamp_min(0.0).sqrt()
    result: Tensor = size[..., :, None] * vectors * root[..., None, :]
    return result


def _doubled(dynamics: Tensor, inputs: Tensor) -> Tensor:
    """A factor of `sum of A^t B B^T (A^T)^t`: each pass doubles the number of terms, QR keeps the factor narrow."""
    factor, power = inputs, dynamics
    for _ in range(64):
        added = power @ factor
        factor = _narrow(torch.cat([factor, added], -1))
        largest = factor.abs().amax((-2, -1))
        if bool((added.abs().amax((-2, -1)) <= torch.finfo(added.dtype).eps * largest).all()):
            break
        power = power @ power
    return factor


def _narrow(factor: Tensor) -> Tensor:
    """A factor of the same product with no more columns than rows."""
    if factor.shape[-1] <= factor.shape[-2]:
        return factor
    result: Tensor = torch.linalg.qr(factor.mT, mode="r")[1].mT
    return result
