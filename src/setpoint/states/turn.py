"""Balance: state-space layers turned into balanced coordinates, cut there, and brought back to diagonal form."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.cut import Keep, check_keep
from setpoint.actuator.tensors import Optimizers, as_sequence, map_tensors, named_tensors
from setpoint.controller.plan import Plan
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.states import DiagonalSystem, StateWeights, state_layer
from setpoint.host.host import Host
from setpoint.sensor.reading import Reading
from setpoint.states.balance import stack_inputs, stack_outputs
from setpoint.states.modes import BalancedPairs, Modes, beside, residual_modes

_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}  # means or sums of squared gradients
_FIRST = {"exp_avg", "momentum_buffer", "grad_avg"}  # means or sums of gradients


@contextmanager
def turned(
    model: nn.Module,
    optimizer: Optimizers,
    groups: tuple[Group, ...],
    keep: Keep,
    basis: Mapping[str, BalancedPairs],
    copies: Sequence[nn.Module] = (),
    *,
    rest: bool = False,
) -> Iterator[None]:
    """State groups that are about to lose units, in coordinates in which they can; `shrink` with this `keep` inside.

    For a group in `basis` (coordinates for the states of its layer as it is now), `keep` is about the units of that
    basis. With `BalancedPairs` the kept units then hold the balanced truncation of the layer's real map, brought back
    to modes, so its gain changes by at most twice the sum of the dropped Hankel values. With `rest` the units that go
    hold what the truncation loses, as modes of their own (`residual_modes`), so that they can rest in a reserve and
    come back; without, nothing.

    Optimizer moments of B and C go through the same change of basis: gradients, hence first moments, by the
    transposed maps, second moments by the squares of their entries, as if entries were independent. Moments of
    the eigenvalues have no such image, since eigenvalues are no linear function of the old ones: first moments
    start at 0, second ones (and any other state) at their mean over the layer's states. Copies (an EMA) go through
    the same change of basis and take over the new eigenvalues, so that modes correspond.

    On any exception, inside too, model, optimizers and copies are as they were.
    """
    full = check_keep(groups, keep)
    with ExitStack() as undo:
        for group in groups:
            if group.name in basis and not full[group.name].all():
                turn = _Turn(model, as_sequence(optimizer), undo, group, full[group.name], basis[group.name], rest)
                turn.apply(copies)
        yield
        # All went well: the way back is forgotten. On an exception it is taken on the way out.
        undo.pop_all()


def balanced(
    host: Host, groups: tuple[Group, ...], plan: Plan, reading: Reading, *, rest: bool
) -> AbstractContextManager[None]:
    """The coordinates in which an actuator cuts: states that are about to go are turned as the reading ranks them."""
    return turned(host.model, host.optimizers, groups, plan.keep, reading.basis, host.copies, rest=rest)


class _Turn:
    """One layer on its way to other coordinates; `undo` is the way back.

    `modes` is what its system `old` is reduced to, with what that loses where this is to rest, and `places` where along
    its states these modes will lie; what is elsewhere is about to be cut.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        undo: ExitStack,
        group: Group,
        keep: np.ndarray,
        basis: BalancedPairs,
        rest: bool,
    ) -> None:
        self.model, self.optimizers, self.undo = model, optimizers, undo
        self.name, layer = state_layer(model, group)
        self.prefix = f"{self.name}." if self.name else ""
        self.tensors = sorted({piece.tensor for piece in group.slices})
        self.old = old = layer.state_space()
        if not basis.num_units == old.num_states == group.num_units:
            raise GroupError(
                f"the basis of group {group.name!r} is for {basis.num_units} states, but it has {group.num_units}: "
                "use the reading taken at the present widths"
            )
        written = self.prefix + layer.state_weights().inputs[0]
        index = next(piece.index for piece in group.slices if piece.tensor == written and piece.role != "consume")
        self.modes: Modes = basis.modes(old, keep)
        places = [np.flatnonzero(keep[index])]
        if rest:
            self.modes = beside(self.modes, residual_modes(old, self.modes, int((~keep).sum())))
            places.append(np.flatnonzero(~keep[index]))
        self.places = torch.from_numpy(np.concatenate(places)).to(old.eigenvalues.device)

    def apply(self, copies: Sequence[nn.Module]) -> None:
        """Write the modes, and what follows them, at their places."""
        # Before the write: the scale of B that the optimizer's moments were taken at.
        before = self._layer(self.model).state_weights()
        self._write(self.model, self.modes.system)
        self.modes = self._as_taken()
        for copy in copies:
            inner = copy if set(self.tensors) <= set(named_tensors(copy)) else copy.get_submodule("module")
            self._write(inner, self._follow(self._layer(inner).state_space()))
        self._carry(before, self._layer(self.model).state_weights())

    def _layer(self, model: nn.Module) -> Any:
        return model.get_submodule(self.name)

    def _as_taken(self) -> Modes:
        """The modes as the layer has them: some may be mirrored, with other signs of imaginary rows and columns."""
        new = self.modes.system
        now: DiagonalSystem = self._layer(self.model).state_space()
        eigenvalues = now.eigenvalues.index_select(-1, self.places).to(new.eigenvalues)
        inputs = now.inputs.index_select(-2, self.places).to(new.inputs)
        outputs = now.outputs.index_select(-1, self.places).to(new.outputs)
        mirror = DiagonalSystem(new.eigenvalues.conj(), new.inputs.conj(), new.outputs.conj())

        def apart(modes: DiagonalSystem) -> Tensor:
            far: Tensor = (modes.eigenvalues - eigenvalues).abs().square()
            far = far + (modes.inputs - inputs).abs().square().sum(-1)
            return far + (modes.outputs - outputs).abs().square().sum(-2)

        mirrored = apart(mirror) < apart(new)
        sign = torch.where(mirrored, -1.0, 1.0).to(self.modes.reduce)
        signs = torch.cat([torch.ones_like(sign), sign], -1)
        system = DiagonalSystem(
            torch.where(mirrored, mirror.eigenvalues, new.eigenvalues),
            torch.where(mirrored[..., :, None], mirror.inputs, new.inputs),
            torch.where(mirrored[..., None, :], mirror.outputs, new.outputs),
        )
        reduce, expand = signs[..., :, None] * self.modes.reduce, self.modes.expand * signs[..., None, :]
        return replace(self.modes, system=system, reduce=reduce, expand=expand)

    def _write(self, model: nn.Module, new: DiagonalSystem) -> None:
        tensors, layer = named_tensors(model), self._layer(model)
        # Clones, since `set_state_space` writes in place.
        for name in self.tensors:
            self.undo.callback(tensors[name].detach().copy_, tensors[name].detach().clone())
        old = layer.state_space()
        values = old.eigenvalues.detach().to(torch.complex128)
        inputs = torch.zeros_like(old.inputs, dtype=torch.complex128)
        outputs = torch.zeros_like(old.outputs, dtype=torch.complex128)
        layer.set_state_space(
            DiagonalSystem(
                values.index_copy(-1, self.places, new.eigenvalues),
                inputs.index_copy(-2, self.places, new.inputs),
                outputs.index_copy(-1, self.places, new.outputs),
            )
        )

    def _follow(self, other: DiagonalSystem) -> DiagonalSystem:
        """A copy's own B and C in the new coordinates, with the new eigenvalues."""
        inputs = self.modes.reduce @ stack_inputs(other.inputs.detach().to(torch.complex128))
        outputs = stack_outputs(other.outputs.detach().to(torch.complex128)) @ self.modes.expand
        (b_re, b_im), (c_re, c_im) = inputs.chunk(2, -2), outputs.chunk(2, -1)
        return DiagonalSystem(self.modes.system.eigenvalues, torch.complex(b_re, b_im), torch.complex(c_re, -c_im))

    def _carry(self, before: StateWeights, after: StateWeights) -> None:
        inputs, outputs = ([self.prefix + name for name in names] for names in (before.inputs, before.outputs))
        scale = after.input_scale.to(torch.complex128).index_select(-1, self.places)
        gradients_in = _times(scale.conj()) @ self.modes.expand.mT @ _times(1 / before.input_scale.to(scale).conj())
        states, kept = self.old.num_states, self.modes.system.num_states
        gradients_out = _mirror(kept, scale.device) @ self.modes.reduce @ _mirror(states, scale.device)
        dim = self.old.eigenvalues.dim() - 1
        self._turn_state(inputs, gradients_in, dim)
        self._turn_state(outputs, gradients_out, dim + 1)
        tensors = named_tensors(self.model)
        for parameter in (tensors[name] for name in self.tensors if name not in (*inputs, *outputs)):

            def restart(value: Tensor, key: str, shape: torch.Size = parameter.shape) -> Tensor:
                if value.shape != shape:
                    return value
                mean = torch.zeros_like(value) if key in _FIRST else value.mean(dim, keepdim=True).expand_as(value)
                return mean.clone()

            for optimizer in self.optimizers:
                if parameter in optimizer.state:
                    before_turn = optimizer.state[parameter].items()
                    state = {key: map_tensors(value, restart, key) for key, value in before_turn}
                    self._replace_state(optimizer, parameter, state)

    def _turn_state(
        self, names: Sequence[str], gradients: Float[Tensor, "*batch two_kept two_states"], dim: int
    ) -> None:
        """Send the state of a complex weight, kept in one tensor or two, through the map that its gradients take."""
        tensors = named_tensors(self.model)
        parameters = [tensors[name] for name in names]
        for optimizer in self.optimizers:
            states = [optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state]
            if len(states) < len(parameters):
                continue
            fresh = [dict(state) for state in states]
            for key, first in states[0].items():
                values = [state[key] for state in states]
                if isinstance(first, Tensor) and first.shape == parameters[0].shape and first.numel() > 1:
                    for state, value in zip(fresh, _turned(values, key, gradients, dim, self.places), strict=True):
                        state[key] = value
            for parameter, state in zip(parameters, fresh, strict=True):
                self._replace_state(optimizer, parameter, state)

    def _replace_state(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        self.undo.callback(optimizer.state.__setitem__, parameter, optimizer.state[parameter])
        optimizer.state[parameter] = state


def _turned(values: list[Tensor], key: str, gradients: Tensor, dim: int, kept: Tensor) -> list[Tensor]:
    if key not in _FIRST | _SECOND:
        return [value.mean(dim, keepdim=True).expand_as(value).clone() for value in values]
    # Real and imaginary part: in two tensors, of a complex one, or of one that keeps them along a last dim of two.
    whole = torch.view_as_real(values[0]) if values[0].is_complex() else values[0]
    parts = values if len(values) == 2 else whole.unbind(-1)
    stacked = torch.cat(parts, dim).double()
    turning = gradients.square() if key in _SECOND else gradients
    # States lie along the dim before the last of B, and along the last of C.
    moved = turning @ stacked if dim == gradients.dim() - 2 else stacked @ turning.mT
    halves = [
        torch.zeros_like(part).index_copy(dim, kept, half.to(part.dtype))
        for part, half in zip(parts, moved.chunk(2, dim), strict=True)
    ]
    if len(values) == 2:
        return halves
    pairs = torch.stack(halves, -1)
    return [torch.view_as_complex(pairs) if values[0].is_complex() else pairs]


def _times(factor: Tensor) -> Tensor:
    """Multiplication by complex numbers, as a real matrix on stacked real and imaginary parts."""
    real, imag = torch.diag_embed(factor.real), torch.diag_embed(factor.imag)
    return torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)


def _mirror(states: int, device: torch.device) -> Tensor:
    """Changes the sign of imaginary parts: the real form of C holds `-Im C`."""
    ones = torch.ones(states, dtype=torch.float64, device=device)
    return torch.diag(torch.cat([ones, -ones]))
