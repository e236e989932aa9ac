"""CompreSSM: states dropped early in training so that a share of the summed Hankel values stays.

The algorithm of Chahine, Nazari, Rus and Rusch, "The Curious Case of In-Training Compression of State Space
Models", ICLR 2026 (arXiv 2510.02823), for linear time-invariant layers in tolerance mode: four checks within the
first tenth of the run; at each, every layer goes down to the fewest states whose Hankel values sum to at least
`1 - tolerance` of all, unless that saves less than a twentieth of them. It ranks and balances the *complex* system
x -> C x, where Setpoint's own method takes the real map. Optimizer moments follow as in Setpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Float64
from torch import Tensor, nn

from setpoint.controller.plan import Observation, Plan
from setpoint.cost.cost import Cost
from setpoint.errors import GroupError, StateSpaceError
from setpoint.groups.group import Group
from setpoint.groups.states import state_layer
from setpoint.sensor.reading import Reading, Sensor, Traits
from setpoint.states import Basis, DiagonalSystem, Modes, check_system

_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class ComplexBalance:
    """Balanced coordinates of a complex system, one state to a unit.

    Args:
        values: Hankel singular values, descending, shape (states,).
        expand: `x = expand @ z`.
        reduce: `z = reduce @ x`.
    """

    values: Float[Tensor, " states"]
    expand: Complex[Tensor, "states states"]
    reduce: Complex[Tensor, "states states"]

    @classmethod
    def of(cls, system: DiagonalSystem) -> ComplexBalance:
        """Balance `x -> C x`, by the square-root method on factors of the two complex Gramians."""
        reached, heard = (_factor(each) for each in _gramians(system))
        left, found, right = torch.linalg.svd(heard.mH @ reached)
        floor = torch.finfo(found.dtype).eps * len(found) * found[0]
        root = torch.where(found > floor, found.clamp_min(_TINY).rsqrt(), 0.0).to(reached.dtype)
        return cls(found, reached @ right.mH * root, root[:, None] * (left.mH @ heard.mH))

    @property
    def num_units(self) -> int:
        """One for each mode."""
        return len(self.values)

    def modes(self, system: DiagonalSystem, keep: Bool[np.ndarray, " units"]) -> Modes:
        """The truncation to the kept states, diagonalised."""
        kept = torch.from_numpy(np.flatnonzero(keep)).to(self.values.device)
        expand, reduce = self.expand[:, kept], self.reduce[kept]
        eigenvalues, vectors = torch.linalg.eig((reduce @ (system.eigenvalues.to(reduce)[:, None] * expand)).cpu())
        eigenvalues, vectors = eigenvalues.to(reduce.device), vectors.to(reduce.device)
        analysis, synthesis = torch.linalg.solve(vectors, reduce), expand @ vectors
        return Modes(
            DiagonalSystem(eigenvalues, analysis @ system.inputs.to(reduce), system.outputs.to(reduce) @ synthesis),
            _real(analysis),
            _real(synthesis),
            order=2 * len(kept),
        )


def _gramians(system: DiagonalSystem) -> tuple[Complex[Tensor, "states states"], Complex[Tensor, "states states"]]:
    values = system.eigenvalues.to(torch.complex128)
    inputs, outputs = system.inputs.to(values), system.outputs.to(values)
    apart = 1.0 - values[:, None] * values.conj()[None, :]
    return inputs @ inputs.mH / apart, outputs.mH @ outputs / apart.conj()


def _factor(gramian: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gramian)
    result: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return result


def _real(matrix: Tensor) -> Tensor:
    """A complex matrix as it acts on stacked real and imaginary parts."""
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)], 0)


@dataclass(frozen=True, eq=False)
class LiveModel:
    """The model whose layers are read, and the steps so far."""

    model: nn.Module
    num_steps: int = 0


class ComplexHankelSensor(Sensor[LiveModel]):
    """Hankel values of the complex system of each layer; not comparable across layers."""

    traits = Traits(calibrated=False, in_loss=False, returns=False)

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        """Groups of states; of layers that run one system for all channels."""
        return tuple(group for group in groups if group.kind == "state")

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> LiveModel:
        """A state that looks at the model.

        Raises:
            GroupError: for a group that is not of states, or a layer that runs a system for each channel.
            StateSpaceError: for a layer that is not stable or not finite.
        """
        for group in groups:
            name, layer = state_layer(model, group)
            system = layer.state_space()
            check_system(system, f"layer {name!r}")
            if system.eigenvalues.dim() > 1:
                raise GroupError(f"layer {name!r} runs one system for each channel, which this baseline does not know")
        return LiveModel(model)

    def update(
        self, state: LiveModel, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> LiveModel:
        """Count the step; weights are read only when a reading is asked for."""
        return LiveModel(model, state.num_steps + 1)

    def flops(self, groups: tuple[Group, ...], model: nn.Module) -> float:
        """FLOPs of one update: none."""
        return 0.0

    def read(self, state: LiveModel, groups: tuple[Group, ...], step: int) -> Reading:
        """Hankel values, descending; NaN for a layer that is not stable or not finite."""
        saliency: dict[str, Float64[np.ndarray, " units"]] = {}
        basis: dict[str, Basis] = {}
        for group in groups:
            name, layer = state_layer(state.model, group)
            system = layer.state_space()
            try:
                check_system(system, f"layer {name!r}")
            except StateSpaceError:
                saliency[group.name] = np.full(group.num_units, np.nan)
                continue
            found = ComplexBalance.of(system)
            saliency[group.name], basis[group.name] = found.values.cpu().numpy(), found
        return Reading(step, saliency, num_samples=1, calibrated=False, num_steps=state.num_steps, basis=basis)


@final
@dataclass(frozen=True)
class ToleranceController:
    """Drops the states beyond the first whose values sum to `1 - tolerance` of all. It asks no budget and meets none.

    Each check starts from what the last one left, so tolerances compound and no size can be asked for.

    Args:
        tolerance: share of the summed Hankel values that may go at each check, in (0, 1).
        num_checks: checks, evenly spaced, the last at the end of the window.
        window: share of the run within which states are dropped, in (0, 1].
        gate: a layer is left alone unless it comes below this share of its states.

    Raises:
        ValueError: for a setting out of range.
    """

    tolerance: float = 0.02
    num_checks: int = 4
    window: float = 0.1
    gate: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or not 0 < self.window <= 1 or not 0 < self.gate <= 1 or self.num_checks < 1:
            raise ValueError(
                "tolerance must be in (0, 1), window and gate in (0, 1] and num_checks at least 1, got "
                f"{self.tolerance}, {self.window}, {self.gate} and {self.num_checks}"
            )

    def init(self, groups: tuple[Group, ...]) -> None:
        """It remembers nothing."""

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a check is to be made after this step."""
        return step in self._checks(total_steps)

    def decide(self, state: None, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> tuple[None, Plan]:
        """Each group by itself."""
        reading, last = observation.reading, max(self._checks(observation.planned_steps))
        assert reading is not None
        keep = {group.name: self._keep(reading.saliency[group.name]) for group in groups}
        going = sum(int((~kept).sum()) for kept in keep.values())
        reason = f"dropped {going} states beyond {1 - self.tolerance:.1%} of the summed Hankel values"
        return None, Plan(
            step=observation.step,
            keep=keep,
            budget_met=observation.step >= last,
            reason=reason if going else "no layer would lose a twentieth of its states",
        )

    def _checks(self, total_steps: int) -> set[int]:
        last = self.window * total_steps
        return {max(1, round(last * number / self.num_checks)) for number in range(1, self.num_checks + 1)}

    def _keep(self, values: Float64[np.ndarray, " units"]) -> Bool[np.ndarray, " units"]:
        order = np.argsort(-values, kind="stable")
        reached = np.cumsum(values[order]) >= (1 - self.tolerance) * values.sum()
        needed = int(np.argmax(reached)) + 1
        keep = np.ones(len(values), dtype=bool)
        if needed < self.gate * len(values):
            keep[order[needed:]] = False
        return keep
