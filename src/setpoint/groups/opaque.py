"""Ops that stand in a graph for what no graph can show: calls of opaque modules, and custom autograd Functions.

Whatever touches one of them is frozen. A Function that works on each entry alone, by trial, needs none.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from setpoint.groups.example import mapped, tensors_of
from setpoint.groups.walk import DimLabels, Value, Walk, rule

_TRIED = 2**18  # entries of a trial of a Function


@torch.library.custom_op("setpoint::opaque_call", mutates_args=(), schema="(Tensor[] r, Tensor x, str name) -> Tensor")
def _opaque_call(r: Sequence[Tensor], x: Tensor, name: str) -> Tensor:
    """One of the tensors that an opaque module returns, having read these."""
    return x.clone()  # a custom op must not return its input


@torch.library.custom_op("setpoint::custom_function", mutates_args=(), schema="(Tensor x, str name) -> Tensor")
def mark_function(x: Tensor, name: str) -> Tensor:
    """Mark an input or output of a custom autograd Function."""
    return x.clone()


_opaque_call.register_fake(lambda r, x, name: torch.empty_like(x))
mark_function.register_fake(lambda x, name: torch.empty_like(x))


@rule("setpoint::opaque_call")
def _of_opaque_call(walk: Walk, out: Value, reads: Sequence[Value], result: Value, name: str) -> Value:
    """Whatever goes in is frozen, and what comes out is data."""
    for read in reads:
        for labels in read.labels:
            walk.atoms.freeze(labels, name or "model", walk.opaque_calls[name])
    return Value(out.shape, walk.guess(out, reads) or (None,) * out.ndim, zero=False)


@rule("setpoint::custom_function")
def _of_custom_function(walk: Walk, out: Value, x: Value, name: str) -> tuple[DimLabels, ...]:
    walk.freeze_all(x, f"the custom autograd Function {name} has a backward of its own, which no graph shows")
    return x.labels


def marked(kind: Any, forward: Callable[..., Any], tried: dict[Any, bool | None]) -> Callable[..., Any]:
    """The forward of a custom Function, marking what it reads and writes, unless a trial shows that it is elementwise.

    `tried` holds the outcomes so far, by Function and inputs, and None while a trial runs.
    """

    def mark(x: Tensor) -> None:
        if x.is_floating_point() or x.is_complex():
            mark_function(x, kind.__qualname__)  # its result is not used: it is there to freeze what is marked

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        results = forward(*args, **kwargs)
        if None in tried.values():  # called by a trial
            return results
        given = args[1:] if args and isinstance(args[0], FunctionCtx) else args
        inputs = ((str(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), str(x)) for x in given)
        key = (kind, *inputs)
        if key not in tried:
            tried[key] = None
            tried[key] = not kwargs and _is_elementwise(kind, given, results)
        if not tried[key]:
            pytree.tree_map_only(Tensor, mark, (args, kwargs, results))
        return results

    return call


def _is_elementwise(kind: Any, given: Sequence[Any], result: Any) -> bool:
    """Whether a Function works on each entry alone, forward and backward, and the same at all places, by trial.

    It has one result, of the shape of its inputs; an input may also be a single number.
    """
    tensors = [x for x in (*given, result) if isinstance(x, Tensor)]
    simple = all(isinstance(x, (Tensor, int, float, str, type(None))) for x in given) and isinstance(result, Tensor)
    if not simple or not all(x.is_floating_point() and all(type(size) is int for size in x.shape) for x in tensors):
        return False
    if {x.shape for x in tensors[:-1] if x.numel() != 1} != {result.shape}:
        return False
    with ThreadPoolExecutor(1) as thread:  # a thread of its own is without the exporter's modes
        for dtype in (torch.float64, result.dtype):  # a kernel may know no double precision
            try:
                return thread.submit(_entries_stand_alone, kind, given, result.shape, dtype).result()
            except Exception:  # noqa: BLE001 - a foreign function may do anything
                continue
    return False


def _entries_stand_alone(kind: Any, given: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether entries have the same results and gradients in another order, without half of the others, and alone."""
    sizes = [min(shape[0], 2), *shape[1:]]
    while math.prod(sizes) > _TRIED:
        sizes[sizes.index(max(sizes))] = max(sizes) // 2
    device, draw = next(x.device for x in given if isinstance(x, Tensor)), torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        # Of many magnitudes, since small numbers alone may be treated as those next to large ones are not.
        normal, scale = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
        return (normal * 10**scale).to(device, dtype)

    inputs = [drawn(*(x.shape if x.numel() == 1 else sizes)) if isinstance(x, Tensor) else x for x in given]

    def run(at: Tensor, arriving: Tensor) -> list[Tensor]:
        own = [x.flatten()[at] if isinstance(x, Tensor) and x.numel() > 1 else x for x in inputs]
        taken = [x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in own]
        pairs = [(x, before) for x, before in zip(taken, own, strict=True) if isinstance(x, Tensor)]
        y = kind.apply(*taken)
        leaves, gradient = [x for x, _ in pairs], arriving.flatten()[at]
        made = torch.autograd.grad(y, leaves, gradient, allow_unused=True, materialize_grads=True)
        if not all(torch.equal(x, before) for x, before in pairs):
            raise ValueError("it writes into its input")
        return [y.detach(), *made]

    where, order = torch.arange(math.prod(sizes)).view(sizes), torch.randperm(math.prod(sizes), generator=draw)
    halves = [half for dim, size in enumerate(sizes) if size > 1 for half in where.chunk(2, dim)]
    gradient = drawn(*sizes)
    whole = run(where, gradient)
    shared = [number for number, x in enumerate(whole) if x.numel() == 1]
    for at in (where, order.view(sizes), *halves, *(one.view([1] * len(sizes)) for one in order[:16])):
        expected, error = [x if x.numel() == 1 else x.flatten()[at] for x in whole], 32 * torch.finfo(dtype).eps
        if shared:  # the gradient of a number that all entries share is a sum over them, in any order
            there = torch.zeros(sizes, dtype=dtype, device=device).put_(at.to(device), gradient.flatten()[at])
            sums = run(where, there)
            expected = [sums[number] if number in shared else x for number, x in enumerate(expected)]
        for number, (x, as_among_all) in enumerate(zip(run(at, gradient), expected, strict=True)):
            near = 1e-3 if number in shared else error
            if not torch.allclose(x, as_among_all, near, near, equal_nan=True):
                return False
    return all(bool(x.isfinite().any()) for x in whole)


def make_opaque(model: nn.Module, name: str, read: Sequence[Tensor], results: Sequence[Any]) -> None:
    """Let a module return what it returned at the example; it reads these parameters."""
    module = model.get_submodule(name)
    if name:
        module.__dict__["forward"] = _Recorded(name, read, results)
    if read:  # marked here, too: no recorded call may reach this module
        _opaque_call(read, torch.zeros((), device=read[0].device), name)


class _Recorded:
    """A forward that returns what was recorded, one call after the other, and the last from then on."""

    def __init__(self, name: str, read: Sequence[Tensor], results: Sequence[Any]) -> None:
        self.name, self.read, self.results, self.number = name, read, results, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A cut copy may call a module more often than the example did: the last result stands for all others.
        result = self.results[min(self.number, len(self.results) - 1)]
        self.number += 1
        reads = [*self.read, *tensors_of([args, kwargs])]
        return mapped(lambda tensor: _opaque_call(reads, tensor, self.name), result)


class AnsweredDraws(TorchFunctionMode):
    """Answers draws of a single random number, which may decide whether a layer is skipped."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer, self.asked = answer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.rand or result.numel() != 1:
            return result
        self.asked = True
        return torch.full_like(result, self.answer)
