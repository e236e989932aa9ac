import pytest
import torch

from setpoint.states import DiagonalSystem, StateSpaceLayer, check_system
from setpoint_bench.models import LRU


def _layer(states: int = 12) -> LRU:
    torch.manual_seed(0)
    return LRU(3, states).double()


def test_layer_is_its_system() -> None:
    """The impulse response of the layer, without D, is that of the system it gives."""
    layer = _layer()
    assert isinstance(layer, StateSpaceLayer)
    u = torch.zeros(3, 40, 3, dtype=torch.float64)
    u[range(3), 0, range(3)] = 1.0
    system = layer.state_space()
    x, want = system.inputs, []
    for _ in range(40):
        want.append((system.outputs @ x).real)
        x = system.eigenvalues[:, None] * x
    got = layer(u) - layer.D * u
    torch.testing.assert_close(got.permute(1, 2, 0), torch.stack(want))


def test_system_goes_in_and_comes_out() -> None:
    """Taking back the system that was given changes no output; neither do conjugated modes."""
    layer, u = _layer(), torch.randn(2, 30, 3, dtype=torch.float64)
    want = layer(u)
    system = layer.state_space()
    for each in (system, DiagonalSystem(*(part.conj().resolve_conj() for part in vars(system).values()))):
        layer.set_state_space(each)
        torch.testing.assert_close(layer(u), want)


@pytest.mark.parametrize("value", [0.9, -0.9, 0.0, 1.0 - 1e-9])
def test_real_eigenvalues_can_be_taken_and_trained(value: float) -> None:
    """Real eigenvalues, zero and nearly one become finite parameters that keep their gradient."""
    layer = _layer(1)
    one = torch.ones(1, 3, dtype=torch.complex128)
    layer.set_state_space(DiagonalSystem(torch.tensor([value], dtype=torch.complex128), one, one.mT))
    found = layer.state_space()
    check_system(found)
    assert abs(found.eigenvalues.item() - value) < 0.01 * (1 - abs(value)) + 1e-6
    layer(torch.randn(2, 20, 3, dtype=torch.float64)).square().sum().backward()
    for parameter in layer.parameters():
        assert torch.isfinite(parameter).all() and parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_ring_of_eigenvalues() -> None:
    """Eigenvalues start in the ring that was asked for, states with the variance of a white input."""
    torch.manual_seed(0)
    system = LRU(64, 500, least_modulus=0.5, most_modulus=0.9).state_space()
    moduli = system.eigenvalues.abs()
    assert moduli.min() >= 0.5 and moduli.max() <= 0.9
    variance = system.inputs.abs().square().sum(1) / (1 - moduli.square())
    assert 0.9 < float(variance.mean()) < 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_states": 0}, "positive"), ({"least_modulus": 0.9, "most_modulus": 0.5}, "least_modulus")],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    """Sizes and rings that make no sense are refused."""
    with pytest.raises(ValueError, match=message):
        LRU(**{"num_channels": 2, "num_states": 2, **settings})  # type: ignore[arg-type]
