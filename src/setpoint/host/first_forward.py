"""The first forward: inputs of the user's own first training step, as an example of what the model computes."""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.jit import ScriptModule
from torch.utils import _pytree as pytree

from setpoint.errors import LoopError
from setpoint.groups.example import Example, example_of, mapped, num_samples, tensors_of
from setpoint.groups.one_at_a_time import elsewhere

_TARGETS = ("labels", "targets", "target", "y")
_IGNORED = -100
"""Class index that PyTorch's and transformers' losses leave out."""


_MOST_HELD = 4
"""Inputs of so many calls are held until a backward pass goes through one."""
_SCALER = inspect.getfile(torch.amp.GradScaler)
_REDIRECTS = ("lightning", "pytorch_lightning")
"""Packages that send a `training_step` through the forward of the wrapper and the model, in place of its own."""


@dataclass(eq=False)
class _Pass:
    """One call of a module that has returned.

    Args:
        elements: of its largest input.
        followed: whether it returned what a backward pass can go through.
        task: number of the backward pass that went through it, -1 as long as none did.
        discarded: whether gradients were gone before the next call or the next backward pass began.
    """

    elements: int = 0
    followed: bool = False
    task: int = -1
    discarded: bool = False
    handles: list[Any] = field(default_factory=list)

    @property
    def unused(self) -> bool:
        """Whether it is known that no gradient of it is there."""
        return self.followed and (self.task < 0 or self.discarded)


@dataclass(eq=False)
class _Calls:
    """Calls of a module with inputs of one kind, and the first of these inputs, which change no more."""

    kind: Any
    inputs: Any
    passes: list[_Pass] = field(default_factory=list)


@dataclass(eq=False)
class _Begun:
    """A call that has yet to return.

    Args:
        error: the exception that was handled when it began.
    """

    inputs: Any
    autocast: tuple[str, torch.dtype, bool] | None
    error: BaseException | None


