"""Balancing: the coordinates in which every state is reached by inputs as strongly as it is heard in outputs.

Here are also what a linear system in discrete time must be for that, and its real form.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

from setpoint.errors import StateSpaceError
from setpoint.groups.states import DiagonalSystem
from setpoint.messages import a_type


@dataclass(frozen=True, eq=False)
class DenseSystem:
    """A real system with a dense matrix: `x[t] = dynamics @ x[t-1] + inputs @ u[t]`, `y[t] = outputs @ x[t]`."""

    dynamics: Float[Tensor, "*batch states states"]  # A
    inputs: Float[Tensor, "*batch states in_channels"]  # B
    outputs: Float[Tensor, "*batch out_channels states"]  # C

    @property
    def num_states(self) -> int:
        """Number of real states."""
        return self.dynamics.shape[-1]


System = DiagonalSystem | DenseSystem


def check_system(system: System, what: str = "the system") -> None:
    """Raise StateSpaceError unless a system is finite and stable: only then has it Gramians."""
    if not isinstance(system, (DiagonalSystem, DenseSystem)):
        raise StateSpaceError(
            f"{what} is {a_type(system)}: give a DiagonalSystem or DenseSystem, such as a StateSpaceLayer's "
            "state_space(). A selective layer (Mamba) has no such system: see SelectiveSensor"
        )
    own = {"the eigenvalues": system.eigenvalues} if isinstance(system, DiagonalSystem) else {"A": system.dynamics}
    for name, tensor in {"B": system.inputs, "C": system.outputs, **own}.items():
        if not bool(torch.isfinite(tensor).all()):
            raise StateSpaceError(f"{what} has NaN or infinite values in {name}: it has no Hankel singular values")
    if isinstance(system, DiagonalSystem):
        moduli = system.eigenvalues.detach().to(torch.complex128).abs()
    else:
        moduli = torch.linalg.eigvals(system.dynamics.detach().double().cpu()).abs()
    outside = int((moduli >= 1.0).sum())
    if outside:
        raise StateSpaceError(
            f"{what} is not stable: {outside} of {moduli.numel()} eigenvalues lie on or outside the unit circle (the "
            f"largest modulus is {float(moduli.max()):.9g}), so its states cannot be ranked: use a parametrisation "
            "that keeps them inside, such as exp(-exp(nu)), or lower the learning rate of the eigenvalues"
        )


def real_form(system: DiagonalSystem) -> DenseSystem:
    """The same map as a real system with states `[Re x, Im x]`: twice as many, all of them real.

    This is the system to reduce. The output is a real part, so the complex system with the same modes describes
    another map, to complex outputs, half of which nobody sees.
    """
    real, imag = torch.diag_embed(system.eigenvalues.real), torch.diag_embed(system.eigenvalues.imag)
    dynamics = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)
    return DenseSystem(dynamics, stack_inputs(system.inputs), stack_outputs(system.outputs))


def stack_inputs(inputs: Complex[Tensor, "*batch states inputs"]) -> Float[Tensor, "*batch two_states inputs"]:
    """B in real form: `[Re B; Im B]`."""
    return torch.cat([inputs.real, inputs.imag], -2)


def stack_outputs(outputs: Complex[Tensor, "*batch outputs states"]) -> Float[Tensor, "*batch outputs two_states"]:
    """C in real form: `[Re C, -Im C]`."""
    return torch.cat([outputs.real, -outputs.imag], -1)


def gramian_factors(
    system: System,
) -> tuple[Float[Tensor, "*batch states columns"], Float[Tensor, "*batch states columns_too"]]:
    """Factors R and H of both Gramians of a stable system's real form, `P = R R^T` and `Q = H H^T`, in float64.

    The controllability Gramian `P = sum over t of A^t B B^T (A^T)^t` solves `A P A^T - P + B B^T = 0`, and the
    observability Gramian `Q = sum over t of (A^T)^t C^T C A^t` solves `A^T Q A - Q + C^T C = 0`. Those of a diagonal
    system with n modes, which has 2 n real states, are known in closed form; those of a dense one are summed by
    doubling. Products of factors are all that balancing needs; `P Q` itself would square the condition.
    """
    if isinstance(system, DiagonalSystem):
        reached, heard = _diagonal_gramians(system)
        return _factor(_finite(reached)), _factor(_finite(heard))
    dynamics = system.dynamics.detach().double()
    inputs, outputs = system.inputs.detach().double(), system.outputs.detach().double()
    return _finite(_doubled(dynamics, inputs)), _finite(_doubled(dynamics.mT, outputs.mT))


def _diagonal_gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Both Gramians of a diagonal system with eigenvalues `l`.

    The state's covariance is `E[x x^H]_ij = (B B^H)_ij / (1 - l_i conj(l_j))`, its pseudo-covariance `E[x x^T]_ij =
    (B B^T)_ij / (1 - l_i l_j)`; those of the real and imaginary parts follow.
    """
    values = system.eigenvalues.detach().to(torch.complex128)
    inputs, outputs = (part.detach().to(torch.complex128) for part in (system.inputs, system.outputs))
    room = 1.0 - values[..., :, None] * values.conj()[..., None, :]
    pseudo_room = 1.0 - values[..., :, None] * values[..., None, :]
    covariance, pseudo = inputs @ inputs.mH / room, inputs @ inputs.mT / pseudo_room
    heard, heard_pseudo = outputs.mH @ outputs / room.conj(), outputs.mT @ outputs / pseudo_room
    total, difference = covariance + pseudo, covariance - pseudo
    controllability = _blocks(total.real, -difference.imag, total.imag, difference.real)
    total, difference = heard + heard_pseudo, heard - heard_pseudo
    return controllability, _blocks(total.real, -total.imag, difference.imag, difference.real)


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
    """`F` with `F F^T = gramian`: small negative eigenvalues count as 0, once it has a unit diagonal."""
    # Without the unit diagonal, rounding in the largest states would drown the small ones.
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
    # 2^64 terms are enough for every modulus below one that float64 can tell from one.
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


