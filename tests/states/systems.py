"""Random systems for the tests of setpoint.states, and a cut whose states are turned on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from setpoint.actuator.cut import Keep
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import Optimizers
from setpoint.groups.group import Group
from setpoint.states import BalancedPairs, DenseSystem, DiagonalSystem
from setpoint.states.turn import turned


def balance_and_shrink(
    model: nn.Module,
    optimizer: Optimizers,
    groups: tuple[Group, ...],
    keep: Keep,
    basis: Mapping[str, BalancedPairs],
    copies: Sequence[nn.Module] = (),
) -> tuple[Group, ...]:
    """Shrink a model; state groups that lose units are balanced, truncated and diagonalised on the way."""
    with turned(model, optimizer, groups, keep, basis, copies):
        return shrink(model, optimizer, groups, keep, copies)


def diagonal(
    states: int, inputs: int = 2, outputs: int = 3, *, seed: int = 0, least: float = 0.3, most: float = 0.99
) -> DiagonalSystem:
    """Eigenvalues in a ring, normalised inputs."""
    generator = torch.Generator().manual_seed(seed)
    modulus = least + (most - least) * torch.rand(states, generator=generator, dtype=torch.float64)
    angle = math.pi * torch.rand(states, generator=generator, dtype=torch.float64)
    weights = torch.randn(states, inputs, generator=generator, dtype=torch.complex128)
    return DiagonalSystem(
        torch.polar(modulus, angle),
        (1 - modulus.square()).sqrt()[:, None] * weights,
        torch.randn(outputs, states, generator=generator, dtype=torch.complex128),
    )


def dense(states: int, inputs: int = 2, outputs: int = 3, *, seed: int = 0, radius: float = 0.95) -> DenseSystem:
    """A random matrix of this spectral radius."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(states, states, generator=generator, dtype=torch.float64)
    return DenseSystem(
        matrix * (radius / torch.linalg.eigvals(matrix).abs().max()),
        torch.randn(states, inputs, generator=generator, dtype=torch.float64),
        torch.randn(outputs, states, generator=generator, dtype=torch.float64),
    )


def impulse_response(system: DiagonalSystem, steps: int) -> torch.Tensor:
    """`Re(C a^t B)` for t = 0, 1, ..., shape (steps, ..., out, in), by running the recurrence."""
    state, found = system.inputs, []
    for _ in range(steps):
        found.append((system.outputs @ state).real)
        state = system.eigenvalues[..., None] * state
    return torch.stack(found)


ANGLES = torch.linspace(0.0, math.pi, 129, dtype=torch.float64)


def transfer(system: DiagonalSystem | DenseSystem, angles: torch.Tensor) -> torch.Tensor:
    """Transfer function `H(z) = C (I - A / z)^-1 B` at `z = exp(i angle)`; `|H|` is the gain at that frequency."""
    if isinstance(system, DiagonalSystem):
        parts = system.eigenvalues, system.inputs, system.outputs
        return (_of_modes(*parts, angles) + _of_modes(*(part.conj() for part in parts), angles)) / 2
    backward = torch.exp(-1j * angles.to(system.dynamics.dtype))[:, None, None]
    dynamics, inputs, outputs = (
        part.unsqueeze(-3).to(backward.dtype) for part in (system.dynamics, system.inputs, system.outputs)
    )
    return outputs @ torch.linalg.solve(torch.eye(system.num_states) - dynamics * backward, inputs)


def _of_modes(eigenvalues: torch.Tensor, b: torch.Tensor, c: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    gain = 1.0 / (1.0 - eigenvalues.unsqueeze(-2) * torch.exp(-1j * angles)[:, None])
    return (c.unsqueeze(-3) * gain.unsqueeze(-2)) @ b.unsqueeze(-3)
