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
