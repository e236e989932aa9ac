"""A state-space layer: what a layer must tell, and take back, so that its states can be balanced and dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Complex
from torch import Tensor

from setpoint.ssm.system import DiagonalSystem


@dataclass(frozen=True, eq=False)
class StateWeights:
    """Under which names, relative to the layer, it keeps B and C, so that optimizer moments can follow them.

    Args:
        inputs: a real and an imaginary tensor of shape (..., states, in), or a complex one, or one that keeps
            both parts along a last dim of 2.
        outputs: the same for C, shape (..., out, states); `C` is a multiple of it.
        input_scale: `B = input_scale[..., None] * inputs` (a normalisation, a step size), shape (..., states).
        carried: all further tensors with an entry for each state, such as what eigenvalues are made of; shape
            (..., states, ...) with the same leading dims. Needed only where the layer's forward cannot be
            traced.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_scale: Complex[Tensor, "*batch states"]
    carried: tuple[str, ...] = ()


@runtime_checkable
class StateSpaceLayer(Protocol):
    """A module with a linear time-invariant state: `x[t] = a * x[t-1] + B u[t]`, `y[t] = Re(C x[t]) + ...`.

    Any `nn.Module` with these three methods takes part; nothing is to be inherited.
    """

    def state_space(self) -> DiagonalSystem:
        """The system as it is now, in discrete time."""
        ...

    def set_state_space(self, system: DiagonalSystem) -> None:
        """Take over this system, which has as many states as the layer; parameters change in place."""
        ...

    def state_weights(self) -> StateWeights:
        """Where B and C are kept."""
        ...
