import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov

from setpoint.errors import StateSpaceError
from setpoint.states import DenseSystem, DiagonalSystem, balance, gramian_factors, hankel_values, real_form
from states.systems import dense, diagonal


def _scipy(system: DenseSystem) -> tuple[np.ndarray, np.ndarray]:
    a, b, c = (part.numpy() for part in (system.dynamics, system.inputs, system.outputs))
    return solve_discrete_lyapunov(a, b @ b.T), solve_discrete_lyapunov(a.T, c.T @ c)


@settings(max_examples=25, deadline=None)
@given(states=st.integers(1, 24), seed=st.integers(0, 10**6), inputs=st.integers(1, 4))
def test_gramians_solve_the_lyapunov_equations(states: int, seed: int, inputs: int) -> None:
    """The factors of both Gramians, of diagonal and of dense systems, give SciPy's to 1e-9."""
    for system in (diagonal(states, inputs, seed=seed), dense(states, inputs, seed=seed)):
        want = _scipy(real_form(system) if isinstance(system, DiagonalSystem) else system)
        for oracle, factor in zip(want, gramian_factors(system), strict=True):
            np.testing.assert_allclose((factor @ factor.mT).numpy(), oracle, atol=1e-9 * np.abs(oracle).max())


@pytest.mark.parametrize("states", [1, 5, 40])
def test_hankel_values_are_those_of_python_control(states: int) -> None:
    """Hankel singular values are the roots of the eigenvalues of python-control's two Gramians' product."""
    control = pytest.importorskip("control")
    system = dense(states, seed=states)
    parts = [part.numpy() for part in (system.dynamics, system.inputs, system.outputs)]
    plant = control.ss(*parts, np.zeros((3, 2)), True)
    squares = np.linalg.eigvals(control.gram(plant, "c") @ control.gram(plant, "o")).real
    got = hankel_values(system).numpy()
    np.testing.assert_allclose(got, np.sqrt(np.sort(squares.clip(0))[::-1]), rtol=1e-6, atol=1e-6 * got[0])


_FIELDS = ("eigenvalues", "inputs", "outputs")


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_near_the_unit_circle_values_stay_right(gap: float) -> None:
    """One mode with real eigenvalue a = 1 - gap has Hankel value |b c| / (1 - a^2); its mirror image has none."""
    a = 1.0 - gap
    one = torch.ones(1, 1, dtype=torch.complex128)
    values = hankel_values(DiagonalSystem(torch.tensor([a], dtype=torch.complex128), one, 2 * one))
    assert values[0].item() == pytest.approx(2 / (1 - a * a), rel=1e-6)
    assert values[1].item() <= 1e-7 * values[0].item()
    slow = DenseSystem(torch.tensor([[a]], dtype=torch.float64), one.real, 2 * one.real)
    assert balance(slow).values.item() == pytest.approx(2 / (1 - a * a), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(copies=st.integers(2, 6), silent=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_repeated_conjugate_silent_and_unreached_states(copies: int, silent: int, seed: int) -> None:
    """Repeated and conjugate eigenvalues and states without B or C are told from the others, and nothing is NaN.

    Modes with one eigenvalue, and with the conjugate of it, are together no more than as many as there are inputs.
    """
    one = diagonal(1, 1, 1, seed=seed)
    rest = diagonal(2 + 2 * silent, 1, 1, seed=seed + 1)
    rest.inputs[2 : 2 + silent] = 0.0
    rest.outputs[:, 2 + silent :] = 0.0
    values = torch.where(torch.arange(copies) % 2 == 0, one.eigenvalues, one.eigenvalues.conj())
    system = DiagonalSystem(
        torch.cat([values, rest.eigenvalues]),
        torch.cat([one.inputs.expand(copies, 1), rest.inputs]),
        torch.cat([one.outputs.expand(1, copies), rest.outputs], 1),
    )
    basis = balance(system)
    found = basis.values
    assert torch.isfinite(found).all() and torch.isfinite(basis.expand).all() and torch.isfinite(basis.reduce).all()
    assert found.shape == (2 * (copies + 2 + 2 * silent),)
    assert (found[6:] <= 1e-6 * found[0]).all()  # a pair for the repeated one, a pair for each of the two others


@pytest.mark.parametrize("modulus", [1.0, 1.5])
def test_unstable_systems_are_refused(modulus: float) -> None:
    """An eigenvalue on or outside the unit circle is an error that says how large it is."""
    system = diagonal(3)
    system.eigenvalues[1] = modulus
    with pytest.raises(StateSpaceError, match=r"not stable: 1 of 3 eigenvalues .* largest modulus is 1"):
        balance(system)
    dense_one = DenseSystem(torch.diag(torch.tensor([0.5, modulus])), torch.ones(2, 1), torch.ones(1, 2))
    with pytest.raises(StateSpaceError, match="the layer is not stable"):
        balance(dense_one, "the layer")


def test_values_that_are_no_numbers_are_refused() -> None:
    """NaN and infinity are errors by name."""
    for field in _FIELDS:
        system = diagonal(3)
        getattr(system, field)[..., 0] = torch.nan
        with pytest.raises(StateSpaceError, match="NaN or infinite"):
            balance(system)