class FirstForward:
    """Notes inputs and autocast of the first forward pass in training, and counts the passes; it draws no numbers.

    A call that raises does not count. If the first step comes from a GradScaler, neither do passes whose gradients were
    discarded: the scaler skipped those steps. All other calls count; `num_unused` of them may be no part of a step.

    Where a training loop does not call the model itself, but parts of it (`self.decoder(self.encoder(x))` in a
    `training_step`), it notes the calls of the outermost of these.

    Args:
        called: the module that the training loop calls.
        model: the same without its wrappers.
        method: what is called of it.
    """

    def __init__(self, called: nn.Module, model: nn.Module, method: str = "forward") -> None:
        self._model, self._method = model, method
        self._calls: dict[str, list[_Calls]] = {}
        self._running: dict[str, _Begun] = {}
        self._held: list[tuple[_Pass, _Begun]] = []  # calls of the model of which one is the example
        self._autocast: tuple[str, torch.dtype, bool] | None = None
        self._handles: list[Any] = []
        if method != "forward":
            model.__dict__[method] = _NotedMethod(model, method, _Note("", weakref.ref(self)))
            return
        # Hooks inside of compiled code would have it compiled again.
        modules = model.named_modules() if called is model else (("", called),)
        for name, module in modules:
            # A loss or a metric is no part of interest, and compiled scripts take no hooks.
            if not name or (next(module.parameters(), None) is not None and not isinstance(module, ScriptModule)):
                note = _Note(name, weakref.ref(self))
                self._handles += [
                    module.register_forward_pre_hook(note, with_kwargs=True),
                    module.register_forward_hook(_Returned(note), always_call=True),
                ]

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins; one of `torch.export`, on tensors without data, is none of the user's."""
        if name in self._running and not _calls_itself(module):
            del self._running[name]  # one that was interrupted
        exporting = torch.compiler.is_exporting() and not elsewhere()
        trains = torch.is_grad_enabled() and self._model.training and not exporting
        if not trains or name in self._running or self._inside(name):
            return
        if _redirected(module) or detect_fake_mode((args, kwargs)) is not None:
            return
        self._look_for_discarded()
        device, autocast = next((each.device.type for each in self._model.parameters()), "cpu"), None
        if torch.is_autocast_enabled(device):
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        inputs = mapped(_apart, (args, dict(kwargs)))
        self._running[name] = _Begun(inputs, autocast, sys.exc_info()[1])

    def returned(self, name: str, module: nn.Module, output: Any) -> None:
        """A forward has ended, or raised."""
        if name not in self._running or _calls_itself(module):
            return
        begun = self._running.pop(name)
        made = _Pass(num_elements(begun.inputs))
        if sys.exc_info()[1] is not begun.error:
            return
        for each in pytree.tree_leaves(output):
            if isinstance(each, Tensor) and each.grad_fn is not None:
                made.followed = True
                made.handles.append(each.register_hook(partial(self._backward_begins, made)))  # type: ignore[no-untyped-call]
        calls, kind = self._calls.setdefault(name, []), _kind(begun.inputs)
        if not any(map(len, self._calls.values())):
            self._autocast = begun.autocast
        like = next((each for each in calls if not name or _equal(each.kind, kind)), None)
        if like is None:
            like = _Calls(kind, begun.inputs if name else None)
            calls.append(like)
        like.passes.append(made)
        if not name and all(each.task < 0 for each, _ in self._held):  # until a backward pass has shown which counts
            self._held = [*self._held, (made, begun)][-_MOST_HELD:]

    def _backward_begins(self, one: _Pass, _: Tensor) -> None:
        """A backward pass begins to go through what a call has returned."""
        if one.task != graph_task():
            self._look_for_discarded()
            one.task = graph_task()

    def _look_for_discarded(self) -> None:
        """Where no weight has a gradient, those of earlier backward passes were discarded."""
        if all(each.grad is None for each in self._model.parameters()):
            for each in self._every():
                each.discarded |= each.task not in (-1, graph_task())

    def _every(self) -> list[_Pass]:
        return [one for calls in self._calls.values() for each in calls for one in each.passes]

    def step_begins(self) -> None:
        """An optimizer is about to step; if a GradScaler has it step, passes of those that it skipped do not count."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename != _SCALER:
            frame = frame.f_back
        if frame is None:
            return
        for calls in self._calls.values():
            for each in calls:
                each.passes = [one for one in each.passes if not one.discarded]
        left = {name: [each for each in calls if each.passes] for name, calls in self._calls.items()}
        self._calls = {name: calls for name, calls in left.items() if calls}

    @property
    def num_unused(self) -> int:
        """Calls that may be no part of a step: nothing went back through them, or their gradients were discarded."""
        return sum(one.unused for calls in self._outermost().values() for each in calls for one in each.passes)

    def _inside(self, name: str) -> bool:
        """Whether a module is a part of one that was called: that one calls it, now or when it is checkpointed."""
        above = [name[:at] for at, letter in enumerate(name) if letter == "."] + ([""] if name else [])
        return any(each in self._calls or each in self._running for each in above)

    @property
    def called(self) -> bool:
        """Whether the model itself was called."""
        return "" in self._calls

    @property
    def passes(self) -> int:
        """Calls with such inputs as the example has."""
        return math.gcd(*(len(each.passes) for calls in self._outermost().values() for each in calls))

    @property
    def elements(self) -> int:
        """What calls of the model were given, each by its largest input, but for unused ones; 0 for calls of parts."""
        if not self.called:
            return 0
        return sum(one.elements for calls in self._calls[""] for one in calls.passes if not one.unused)

    def _outermost(self) -> dict[str, list[_Calls]]:
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
            used = (begun for one, begun in self._held if one.task >= 0)
            args, kwargs = next(used, self._held[0][1]).inputs
            return example_of(self._model, args, kwargs, self._method)
        passes = self.passes
        return (
            {
                name: [each.inputs for each in calls for _ in range(len(each.passes) // passes)]
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
        if "" in self._calls:
            self._autocast = next((begun.autocast for one, begun in self._held if one.task >= 0), self._autocast)
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

    def again(self) -> FirstForward:
        """Forget all calls, and note those from now on."""
        for each in self._every():
            for handle in each.handles:
                handle.remove()
        self._calls, self._running, self._held = {}, {}, []
        return self

    def unhook(self) -> None:
        """Take the hooks away, and note nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._method != "forward":
            self._model.__dict__.pop(self._method, None)

    def stop(self) -> None:
        """Take the hooks away, and keep no inputs; may be called again."""
        self.unhook()
        self.again()


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


def _equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except Exception:  # noqa: BLE001 - of types of the user's, which may hold arrays
        return False


def _calls_itself(module: nn.Module) -> bool:
    """Whether this call of a module is made by another one of it."""
    frame, calls = inspect.currentframe(), 0
    while frame is not None and calls < 2:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls > 1


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

    def returned(self, module: nn.Module, output: Any) -> None:
        """The module has returned this."""
        first = None if self._first is None else self._first()
        if first is not None and not torch.compiler.is_compiling():
            first.returned(self._name, module, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Note:
        return _Note()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Note, ()


class _Returned:
    """The hook after the forward of one module, copied as that before it."""

    def __init__(self, note: _Note) -> None:
        self._note = note

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._note.returned(module, output)


class _NotedMethod:
    """A method whose calls are noted; of a copy of the model it is the plain method."""

    def __init__(self, model: nn.Module, method: str, note: _Note) -> None:
        self.model, self.method, self.note = model, method, note
        self._depth = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._depth:  # a call from inside of another one is none of the training loop's
            self.note(self.model, args, kwargs)
        self._depth += 1
        output = None
        try:
            output = getattr(type(self.model), self.method)(self.model, *args, **kwargs)
            return output
        finally:
            self._depth -= 1
            if not self._depth:
                self.note.returned(self.model, output)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def graph_task() -> int:
    """Number of the running backward pass, as `torch.autograd.graph` counts them; -1 outside of any."""
    number: int = torch._C._current_graph_task_id()
    return number
