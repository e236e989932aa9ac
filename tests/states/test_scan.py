from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from setpoint.states import scan
from setpoint.states.scan import diagonal_scan


def _arguments(steps: int, states: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    a = torch.polar(0.6 + 0.4 * torch.rand(states, generator=generator, dtype=dtype), 3 * draw(states))
    parts = [draw(2, steps, 3), a.real, a.imag, *(draw(states, 3) for _ in "12"), *(draw(5, states) for _ in "12")]
    return [part.clone().requires_grad_() for part in parts]


def _run(u: Tensor, a_re: Tensor, a_im: Tensor, b_re: Tensor, b_im: Tensor, c_re: Tensor, c_im: Tensor) -> Tensor:
    return diagonal_scan(u, (a_re, a_im), (b_re, b_im), (c_re, c_im))


def _one_by_one(u: Tensor, *parts: Tensor) -> Tensor:
    a, b, c = (torch.complex(parts[place], parts[place + 1]) for place in (0, 2, 4))
    x, found = torch.zeros(len(u), len(a), dtype=a.dtype), []
    for step in range(u.shape[1]):
        x = a * x + u[:, step].to(a.dtype) @ b.mT
        found.append((x @ c.mT).real)
    return torch.stack(found, 1)


@pytest.mark.parametrize("block_bytes", [1, 2**20])
@pytest.mark.parametrize("steps", [1, 2, 8, 21])
def test_scan_is_the_recurrence(steps: int, block_bytes: int) -> None:
    """Output and all gradients are those of the recurrence taken step by step, in one block and in several."""
    arguments = _arguments(steps)
    with patch.object(scan, "_BLOCK_BYTES", block_bytes):
        got, want = _run(*arguments), _one_by_one(*arguments)
        torch.testing.assert_close(got, want)
        weights = torch.randn_like(want)
        gradients = [torch.autograd.grad((y * weights).sum(), arguments) for y in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 23])
def test_by_rows_is_step_by_step(steps: int, backwards: bool) -> None:
    """What runs on accelerators gives the same states as the plain loop."""
    a = torch.polar(torch.full((4,), 0.9), torch.arange(4.0)).to(torch.complex128)
    x = torch.randn(steps, 2, 4, dtype=torch.complex128)
    before = torch.randn(2, 4, dtype=torch.complex128)
    by_steps, by_rows = x.clone(), x.clone()
    scan.recur(by_steps, a, before, backwards)
    by_rows[-1 if backwards else 0] += a * before
    scan.recur_by_rows(by_rows, a, backwards)
    torch.testing.assert_close(by_rows, by_steps)


# PyTorch 2.14 warns of its own check.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_scan_is_one_op_for_exporters() -> None:
    """Torch's own checks of a custom op pass: fake tensors, autograd registration, schema."""
    torch.library.opcheck(scan._scan, tuple(_arguments(9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_come_back(dtype: torch.dtype) -> None:
    """Low-precision sequences are scanned in single precision and returned as they came."""
    arguments = _arguments(9, dtype=torch.float32)
    u = arguments[0].detach().to(dtype).requires_grad_()
    y = _run(u, *arguments[1:])
    y.sum().backward()
    assert y.dtype == dtype and u.grad is not None and u.grad.dtype == dtype


def test_flops_are_counted_as_products() -> None:
    """`torch.utils.flop_counter` sees two complex-by-real products forward, and two each for them backward."""
    with FlopCounterMode(display=False) as counter:
        _run(*_arguments(9)).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 2 * 9 * 2 * 4 * (3 + 5))
