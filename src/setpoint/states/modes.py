"""Modes: a balanced truncation brought back to complex diagonal form, with the maps that weights and moments follow."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from setpoint.errors import StateSpaceError
from setpoint.groups.states import DiagonalSystem
from setpoint.states.balance import Balance, balance, real_form

_WELL_CONDITIONED = 1e6
_NUDGES = (0.0, 1e-12, 1e-9, 1e-6, 1e-4)  # relative to the dynamics


@dataclass(frozen=True, eq=False)
class Modes:
    """A reduced diagonal system, and how it comes from the full one: in real form, `b' = reduce b`, `c' = c expand`.

    In real form b is `[Re B; Im B]` and c is `[Re C, -Im C]`. Gradients, hence first moments, go the other way:
    `g_b' = expand^T g_b` and `g_c' = g_c reduce^T`; second moments go by the squared entries of the same maps.
    """

    system: DiagonalSystem  # in complex128
    reduce: Float[Tensor, "*batch two_kept two_states"]
    expand: Float[Tensor, "*batch two_states two_kept"]
    order: int  # balanced real states that the modes hold (fewest over the batch); what `error_bound` takes
    # Modes that stand in where fewer sufficed (most over the batch): reached, and not heard until training hears them.
    num_fresh: int = 0


@dataclass(frozen=True, eq=False)
class BalancedPairs:
    """Balanced coordinates of the real form, two states to a unit: unit i is balanced states 2 i and 2 i + 1."""

    balance: Balance  # the balancing pair

    @property
    def num_units(self) -> int:
        return self.balance.values.shape[-1] // 2

    def modes(self, system: DiagonalSystem, keep: Bool[np.ndarray, " units"]) -> Modes:
        """The truncation to the kept pairs, whichever they are."""
        order = np.argsort(~keep, kind="stable")
        states = torch.from_numpy(np.stack([2 * order, 2 * order + 1], 1).ravel()).to(system.eigenvalues.device)
        found = self.balance
        chosen = Balance(found.values[..., states], found.expand[..., :, states], found.reduce[..., states, :])
        return reduce_modes(system, int(keep.sum()), chosen)


def reduce_modes(system: DiagonalSystem, num_modes: int, basis: Balance | None = None) -> Modes:
    """Balanced truncation of a diagonal system's real map to exactly `num_modes` complex modes.

    The real form is truncated to as many balanced states as `num_modes` modes can hold: a conjugate pair of eigenvalues
    takes one mode and two states, a real eigenvalue takes a mode for itself. Then it is diagonalised. A truncation with
    (nearly) repeated eigenvalues has no eigenvectors to speak of, so its dynamics are nudged apart, by at most 1e-4 of
    their norm. Modes are scaled so that B and C keep the proportion that they have in the full system.
    """
    basis = basis or balance(system)
    dynamics = basis.reduce @ real_form(system).dynamics.detach().double() @ basis.expand
    batch, device = system.eigenvalues.shape[:-1], system.eigenvalues.device
    flat = [part.reshape(-1, *part.shape[len(batch) :]).cpu() for part in (dynamics, basis.expand, basis.reduce)]
    ranks = (basis.reduce != 0).any(-1).sum(-1).reshape(-1).tolist()
    # A mode that rounding would put on the circle or outside goes no further out than the full system's outermost.
    outermost = system.eigenvalues.detach().to(torch.complex128).abs().amax(-1).reshape(-1).tolist()
    found = [
        _modes(a, t, w, rank, most, num_modes) for a, t, w, rank, most in zip(*flat, ranks, outermost, strict=True)
    ]
    eigenvalues, synthesis, analysis = (
        torch.stack(parts).reshape(*batch, *parts[0].shape).to(device)
        for parts in zip(*(_pad(part, num_modes) for part in found), strict=True)
    )
    order = min(int((values.imag > 0).sum()) + values.numel() for values, *_ in found)
    num_fresh = num_modes - min(values.numel() for values, *_ in found)
    return _assemble(system, eigenvalues, synthesis, analysis, order, num_fresh)


_Found = tuple[Tensor, Tensor, Tensor]
"""Eigenvalues (modes,), what a mode adds to the states (states, modes), what a mode takes from them (modes, states)."""


def _modes(dynamics: Tensor, expand: Tensor, reduce: Tensor, rank: int, outermost: float, num_modes: int) -> _Found:
    """The longest truncation that `num_modes` modes can hold, diagonalised; one mode for each conjugate pair."""
    order = min(2 * num_modes, rank)
    while order > 0:
        found = _eigen(dynamics[:order, :order], num_modes)
        if isinstance(found, int):  # a state less is a mode less at most
            order -= found
            continue
        values, vectors, inverse = found
        kept = values.imag >= 0
        twice = torch.where(values.imag[kept] > 0, 2.0, 1.0)
        analysis = (inverse @ reduce[:order].to(inverse.dtype))[kept]
        synthesis = twice * (expand[:, :order].to(vectors.dtype) @ vectors)[:, kept]
        modulus = values.abs()
        inside = torch.where(modulus >= 1.0, values / modulus.clamp_min(1e-300) * outermost, values)
        return inside[kept], synthesis, analysis
    empty = torch.zeros(0, dtype=torch.complex128)
    return empty, empty.reshape(len(expand), 0), empty.reshape(0, len(expand))


def _eigen(dynamics: Tensor, num_modes: int) -> tuple[Tensor, Tensor, Tensor] | int:
    """Eigenvalues, eigenvectors and inverse of a real matrix, nudged if need be; or how many modes too many."""
    ladder = torch.diag(torch.linspace(-1.0, 1.0, len(dynamics), dtype=dynamics.dtype))
    norm = torch.linalg.matrix_norm(dynamics).clamp_min(1e-300)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    # The smallest nudge that gives eigenvectors to speak of: every one changes the map a little.
    for nudge in _NUDGES:
        values, vectors = torch.linalg.eig(dynamics + nudge * norm * ladder)
        too_many = int((values.imag >= 0).sum()) - num_modes
        if too_many > 0:
            return too_many
        inverse, singular = torch.linalg.inv_ex(vectors)
        # At most so many times the condition in the 2-norm as there are states.
        condition = float(torch.linalg.matrix_norm(vectors) * torch.linalg.matrix_norm(inverse))
        if bool(singular) or not math.isfinite(condition):
            continue
        if best is None or condition < best[0]:
            best = condition, values, vectors, inverse
        if condition <= _WELL_CONDITIONED * len(dynamics):
            break
    if best is None:
        raise StateSpaceError("the dynamics of a truncation have no eigenvectors, however they are nudged")
    return best[1:]


def _pad(found: _Found, num_modes: int) -> _Found:
    """Room for the modes that are missing: eigenvalue NaN, no part in the maps."""
    eigenvalues, synthesis, analysis = found
    missing = num_modes - eigenvalues.numel()
    pad = torch.nn.functional.pad
    blank = eigenvalues.new_full((missing,), torch.nan)
    return torch.cat([eigenvalues, blank]), pad(synthesis, (0, missing)), pad(analysis, (0, 0, 0, missing))


def _assemble(
    system: DiagonalSystem, eigenvalues: Tensor, synthesis: Tensor, analysis: Tensor, order: int, num_fresh: int
) -> Modes:
    """The reduced system; missing modes are old ones that are no longer heard."""
    states, parts = system.num_states, (system.eigenvalues, system.inputs, system.outputs)
    old = DiagonalSystem(*(part.detach().to(torch.complex128) for part in parts))
    missing = eigenvalues.isnan()
    if num_fresh:
        # Zero modes would have no gradient: old ones are reached, so that training can make itself hear them.
        fresh = torch.arange(eigenvalues.shape[-1], device=eigenvalues.device)
        eigenvalues = torch.where(missing, old.eigenvalues[..., fresh], eigenvalues)
        own = torch.eye(2 * states, dtype=analysis.dtype, device=analysis.device)
        analysis = torch.where(missing[..., None], own[fresh] + 1j * own[fresh + states], analysis)
    real = real_form(old)
    inputs, outputs = analysis @ real.inputs.to(analysis.dtype), real.outputs.to(synthesis.dtype) @ synthesis
    scale = torch.where(missing, 1.0, _scale(old, DiagonalSystem(eigenvalues, inputs, outputs)))
    analysis, synthesis = scale[..., :, None] * analysis, synthesis / scale[..., None, :]
    return Modes(
        DiagonalSystem(eigenvalues, scale[..., :, None] * inputs, outputs / scale[..., None, :]),
        torch.cat([analysis.real, analysis.imag], -2),
        torch.cat([synthesis.real, -synthesis.imag], -1),
        order,
        num_fresh,
    )


def _scale(old: DiagonalSystem, new: DiagonalSystem) -> Float[Tensor, "*batch modes"]:
    """Factor for each mode's B, and divisor for its C (normalised), that keeps their usual proportion."""

    def proportion(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
        room = (1.0 - system.eigenvalues.abs().square()).clamp_min(1e-12)
        return system.inputs.abs().square().sum(-1) / room, system.outputs.abs().square().sum(-2)

    (old_b, old_c), (new_b, new_c) = proportion(old), proportion(new)
    usual = old_b.mean(-1, keepdim=True) / old_c.mean(-1, keepdim=True).clamp_min(1e-300)
    ratio = usual * new_c / new_b.clamp_min(1e-300)
    usable = (new_b > 0) & (new_c > 0) & torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio.clamp(1e-24, 1e24), 1.0) ** 0.25


