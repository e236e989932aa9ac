"""The scan: a diagonal complex recurrence between two matrix products, forward and backward, block by block.

It is one op to PyTorch, so exporters and compilers see a node instead of a loop. The states of a whole sequence
are never kept: the forward remembers nothing but its inputs, and the backward runs each block of steps again.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_PARTS = "Tensor u, Tensor a_re, Tensor a_im, Tensor b_re, Tensor b_im, Tensor c_re, Tensor c_im"
_BLOCK_BYTES = 2**19  # states of one block of a scan on a CPU: three such blocks lie in its cache


def diagonal_scan(
    u: Float[Tensor, "batch steps in_channels"],
    eigenvalues: tuple[Float[Tensor, " states"], Float[Tensor, " states"]],
    inputs: tuple[Float[Tensor, "states in_channels"], Float[Tensor, "states in_channels"]],
    outputs: tuple[Float[Tensor, "out_channels states"], Float[Tensor, "out_channels states"]],
) -> Float[Tensor, "batch steps out_channels"]:
    """`y[t] = Re(C x[t])` for `x[t] = a * x[t-1] + B u[t]`, from `x[-1] = 0`, with a, B and C in two real parts each.

    On a CPU steps follow each other within blocks that its cache holds; elsewhere, where many
    small calls cost more than arithmetic, a sequence of L steps takes about `3 sqrt(L)` calls.

    >>> half, one, zero = torch.tensor([0.5]), torch.ones(1, 1), torch.zeros(1, 1)
    >>> diagonal_scan(torch.ones(1, 3, 1), (half, zero[0]), (one, zero), (one, zero)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    result: Tensor = _scan(u, *eigenvalues, *inputs, *outputs)
    return result


@torch.library.custom_op("setpoint::diagonal_scan", mutates_args=(), schema=f"({_PARTS}) -> Tensor")
def _scan(u: Tensor, a_re: Tensor, a_im: Tensor, b_re: Tensor, b_im: Tensor, c_re: Tensor, c_im: Tensor) -> Tensor:
    run = _Run(u, a_re, a_im, b_re, b_im, c_re, c_im)
    y = run.u.new_empty(*run.u.shape[:2], c_re.shape[0])
    before: Tensor | None = None
    room = run.room()
    for block in run.blocks:
        x = run.states(block, before, room)
        before = x[-1].clone()
        torch.mm(_rows(x), run.outward.mT, out=y[block].flatten(0, 1))
    return y.transpose(0, 1).to(u.dtype).contiguous()


@torch.library.custom_op(
    "setpoint::diagonal_scan_backward", mutates_args=(), schema=f"(Tensor grad, {_PARTS}) -> Tensor[]"
)
def _scan_backward(
    grad: Tensor, u: Tensor, a_re: Tensor, a_im: Tensor, b_re: Tensor, b_im: Tensor, c_re: Tensor, c_im: Tensor
) -> list[Tensor]:
    """Gradients of all arguments, with `s[t] = conj(C)^T g[t] + conj(a) * s[t+1]`.

    Of u `Re(conj(B)^T s)`, of B `s u^T`, of a the sum of `s[t] conj(x[t-1])`, and of C `g x^H`.
    """
    run = _Run(u, a_re, a_im, b_re, b_im, c_re, c_im)
    g = grad.to(run.u.dtype).transpose(0, 1).contiguous()
    grad_u, grad_a = torch.empty_like(run.u), torch.zeros_like(run.a)
    grad_in, grad_out = torch.zeros_like(run.inward), torch.zeros_like(run.outward)
    after: Tensor | None = None
    rooms = [run.room() for _ in range(3)]
    for block, before in zip(reversed(run.blocks), reversed(run.seams(rooms[0])), strict=True):
        x, s, product = (room[: block.stop - block.start] for room in rooms)
        run.states(block, before, x)
        torch.mm(g[block].flatten(0, 1), run.outward, out=_rows(s))
        recur(s, run.a.conj().resolve_conj(), after, backwards=True)
        after = s[0].clone()
        grad_out.addmm_(g[block].flatten(0, 1).mT, _rows(x))
        grad_in.addmm_(_rows(s).mT, run.u[block].flatten(0, 1))
        torch.mm(_rows(s), run.inward, out=grad_u[block].flatten(0, 1))
        torch.view_as_real(x)[..., 1].neg_()  # x is its own conjugate from here on
        grad_a += torch.mul(s[1:], x[:-1], out=product[1:]).sum((0, 1))
        if before is not None:
            grad_a += (s[0] * before.conj()).sum(0)
    grad_b, grad_c = grad_in.view(-1, 2, grad_in.shape[1]), grad_out.view(len(grad_out), -1, 2)
    weights = (grad_b[:, 0], grad_b[:, 1], grad_c[..., 0], -grad_c[..., 1])
    found = (grad_u.transpose(0, 1), grad_a.real, grad_a.imag, *weights)
    pairs = zip(found, (u, a_re, a_im, b_re, b_im, c_re, c_im), strict=True)
    return [part.to(like.dtype).clone(memory_format=torch.contiguous_format) for part, like in pairs]


class _Run:
    """The arguments of a scan, laid out for it: time first, real and imaginary parts side by side."""

    def __init__(self, u: Tensor, a_re: Tensor, a_im: Tensor, *weights: Tensor) -> None:
        dtype = torch.promote_types(a_re.dtype, torch.float32)
        b_re, b_im, c_re, c_im = (weight.to(dtype) for weight in weights)
        self.u = u.to(dtype).transpose(0, 1).contiguous()
        self.a = torch.complex(a_re.to(dtype), a_im.to(dtype))
        self.inward = torch.stack([b_re, b_im], 1).flatten(0, 1)
        self.outward = torch.stack([c_re, -c_im], 2).flatten(1)
        steps, batch = self.u.shape[:2]
        per_step = 2 * batch * self.a.numel() * self.u.element_size()
        length = steps if u.is_cuda else min(steps, max(8, _BLOCK_BYTES // max(1, per_step)))
        starts = range(0, steps, max(1, length))
        self.blocks = [slice(start, min(start + length, steps)) for start in starts]

    def room(self) -> Complex[Tensor, "most_steps batch states"]:
        """Memory for the states of the longest block, for all blocks in turn: new memory costs more than a pass."""
        steps = max((block.stop - block.start for block in self.blocks), default=0)
        return torch.empty(steps, self.u.shape[1], self.a.numel(), dtype=self.a.dtype, device=self.a.device)

    def states(
        self, block: slice, before: Tensor | None, room: Complex[Tensor, "some_steps batch states"]
    ) -> Complex[Tensor, "block_steps batch states"]:
        """States of one block of steps, from the state before it, at the beginning of the room."""
        x = room[: block.stop - block.start]
        torch.mm(self.u[block].flatten(0, 1), self.inward.mT, out=_rows(x))
        recur(x, self.a, before)
        return x

    def seams(self, room: Complex[Tensor, "most_steps batch states"]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None]
        for block in self.blocks[:-1]:
            found.append(self.states(block, found[-1], room)[-1].clone())
        return found[: len(self.blocks)]


def recur(
    x: Complex[Tensor, "steps batch states"],
    a: Complex[Tensor, " states"],
    before: Complex[Tensor, "batch states"] | None,
    backwards: bool = False,
) -> None:
    """In place: `x[t] += a * x[t-1]` for all t in turn; backwards, `x[t] += a * x[t+1]`.

    x is what comes in at each step, and becomes the states. The first step starts from the state `before`, or from 0.
    """
    steps = x.unbind(0)[:: -1 if backwards else 1]
    if before is not None:
        steps[0].addcmul_(a, before)
    if x.device.type != "cpu":
        recur_by_rows(x, a, backwards)
        return
    a = a.expand_as(steps[0]).contiguous()
    for earlier, here in pairwise(steps):
        here.addcmul_(a, earlier)


def recur_by_rows(x: Tensor, a: Tensor, backwards: bool) -> None:
    """The same with steps as rows of a square: all rows at once, then from row to row, then what each hands on."""
    width = math.isqrt(len(x))
    rows, rest = divmod(len(x), width)
    turn = -1 if backwards else 1
    square = (x[rest:] if backwards else x[: rows * width]).view(rows, width, *x.shape[1:])
    columns = square.unbind(1)[::turn]
    for earlier, here in pairwise(columns):
        here.addcmul_(a, earlier)
    ends = columns[-1]
    for earlier, here in pairwise(ends.unbind(0)[::turn]):
        here.addcmul_(a**width, earlier)
    given, takers = (ends[1:], slice(None, -1)) if backwards else (ends[:-1], slice(1, None))
    factor = a
    for column in columns[:-1]:
        column[takers].addcmul_(factor, given)
        factor = factor * a
    left_over = (x[:rest] if backwards else x[rows * width :]).unbind(0)[::turn]
    for earlier, here in pairwise((ends[0 if backwards else -1], *left_over)):
        here.addcmul_(a, earlier)


def _rows(x: Tensor) -> Tensor:
    """The same memory as real numbers: a row for each step and sample, real and imaginary parts side by side."""
    return torch.view_as_real(x).flatten(0, 1).flatten(1)


@_scan.register_fake
def _(u: Tensor, a_re: Tensor, a_im: Tensor, b_re: Tensor, b_im: Tensor, c_re: Tensor, c_im: Tensor) -> Tensor:
    return u.new_empty(*u.shape[:2], c_re.shape[0])


@_scan_backward.register_fake
def _(grad: Tensor, *arguments: Tensor) -> list[Tensor]:
    return [torch.empty_like(argument, memory_format=torch.contiguous_format) for argument in arguments]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return tuple(_scan_backward(grad, *ctx.saved_tensors))


_scan.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.setpoint.diagonal_scan)
def _forward_flops(u: Any, a_re: Any, a_im: Any, b_re: Any, b_im: Any, c_re: Any, c_im: Any, **kwargs: Any) -> int:
    """Two products; the recurrence, like all that works entry by entry, counts as nothing."""
    return int(2 * math.prod(u[:2]) * 2 * b_re[0] * (b_re[1] + c_re[0]))


@register_flop_formula(torch.ops.setpoint.diagonal_scan_backward)
def _backward_flops(grad: Any, *arguments: Any, **kwargs: Any) -> int:
    """Two products for each of the forward's two; running the forward again is a choice of this op, not counted."""
    return 2 * _forward_flops(*arguments)
