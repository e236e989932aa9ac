"""The first forward: inputs of the user's own first training step, as an example of what the model computes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from setpoint.errors import LoopError
from setpoint.groups.example import Example, example_of, mapped, num_samples, tensors_of
from setpoint.groups.one_at_a_time import elsewhere

_TARGETS = ("labels", "targets", "target", "y")
_IGNORED = -100
"""Class index that PyTorch's and transformers' losses leave out."""


_REDIRECTS = ("lightning", "pytorch_lightning")
"""Packages that send a `training_step` through the forward of the wrapper and the model, in place of its own."""


@dataclass
class _Call:
    """Inputs of a module, which change no more, and how often it was called with such ones until now."""

    inputs: Any
    kind: Any
    count: int = 1


class FirstForward:
    """Notes inputs and autocast of the first forward pass in training, and counts the passes; it draws no numbers.

    Where a training loop does not call the model itself, but parts of it (`self.decoder(self.encoder(x))` in a
    `training_step`), it notes the calls of the outermost of these.

    Args:
        called: the module that the training loop calls.
        model: the same without its wrappers.
        method: what is called of it.
    """

    def __init__(self, called: nn.Module, model: nn.Module, method: str = "forward") -> None:
        self._model, self._method = model, method
        self._calls: dict[str, list[_Call]] = {}
        self._autocast: tuple[str, torch.dtype, bool] | None = None
        self._handles: list[Any] = []
        if method != "forward":
            model.__dict__[method] = _NotedMethod(model, method, _Note("", weakref.ref(self)))
            return
        # Hooks inside of compiled code would have it compiled again.
        modules = model.named_modules() if called is model else (("", called),)
        self._handles = [
            module.register_forward_pre_hook(_Note(name, weakref.ref(self)), with_kwargs=True)
            for name, module in modules
            if not name or next(module.parameters(), None) is not None  # a loss or a metric is no part of interest
        ]

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins; one of `torch.export`, on tensors without data, is none of the user's."""
        exporting = torch.compiler.is_exporting() and not elsewhere()
        trains = torch.is_grad_enabled() and self._model.training and not exporting
        if not trains or self._inside(name) or _redirected(module) or detect_fake_mode((args, kwargs)) is not None:
            return
        if not self._calls:
            device = next((each.device.type for each in self._model.parameters()), "cpu")
            if torch.is_autocast_enabled(device):
                self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        inputs = mapped(_apart, (args, dict(kwargs)))
        kind, calls = _kind(inputs), self._calls.setdefault(name, [])
        same = calls[:1] if not name else [each for each in calls if each.kind == kind]
        if same:
            same[0].count += 1
        else:
            calls.append(_Call(inputs, kind))

    def _inside(self, name: str) -> bool:
        """Whether a module is a part of one that was called: that one calls it, now or when it is checkpointed."""
        above = [name[:at] for at, letter in enumerate(name) if letter == "."] + ([""] if name else [])
        return any(each in self._calls for each in above)

    @property
    def called(self) -> bool:
        """Whether the model itself was called."""
        return "" in self._calls

    @property
    def passes(self) -> int:
        """Calls with such inputs as the example has."""
        return math.gcd(*(each.count for calls in self._outermost().values() for each in calls))

    @property
    def elements(self) -> int:
        """Calls of the model x elements of the largest input of the first; 0 where parts of it were called."""
        return self.passes * num_elements(self.example()) if self.called else 0

    def _outermost(self) -> dict[str, list[_Call]]:
        return {name: calls for name, calls in self._calls.items() if not self._inside(name)}

    def example(self) -> Example:
        """The inputs; those of all calls of one pass, by name of the module, where parts were called.

        Raises:
            LoopError: when no forward in training was seen.
        """
        if not self._calls:
            raise LoopError(
                "an optimizer stepped before the model was called in training, so its inputs are not known: give "
                "attach an example=(x,), or call the model that attach was given. After torch.compile that is "
                "the compiled model. A model in eval mode is not training: call model.train()"
            )
        if "" in self._calls:
            args, kwargs = self._calls[""][0].inputs
            return example_of(self._model, args, kwargs, self._method)
        passes = self.passes
        return (
            {
                name: [each.inputs for each in calls for _ in range(each.count // passes)]
                for name, calls in self._outermost().items()
            },
        )

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Inside, the forward of the model is what the training loop calls of it: parts, if it calls parts."""
        if "" in self._calls:
            yield
            return
        before = vars(self._model).get("forward")
        self._model.forward = MethodType(_by_parts, self._model)  # a method, as a deep copy is to have its own
        try:
            yield
        finally:
            del self._model.forward
            if before is not None:
                self._model.forward = before

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """As it was in that forward."""
        if self._autocast is None:
            yield
            return
        device, dtype, cached = self._autocast
        with torch.autocast(device, dtype=dtype, cache_enabled=cached):
            yield

    def samples(self) -> int | None:
        """Targets behind one pass where the inputs hold one for each token, None where they do not say."""
        example = self.example()
        if "" not in self._calls:
            return num_samples(next(iter(self._outermost().values()))[0].inputs[0])
        for name in _TARGETS if isinstance(example, Mapping) else ():
            labels = example.get(name)
            if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
                return max(1, int((labels != _IGNORED).sum()))
        return None

    def stop(self) -> None:
        """Take the hooks away; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._method != "forward":
            self._model.__dict__.pop(self._method, None)


def _by_parts(self: nn.Module, parts: Mapping[str, Any]) -> list[Any]:
    """The forward of a model whose parts are called one by one."""
    return [self.get_submodule(name)(*args, **kwargs) for name, calls in parts.items() for args, kwargs in calls]


def _redirected(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return str(getattr(forward, "__module__", "")).split(".")[0] in _REDIRECTS and not isinstance(forward, MethodType)


def _kind(inputs: Any) -> Any:
    """Equal for inputs of the same structure and shapes."""
    leaves, structure = pytree.tree_flatten(inputs)
    return structure, [(each.shape, each.dtype) if isinstance(each, Tensor) else type(each) for each in leaves]


def num_elements(example: Example) -> int:
    """Elements of the example's largest tensor, whatever order the inputs come in."""
    return max((tensor.numel() for tensor in tensors_of(example)), default=0)


class _Note:
    """The hook of one module: on a copy of the model, and in a pickle, it does nothing."""

    def __init__(self, name: str = "", first: weakref.ref[FirstForward] | None = None) -> None:
        self._name, self._first = name, first

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = None if self._first is None else self._first()
        if first is not None and not torch.compiler.is_compiling():
            first.note(self._name, module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        return _Note()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Note, ()


class _NotedMethod:
    """A method whose calls are noted; of a copy of the model it is the plain method."""

    def __init__(self, model: nn.Module, method: str, note: _Note) -> None:
        self.model, self.method, self.note = model, method, note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.model, args, kwargs)
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
