from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from setpoint.errors import StateSpaceError
from setpoint.states import (
    DenseSystem,
    DiagonalSystem,
    balance,
    beside,
    error_bound,
    gramian_factors,
    real_form,
    reduce_modes,
    residual_modes,
    truncate,
)
from states.systems import ANGLES, dense, diagonal, impulse_response, transfer


def _error(system: DiagonalSystem | DenseSystem, other: DiagonalSystem | DenseSystem) -> float:
    angles = ANGLES[:: 1 if system.num_states < 200 else 16]
    return float(torch.linalg.matrix_norm(transfer(system, angles) - transfer(other, angles), 2).max())


@settings(max_examples=20, deadline=None)
@given(states=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_balancing_makes_both_gramians_the_values(states: int, seed: int) -> None:
    """In balanced coordinates both Gramians are diag(values), and the pair is biorthogonal."""
    for system in (dense(states, seed=seed), diagonal(states, seed=seed)):
        basis = balance(system)
        real = real_form(system) if isinstance(system, DiagonalSystem) else system
        clear = int((basis.values > 1e-6 * basis.values[0]).sum())  # the others are resolved less well
        expand, reduce = basis.expand[:, :clear], basis.reduce[:clear]
        reached, heard = gramian_factors(real)
        want = torch.diag(basis.values[:clear])
        scale = float(basis.values[0])
        torch.testing.assert_close(reduce @ reached @ reached.mT @ reduce.mT, want, atol=1e-6 * scale, rtol=0)
        torch.testing.assert_close(expand.mT @ heard @ heard.mT @ expand, want, atol=1e-6 * scale, rtol=0)
        torch.testing.assert_close(reduce @ expand, torch.eye(clear).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("states", "kept"), [(4, 2), (16, 5), (64, 20), (256, 28), (512, 100)])
@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_the_error_bound_holds(states: int, kept: int, kind: str) -> None:
    """H-infinity error of the truncation <= 2 * sum of the dropped values, from 4 to 512 states."""
    system = dense(states, seed=states) if kind == "dense" else diagonal(states, seed=states)
    basis = balance(system)
    small = truncate(system, kept, basis)
    assert _error(system, small) <= float(error_bound(basis.values, kept)) * (1 + 1e-6) + 1e-6 * float(basis.values[0])
    assert float(torch.linalg.eigvals(small.dynamics).abs().max()) < 1.0


@settings(max_examples=30, deadline=None)
@given(states=st.integers(4, 48), seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0))
def test_modes_meet_the_bound_and_any_size(states: int, seed: int, share: float) -> None:
    """A system in as many modes as asked for, within the bound of the balanced states that it holds."""
    system = diagonal(states, seed=seed)
    num_modes = max(1, round(share * states))
    basis = balance(system)
    modes = reduce_modes(system, num_modes, basis)
    assert modes.system.num_states == num_modes and num_modes <= modes.order + modes.num_fresh <= 2 * num_modes
    assert float(modes.system.eigenvalues.abs().max()) < 1.0
    bound = float(error_bound(basis.values, modes.order))
    assert _error(system, modes.system) <= bound * (1 + 1e-6) + 1e-5 * float(basis.values[0])


def test_truncation_is_that_of_slicot() -> None:
    """The reduced transfer function is that of SLICOT's square-root balanced truncation, AB09AD."""
    slycot = pytest.importorskip("slycot")
    system = dense(12, 1, 1, seed=5)
    parts = [part.numpy() for part in (system.dynamics, system.inputs, system.outputs)]
    order, a, b, c, values = slycot.ab09ad("D", "B", "N", 12, 1, 1, *parts, nr=5)
    assert order == 5
    np.testing.assert_allclose(balance(system).values.numpy(), values, rtol=1e-6, atol=1e-7 * values[0])
    assert _error(truncate(system, 5), DenseSystem(*map(torch.from_numpy, (a, b, c)))) <= 1e-7 * values[0]