def residual_modes(system: DiagonalSystem, modes: Modes, num_modes: int) -> Modes:
    """What a reduction has lost, as modes of its own: added to the reduced system they come back near the full one.

    The difference of the two has as many modes as both together; this is its balanced truncation. The maps are those
    from the full system: with `W` and `T` those from the difference, `reduce = W [I; R]` and `expand = [I, -X] T` for
    the maps R and X of the reduction.
    """
    small = modes.system
    difference = _side_by_side(system, DiagonalSystem(small.eigenvalues, small.inputs, -small.outputs))
    found = reduce_modes(difference, num_modes)
    own = torch.eye(2 * system.num_states, dtype=modes.reduce.dtype, device=modes.reduce.device)
    own = own.expand(*modes.reduce.shape[:-2], *own.shape)
    both = _interleaved(own, modes.reduce, -2), _interleaved(own, -modes.expand, -1)
    return Modes(found.system, found.reduce @ both[0], both[1] @ found.expand, found.order, found.num_fresh)


def beside(first: Modes, second: Modes) -> Modes:
    """Two sets of modes of one system, as one: their outputs are added."""
    return Modes(
        _side_by_side(first.system, second.system),
        _interleaved(first.reduce, second.reduce, -2),
        _interleaved(first.expand, second.expand, -1),
        first.order + second.order,
        first.num_fresh + second.num_fresh,
    )


def _side_by_side(one: DiagonalSystem, other: DiagonalSystem) -> DiagonalSystem:
    parts = ((one.eigenvalues, other.eigenvalues, -1), (one.inputs, other.inputs, -2), (one.outputs, other.outputs, -1))
    return DiagonalSystem(*(torch.cat([left.detach().to(right), right], dim) for left, right, dim in parts))


def _interleaved(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Both in real form along a dim: the real parts of both, then the imaginary parts of both."""
    halves = zip(first.chunk(2, dim), second.chunk(2, dim), strict=True)
    return torch.cat([part for pair in halves for part in pair], dim)
