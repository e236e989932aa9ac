"""Ops that stand in a graph for what no graph can show: calls of opaque modules, and custom autograd Functions.

Whatever touches one of them is frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpoint.groups.example import mapped, tensors_of
from setpoint.groups.walk import DimLabels, Value, Walk, rule


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
    return Value(out.shape, (None,) * out.ndim, zero=False)


@rule("setpoint::custom_function")
def _of_custom_function(walk: Walk, out: Value, x: Value, name: str) -> tuple[DimLabels, ...]:
    walk.freeze_all(x, f"the custom autograd Function {name} has a backward of its own, which no graph shows")
    return x.labels


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
