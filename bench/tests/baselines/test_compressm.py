import numpy as np
import pytest
import torch

import setpoint
from setpoint.states import transfer
from setpoint_bench.baselines.compressm import ComplexBalance, ComplexHankelSensor, ToleranceController
from setpoint_bench.models import SequenceClassifier
from states.systems import ANGLES, diagonal


def test_complex_values_are_roots_of_eigenvalues() -> None:
    """Values are `sqrt(eig(P Q))` of the complex Gramians, as the paper defines them."""
    system = diagonal(10)
    a, b, c = system.eigenvalues, system.inputs, system.outputs
    apart = 1 - a[:, None] * a.conj()[None, :]
    product = (b @ b.mH / apart) @ (c.mH @ c / apart.conj())
    want = torch.linalg.eigvals(product).real.sort(descending=True).values.sqrt()
    torch.testing.assert_close(ComplexBalance.of(system).values, want, rtol=1e-6, atol=1e-8)


def test_all_states_are_the_system_itself() -> None:
    """Kept whole, the diagonalised balanced system has the same transfer function."""
    system = diagonal(10)
    modes = ComplexBalance.of(system).modes(system, np.ones(10, dtype=bool))
    torch.testing.assert_close(transfer(modes.system, ANGLES), transfer(system, ANGLES), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("tolerance", "kept"), [(0.3, 2), (0.05, 3), (0.02, 4), (0.001, 20)])
def test_tolerance_keeps_the_fewest_states_of_that_share(tolerance: float, kept: int) -> None:
    """The sum of the kept values reaches 1 - tolerance with no state to spare; a small saving is left alone."""
    values = np.array([0.5, 0.3, 0.15, 0.035, *np.full(16, 0.015 / 16)])
    keep = ToleranceController(tolerance)._keep(values)
    assert keep.sum() == kept and (np.diff(keep.astype(int)) <= 0).all()


def test_four_checks_in_the_first_tenth() -> None:
    """Checks are evenly spaced and end at a tenth of the run."""
    controller = ToleranceController()
    assert [step for step in range(1, 1001) if controller.due(step, 1000)] == [25, 50, 75, 100]
    for bad in ({"tolerance": 0.0}, {"gate": 2.0}, {"num_checks": 0}):
        with pytest.raises(ValueError, match="tolerance must be"):
            ToleranceController(**bad)  # type: ignore[arg-type]


def test_it_runs_in_the_same_loop() -> None:
    """The baseline reduces a model in training through the same hooks, ledger and actuator."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, num_channels=4, num_states=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    example = (torch.randn(16, 12, 1),)
    groups = tuple(group for group in setpoint.find_groups(model, example) if group.kind == "state")
    with setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(1.0, of="flops"),
        example=example,
        total_steps=40,
        controller=ToleranceController(0.1),
        sensor=ComplexHankelSensor(),
        groups=groups,
    ) as loop:
        for _ in range(40):
            model(torch.randn(16, 12, 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loop.widths["blocks.0.lru"] == model.blocks[0].lru.nu_log.shape[0] < 24
    assert [entry.step for entry in loop.ledger] == [1, 2, 3, 4]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