@settings(max_examples=20, deadline=None)
@given(alive=st.integers(1, 6), silent=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_states_of_value_zero_go_for_nothing(alive: int, silent: int, seed: int) -> None:
    """Twin: with states that are never heard, or never reached, gone, the impulse response is the same."""
    system = diagonal(alive + silent, seed=seed)
    half = alive + (silent + 1) // 2
    system.inputs[alive:half] = 0.0
    system.outputs[:, half:] = 0.0
    small = reduce_modes(system, alive).system
    want = impulse_response(system, 60)
    torch.testing.assert_close(impulse_response(small, 60), want, rtol=0, atol=1e-6 * float(want.abs().max()))


def test_weights_follow_the_maps() -> None:
    """In real form the reduced B is `reduce b`, the reduced C is `c expand`, and the maps undo each other."""
    system = diagonal(9, 2, 3, least=0.8)
    modes = reduce_modes(system, 4)
    real, small = real_form(system), real_form(modes.system)
    torch.testing.assert_close(modes.reduce @ real.inputs, small.inputs)
    torch.testing.assert_close(real.outputs @ modes.expand, small.outputs)
    pairs = modes.system.eigenvalues.imag > 0
    both = torch.cat([pairs, pairs])
    torch.testing.assert_close((modes.reduce @ modes.expand)[both][:, both], torch.eye(int(both.sum())).double())


@pytest.mark.parametrize("num_modes", [1, 2, 3])
def test_repeated_eigenvalues_do_not_break_modes(num_modes: int) -> None:
    """A chain of three nearly equal filters has nearly defective truncations; modes are finite, stable, in bound."""
    a = 0.8
    chain = torch.tensor([[a, 0.0, 0.0], [1.0, a, 0.0], [0.0, 1.0, a]], dtype=torch.float64)
    values, vectors = torch.linalg.eig(chain + 1e-2 * torch.diag(torch.arange(3.0).double()))
    inputs = torch.linalg.solve(vectors, torch.eye(3, dtype=vectors.dtype)[:, :1])
    system = DiagonalSystem(values, inputs, vectors[2:])
    modes = reduce_modes(system, num_modes)
    for part in (modes.system.eigenvalues, modes.system.inputs, modes.system.outputs, modes.expand, modes.reduce):
        assert torch.isfinite(part).all()
    bound = float(error_bound(balance(system).values, modes.order))
    assert _error(system, modes.system) <= bound + 1e-4 * float(balance(system).values[0])


def test_a_batch_is_reduced_member_by_member() -> None:
    """Independent systems (S4D's channels) each get modes of their own."""
    parts = [diagonal(6, 1, 1, seed=seed) for seed in range(3)]
    batch = DiagonalSystem(
        *(torch.stack([getattr(each, name) for each in parts]) for name in ("eigenvalues", "inputs", "outputs"))
    )
    small = reduce_modes(batch, 3).system
    for position, each in enumerate(parts):
        want = impulse_response(reduce_modes(each, 3).system, 30)
        torch.testing.assert_close(impulse_response(small, 30)[:, position], want, rtol=1e-6, atol=1e-9)


def test_real_eigenvalues_take_a_mode_each() -> None:
    """Of a system whose eigenvalues are real as many states are kept as modes were asked for, as near as the bound
    says; which are so many is found in a few steps, not one by one.
    """
    values = torch.linspace(0.3, 0.99, 192, dtype=torch.float64).to(torch.complex128)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(192, 8, dtype=torch.float64, generator=generator).to(values)
    system, calls = DiagonalSystem(values, weights, weights.mT), 0
    found = torch.linalg.eig

    def counted(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        return found(matrix)

    with patch.object(torch.linalg, "eig", counted):
        modes = reduce_modes(system, 20)
    assert modes.order == 20 and calls <= 10
    assert _error(system, modes.system) <= float(error_bound(balance(system).values, 20))


def test_what_is_not_resolved_counts_as_that_much() -> None:
    """A Hankel value that is lost in rounding is no 0: the bound holds where nothing but such values are dropped."""
    system = dense(64, 1, 1)
    values = balance(system).values
    assert values[63] < 1e-8 * values[0]
    assert _error(system, truncate(system, 63)) <= float(error_bound(values, 63))
    assert float(error_bound(torch.tensor([1.0, 0.0]), 1)) == 0.0


def test_modes_near_the_circle_stay_there() -> None:
    """An eigenvalue nearer to the unit circle than rounding elsewhere is kept as it is."""
    values = torch.tensor([1 - 1e-9, 0.5j, 0.3, 0.1j], dtype=torch.complex128)
    weights = torch.ones(4, 2, dtype=torch.complex128)
    system = DiagonalSystem(values, weights, weights.mT)
    kept = reduce_modes(system, 3).system
    assert float(abs(kept.eigenvalues.abs().max() - (1 - 1e-9))) < 1e-12


def test_weights_without_finite_gramians_are_refused() -> None:
    """B so large that its square is infinite."""
    system = diagonal(4)
    with pytest.raises(StateSpaceError, match="so large"):
        balance(replace(system, inputs=system.inputs * 1e200))


def test_what_a_reduction_loses_comes_back_as_modes() -> None:
    """Beside the reduced system, as many modes as were dropped give the full map back: exactly where the dropped modes
    have channels of their own, and else with an error far below that of the reduction. The maps give the same weights.
    """
    own = torch.eye(5, dtype=torch.complex128)
    values = torch.tensor([0.95j, 0.9j, 0.3j, 0.2 + 0.1j, 0.1j], dtype=torch.complex128)
    for system, kept, share in ((DiagonalSystem(values, own, own), 2, 1e-5), (diagonal(48, 4, 4), 16, 0.5)):
        modes = reduce_modes(system, kept)
        rest = residual_modes(system, modes, system.num_states - kept)
        whole = beside(modes, rest)
        assert whole.system.num_states == system.num_states
        assert _error(system, whole.system) < share * _error(system, modes.system)
        real, small = real_form(system), real_form(whole.system)
        torch.testing.assert_close(whole.reduce @ real.inputs, small.inputs, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(real.outputs @ whole.expand, small.outputs, rtol=1e-6, atol=1e-8)
