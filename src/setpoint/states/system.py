"""A linear system in discrete time, diagonal or dense, and what it must be for its states to be ranked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from setpoint.errors import StateSpaceError
from setpoint.groups.states import DiagonalSystem
from setpoint.messages import a_type


@dataclass(frozen=True, eq=False)
class DenseSystem:
    """A real system with a dense matrix: `x[t] = dynamics @ x[t-1] + inputs @ u[t]`, `y[t] = outputs @ x[t]`.

    Args:
        dynamics: A, shape (..., states, states).
        inputs: B, shape (..., states, in).
        outputs: C, shape (..., out, states).
    """

    dynamics: Float[Tensor, "*batch states states"]
    inputs: Float[Tensor, "*batch states in_channels"]
    outputs: Float[Tensor, "*batch out_channels states"]

    @property
    def num_states(self) -> int:
        """Number of real states."""
        return self.dynamics.shape[-1]


System = DiagonalSystem | DenseSystem


def check_system(system: System, what: str = "the system") -> None:
    """Raise StateSpaceError unless a system is finite and stable: only then has it Gramians."""
    if not isinstance(system, (DiagonalSystem, DenseSystem)):
        raise StateSpaceError(
            f"{what} is {a_type(system)}: give a linear time-invariant DiagonalSystem or DenseSystem, such as "
            "a StateSpaceLayer's state_space(). A selective layer (Mamba) has no such system: see SelectiveSensor"
        )
    _check_shapes(system, what)
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
            f"largest modulus is {float(moduli.max()):.9g}). Its states cannot be ranked: use a parametrisation that "
            "keeps them inside, such as exp(-exp(nu)), or lower the learning rate of the eigenvalues"
        )


def _check_shapes(system: System, what: str) -> None:
    dynamics = system.eigenvalues if isinstance(system, DiagonalSystem) else system.dynamics
    batch, states = dynamics.shape[: -1 if isinstance(system, DiagonalSystem) else -2], system.num_states
    outputs = (system.outputs.shape[:-2], system.outputs.shape[-1:])
    fits = states > 0 and system.inputs.shape[:-1] == (*batch, states) and outputs == (batch, (states,))
    if not fits or (isinstance(system, DenseSystem) and dynamics.shape[-2] != states):
        raise StateSpaceError(
            f"{what} has dynamics of shape {tuple(dynamics.shape)}, B of shape {tuple(system.inputs.shape)} and C of "
            f"shape {tuple(system.outputs.shape)}: with n states they must be (..., n) or (..., n, n), (..., n, in) "
            "and (..., out, n)"
        )


def real_form(system: DiagonalSystem) -> DenseSystem:
    """The same map as a real system with states `[Re x, Im x]`: twice as many, all of them real.

    This is the system to reduce. The output is a real part, so the complex system with the same modes
    describes another map, to complex outputs, half of which nobody sees.

    >>> half = torch.tensor([0.5j])
    >>> real_form(DiagonalSystem(half, torch.ones(1, 1, dtype=half.dtype), torch.ones(1, 1, dtype=half.dtype))).dynamics
    tensor([[ 0.0000, -0.5000],
            [ 0.5000,  0.0000]])
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


def transfer(
    system: System, angles: Float[Tensor, " frequencies"]
) -> Complex[Tensor, "*batch frequencies out_channels in_channels"]:
    """Transfer function `H(z) = C (I - A / z)^-1 B` at `z = exp(i angle)`; `|H|` is the gain at that frequency.

    Angles are in radians per step.
    """
    if isinstance(system, DiagonalSystem):
        half = _diagonal_transfer(system.eigenvalues, system.inputs, system.outputs, angles)
        mirrored = _diagonal_transfer(system.eigenvalues.conj(), system.inputs.conj(), system.outputs.conj(), angles)
        whole: Tensor = (half + mirrored) / 2
        return whole
    backward = torch.exp(-1j * angles.to(system.dynamics.dtype))[:, None, None]
    dynamics, inputs, outputs = (
        part.unsqueeze(-3).to(backward.dtype) for part in (system.dynamics, system.inputs, system.outputs)
    )
    identity = torch.eye(system.num_states, dtype=backward.dtype, device=angles.device)
    found: Tensor = outputs @ torch.linalg.solve(identity - dynamics * backward, inputs)
    return found


def _diagonal_transfer(eigenvalues: Tensor, inputs: Tensor, outputs: Tensor, angles: Tensor) -> Tensor:
    backward = torch.exp(-1j * angles.to(eigenvalues.real.dtype))[:, None]
    gain = 1.0 / (1.0 - eigenvalues.unsqueeze(-2) * backward)
    result: Tensor = (outputs.unsqueeze(-3) * gain.unsqueeze(-2)) @ inputs.unsqueeze(-3)
    return result
