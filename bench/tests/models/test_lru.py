import torch

from setpoint.states import DiagonalSystem, StateSpaceLayer
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