@dataclass(frozen=True, eq=False)
class Balance:
    """A balancing pair: `x = expand @ z` and `z = reduce @ x`, with `reduce @ expand = I`.

    In the coordinates z both Gramians are `diag(values)`.
    """

    values: Float[Tensor, "*batch states"]  # Hankel singular values of the real form, descending, >= 0
    expand: Float[Tensor, "*batch states states"]  # columns of states whose value is 0 are 0
    reduce: Float[Tensor, "*batch states states"]  # rows of such states are 0


def balance(system: System, what: str = "the system") -> Balance:
    """The balancing pair of a system's real form, by the square-root method, with its Hankel singular values.

    These are `sqrt(eig(P Q))` for the Gramians P and Q, computed as the singular values of `H^T R` for their factors,
    so that values down to about 1e-8 of the largest are resolved, and none is ever NaN. With
    `H^T R = U diag(values) V^T`: `expand = R V diag(values)^-1/2` and `reduce = diag(values)^-1/2 U^T H^T`. States that
    cannot be reached or heard (value below rounding) get neither.

    References:
        Moore: "Principal component analysis in linear systems", IEEE TAC 26(1), 1981. Laub, Heath, Paige, Ward:
        "Computation of system balancing transformations", IEEE TAC 32(2), 1987.
    """
    check_system(system, what)
    reached, heard = gramian_factors(system)
    left, values, right = torch.linalg.svd(heard.mT @ reached, full_matrices=False)
    floor = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., :1]
    root = torch.where(values > floor, values.clamp_min(1e-300).rsqrt(), 0.0)
    expand, reduce = reached @ right.mT * root[..., None, :], root[..., :, None] * (left.mT @ heard.mT)
    missing = _real_states(system) - values.shape[-1]
    return Balance(pad(values, (0, missing)), pad(expand, (0, missing)), pad(reduce, (0, 0, 0, missing)))


def hankel_values(system: System) -> Float[Tensor, "*batch states"]:
    """Hankel singular values of a system, descending: `sqrt(eig(P Q))` for the Gramians P and Q of its real form.

    A diagonal system with n modes has 2 n values. Moore: "Principal component analysis in linear systems", 1981.
    """
    return balance(system).values


def _real_states(system: System) -> int:
    return system.num_states * (2 if isinstance(system, DiagonalSystem) else 1)


def truncate(system: System, num_states: int, basis: Balance | None = None) -> DenseSystem:
    """Balanced truncation to a real dense system of `num_states` states.

    Its transfer function differs from the full one by at most `error_bound(values, num_states)` at any frequency.

    Of a diagonal system the real form is reduced; `basis` is `balance(system)`, if it is known. StateSpaceError for a
    number of real states that is not from 1 to all.

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
    return 2.0 * torch.where(dropped > 0, torch.maximum(dropped, 1e-8 * values[..., :1]), 0.0).sum(-1)
