"""The forward that is exported: calls of a model, in which what no graph can show is a marked call.

A module whose forward cannot be exported returns what it returned at the example. A custom autograd Function is
exported, but no graph shows its backward: only one that works on each entry alone, as a trial shows, is not marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

from setpoint.groups.example import Example, inputs_of, tensors_of, with_tensors


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of a module, with its inputs."""

    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PartialForward:
    """What of a model is exported: by default one call of the whole, on the example."""

    calls: tuple[RecordedCall, ...]  # the model's, and those that opaque modules make of their parts
    results: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # by opaque module, what its calls return
    reasons: Mapping[str, str] = field(default_factory=dict)  # by opaque module, why it is opaque
    draw: float | None = None  # the answer to draws of a single random number, which may decide whether to skip a layer
    by_data: bool = False  # whether values of tensors may decide on the path, as they do at the example

    @classmethod
    def whole(cls, example: Example) -> PartialForward:
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
        if self.draw is None and not self.results:
            yield from self._outputs(model)
            return
        from setpoint.groups.opaque import AnsweredDraws, make_opaque

        with nullcontext() if self.draw is None else AnsweredDraws(self.draw):
            for name, results in self.results.items():
                make_opaque(model, name, self._read(model, name), results)
            yield from self._outputs(model)

    def _outputs(self, model: nn.Module) -> Iterator[Tensor]:
        for call in self.calls:
            yield from tensors_of(model.get_submodule(call.module)(*call.args, **call.kwargs))

    def _read(self, model: nn.Module, name: str) -> list[Tensor]:
        """Parameters of an opaque module, but for those of calls inside it."""
        inside = f"{name}." if name else ""
        others = [call.module for call in self.calls if call.module.startswith(inside) and call.module != name]
        exported = {id(p) for other in others for p in model.get_submodule(other).parameters()}
        return [parameter for parameter in model.get_submodule(name).parameters() if id(parameter) not in exported]


@contextmanager
def marked_functions() -> Iterator[None]:
    """Inside, inputs and outputs of custom autograd Functions are marked, unless torch's own or elementwise."""
    kinds = type(torch.autograd.Function)
    tried: dict[Any, bool | None] = {}

    # Every call looks up `forward`, even that of an `apply` which user code stored earlier, and which may be C code.
    def read(kind: type, name: str) -> Any:
        found = type.__getattribute__(kind, name)
        if name != "forward" or kind.__module__.partition(".")[0] == "torch":
            return found
        from setpoint.groups.opaque import marked

        return marked(kind, found, tried)

    kinds.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del kinds.__getattribute__


@contextmanager
def checkpoints_by(apply: Callable[..., Any], hook: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, torch's activation checkpoints call `apply` if they are reentrant, else `hook` with their frame."""
    parts: Any = checkpointing
    before = parts.CheckpointFunction, parts._checkpoint_hook
    parts.CheckpointFunction, parts._checkpoint_hook = type("Apply", (), {"apply": staticmethod(apply)}), hook
    try:
        yield
    finally:
        parts.CheckpointFunction, parts._checkpoint_hook = before


def plain_checkpoints(called: list[Any]) -> AbstractContextManager[None]:
    """Inside, checkpoints are plain calls, whose backward pass a graph shows; each is added to the list."""

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        called.append(function)
        # A reentrant checkpoint trains nothing if no input of it needs a gradient.
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in args if isinstance(x, Tensor))
        with torch.set_grad_enabled(trains):
            return function(*args)

    def hook(frame: Any) -> Any:
        called.append(frame)
        return nullcontext()  # with torch's own, the exporter takes all that follows a tanh for being under no_grad

    return checkpoints_by(apply, hook)
