"""A state-space layer: what a layer must tell, and take back, so that its states can be balanced and dropped.

Only the protocol is here, so that groups are found without the leaf `states`, which has the maths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Complex
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DiagonalSystem:
    """A complex diagonal system with real inputs and outputs, as LRU, S5 and S4D layers hold it.

        x[t] = eigenvalues * x[t-1] + inputs @ u[t],    y[t] = Re(outputs @ x[t])

    Leading dims are a batch of independent systems. A layer whose output is `2 Re(C x)` has
    `outputs = 2 C`; a direct term `D u` changes nothing here and is left out.

    Args:
        eigenvalues: shape (..., states).
        inputs: B, shape (..., states, in).
        outputs: C, shape (..., out, states).
    """

    eigenvalues: Complex[Tensor, "*batch states"]
    inputs: Complex[Tensor, "*batch states in_channels"]
    outputs: Complex[Tensor, "*batch out_channels states"]

    @property
    def num_states(self) -> int:
        """Number of complex states (modes)."""
        return self.eigenvalues.shape[-1]


@dataclass(frozen=True, eq=False)
class StateWeights:
    """Under which names, relative to the layer, it keeps B and C, so that optimizer moments can follow them.

    Args:
        inputs: a real and an imaginary tensor of shape (..., states, in), or a complex one, or one that keeps
            both parts along a last dim of 2.
        outputs: the same for C, shape (..., out, states); `C` is a multiple of it.
        input_scale: `B = input_scale[..., None] * inputs` (a normalisation, a step size), shape (..., states).
        carried: all further tensors with an entry for each state, such as what eigenvalues are made of; shape (...,
            states, ...) with the same leading dims. Needed only where the layer's forward cannot be traced.
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

    def set_state_space(self, system: DiagonalSystem) -> None:
        """Take over this system, which has as many states as the layer; parameters change in place."""

    def state_weights(self) -> StateWeights:
        """Where B and C are kept."""
