"""The forward that is exported: calls of a model, in which what no graph can show is a marked call.

A module whose forward cannot be exported returns what it returned at the example. A custom autograd Function is
exported, but no graph shows its backward. Whatever touches a mark is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from setpoint.groups.example import Example, inputs_of, mapped, tensors_of, with_tensors
from setpoint.groups.walk import Value, Walk, rule

OPAQUE_CALL = "setpoint::opaque_call"
"""The op that stands in a graph for each tensor that an opaque module returns."""
CUSTOM_FUNCTION = "setpoint::custom_function"
"""The op that marks an input or output of a custom autograd Function."""


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of a module, with its inputs."""

    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PartialForward:
    """What of a model is exported: by default one call of the whole, on the example.

    Args:
        calls: the model's, and those that opaque modules make of their parts.
        results: by name of an opaque module, what its calls return.
        reasons: by name of an opaque module, why it is opaque.
        draw: the answer to every draw of a single random number, which may decide whether a layer is skipped.
        by_data: whether values of tensors may decide on the path, as they do at the example.
    """

    calls: tuple[RecordedCall, ...]
    results: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    draw: float | None = None
    by_data: bool = False

    @classmethod
    def whole(cls, example: Example) -> PartialForward:
        """One call of the whole model."""
        return cls((RecordedCall("", *inputs_of(example)),))

    @property
    def tensors(self) -> list[Tensor]:
        """All inputs of the calls, and what opaque modules return."""
        return list({id(tensor): tensor for tensor in tensors_of([self._objects])}.values())

    @property
    def _objects(self) -> Any:
        return [(call.args, dict(call.kwargs)) for call in self.calls], dict(self.results)

    def with_tensors(self, tensors: Mapping[int, Any]) -> PartialForward:
        """The same with other tensors, by id of these."""
        inputs, results = with_tensors(self._objects, tensors)
        calls = (RecordedCall(call.module, *own) for call, own in zip(self.calls, inputs, strict=True))
        return replace(self, calls=tuple(calls), results=results)

    def run(self, model: nn.Module) -> Iterator[Tensor]:
        """Tensors that the calls return, of a model whose opaque modules return their results."""
        with nullcontext() if self.draw is None else AnsweredDraws(self.draw):
            for name in self.results:
                module = model.get_submodule(name)
                read = self._read(model, name)
                if name:
                    module.__dict__["forward"] = _Recorded(name, read, self.results[name])
                if read:  # marked here, too: no recorded call may reach this module
                    _opaque_op()(read, torch.zeros((), device=read[0].device), name)
            for call in self.calls:
                yield from tensors_of(model.get_submodule(call.module)(*call.args, **call.kwargs))

    def _read(self, model: nn.Module, name: str) -> list[Tensor]:
        """Parameters of an opaque module, but for those of calls inside it."""
        inside = f"{name}." if name else ""
        others = [call.module for call in self.calls if call.module.startswith(inside) and call.module != name]
        exported = {id(p) for other in others for p in model.get_submodule(other).parameters()}
        return [parameter for parameter in model.get_submodule(name).parameters() if id(parameter) not in exported]


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


class _Recorded:
    """A forward that returns what was recorded, one call after the other, and the last from then on."""

    def __init__(self, name: str, read: Sequence[Tensor], results: Sequence[Any]) -> None:
        self.name, self.read, self.results, self.number = name, read, results, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A cut copy may call a module more often than the example did: the last result stands for all others.
        result = self.results[min(self.number, len(self.results) - 1)]
        self.number += 1
        reads = [*self.read, *tensors_of([args, kwargs])]
        return mapped(lambda tensor: _opaque_op()(reads, tensor, self.name), result)


@cache
def _opaque_op() -> Any:
    @torch.library.custom_op(OPAQUE_CALL, mutates_args=(), schema="(Tensor[] reads, Tensor result, str name) -> Tensor")
    def call(reads: list[Tensor], result: Tensor, name: str) -> Tensor:
        return result.clone()  # a custom op must not return its input

    call.register_fake(lambda reads, result, name: torch.empty_like(result))
    return call


@rule(OPAQUE_CALL)
def _opaque_call(walk: Walk, out: Value, reads: Sequence[Value], result: Value, name: str) -> Value:
    """Whatever goes in is frozen, and what comes out is data."""
    for read in reads:
        for labels in read.labels:
            walk.atoms.freeze(labels, name or "model", walk.opaque_calls[name])
    return Value(out.shape, (None,) * out.ndim, zero=False)


@cache
def _custom_op() -> Any:
    @torch.library.custom_op(CUSTOM_FUNCTION, mutates_args=(), schema="(Tensor x, str name) -> Tensor")
    def mark(x: Tensor, name: str) -> Tensor:
        return x.clone()  # a custom op must not return its input

    mark.register_fake(lambda x, name: torch.empty_like(x))
    return mark


@rule(CUSTOM_FUNCTION)
def _custom_function(walk: Walk, out: Value, x: Value, name: str) -> Value:
    walk.freeze_all(x, f"the custom autograd Function {name} has a backward of its own, which no graph shows")
    return Value(out.shape, x.labels, zero=x.zero)


@contextmanager
def marked_functions() -> Iterator[None]:
    """Inside, inputs and outputs of custom autograd Functions are marked; those of torch's own Functions are not."""
    kinds = type(torch.autograd.Function)

    # Every call looks up `forward`, even that of an `apply` which user code stored earlier, and which may be C code.
    def read(kind: type, name: str) -> Any:
        found = type.__getattribute__(kind, name)
        if name != "forward" or kind.__module__.partition(".")[0] == "torch":
            return found

        def marked(x: Tensor) -> None:
            if x.is_floating_point() or x.is_complex():
                _custom_op()(x, kind.__qualname__)

        @wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            results = found(*args, **kwargs)
            # The results of the marks are not used: they are there to freeze what the Function reads and writes.
            pytree.tree_map_only(Tensor, marked, (args, kwargs, results))
            return results

        return forward

    kinds.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del kinds.__getattribute__
