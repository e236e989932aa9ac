"""The first forward: inputs of the user's own first training step, as an example of what the model computes."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from setpoint.distributed import local
from setpoint.errors import LoopError
from setpoint.groups.example import Example, example_of, mapped, num_samples, tensors_of
from setpoint.groups.one_at_a_time import elsewhere

_TARGETS = ("labels", "targets", "target", "y")
_IGNORED = -100
"""Class index that PyTorch's and transformers' losses leave out."""


_MOST_KINDS = 4
"""Inputs of so many kinds are held beside those of the last call."""
_SCALER = inspect.getfile(torch.amp.GradScaler)
_REDIRECTS = ("lightning", "pytorch_lightning")
"""Packages that send a `training_step` through the forward of the wrapper and the model, in place of its own."""


@dataclass(eq=False)
class _Pass:
    """One call of a module that has returned.

    Args:
        went_back: whether a backward pass has gone through what it returned.
    """

    went_back: bool = False
    handles: list[Any] = field(default_factory=list)

    def follow(self, returned: Any) -> None:
        """Note backward passes through what the call has returned."""
        for each in pytree.tree_leaves(returned):
            if isinstance(each, Tensor) and each.grad_fn is not None:
                self.handles.append(each.register_hook(self._note))  # type: ignore[no-untyped-call]

    def _note(self, _: Tensor) -> None:
        self.went_back = True

    def stop(self) -> None:
        """Leave no hook on a tensor."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


@dataclass(eq=False)
class _Calls:
    """Calls of a module with inputs of one kind, and the first of these inputs, which change no more."""

    kind: Any
    inputs: Any = None
    autocast: tuple[str, torch.dtype, bool] | None = None
    passes: list[_Pass] = field(default_factory=list)


class FirstForward:
    """Notes inputs and autocast of forward passes in training, and counts the passes; it draws no numbers.

    The example is of the kind of inputs that most calls of the model had, and of equally many the last: a first call
    may be a look at a few rows. A call that raises does not count. Where a GradScaler skips steps, neither do passes
    whose gradients were discarded before another one begins.

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
        self._running: dict[str, _Calls] = {}
        self._skipped: set[_Pass] = set()
        self._handles: list[Any] = []
        if method != "forward":
            model.__dict__[method] = _NotedMethod(model, method, _Note("", weakref.ref(self)))
            return
        # Hooks inside of compiled code would have it compiled again.
        modules = model.named_modules() if called is model else (("", called),)
        for name, module in modules:
            if not name or next(module.parameters(), None) is not None:  # a loss or a metric is no part of interest
                note = _Note(name, weakref.ref(self))
                self._handles += [
                    module.register_forward_pre_hook(note, with_kwargs=True),
                    module.register_forward_hook(_Returned(note)),
                ]

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins; one of `torch.export`, on tensors without data, is none of the user's."""
        if name in self._running and not _calls_itself(module):
            del self._running[name]  # one that raised
        exporting = torch.compiler.is_exporting() and not elsewhere()
        trains = torch.is_grad_enabled() and self._model.training and not exporting
        if (
            not trains
            or name in self._running
            or self._inside(name)
            or _redirected(module)
            or detect_fake_mode((args, kwargs)) is not None
        ):
            return
        if not any(map(_has_gradient, self._model.parameters())):
            self._skipped |= {each for each in self._every() if each.went_back}
        device, autocast = next((each.device.type for each in self._model.parameters()), "cpu"), None
        if torch.is_autocast_enabled(device):
            autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        inputs = mapped(_apart, (args, dict(kwargs)))
        self._running[name] = _Calls(_kind(inputs), inputs, autocast)

    def returned(self, name: str, module: nn.Module, output: Any) -> None:
        """A forward has ended."""
        if name not in self._running or _calls_itself(module):
            return
        now, calls = self._running.pop(name), self._calls.setdefault(name, [])
        like = next((each for each in calls if _equal(each.kind, now.kind)), None)
        if like is None:
            like = now
            calls.append(like)
            held = [each for each in calls[:-1] if each.inputs is not None]
            if not name and len(held) >= _MOST_KINDS:  # such as batches of different lengths
                min(held, key=lambda each: len(each.passes)).inputs = None
        like.passes.append(_Pass())
        like.passes[-1].follow(output)

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
                each.passes = [one for one in each.passes if one not in self._skipped]
        left = {name: [each for each in calls if each.passes] for name, calls in self._calls.items()}
        self._calls = {name: calls for name, calls in left.items() if calls}

    @property
    def num_calls(self) -> int:
        """Calls that count, of the model or its parts."""
        return sum(len(each.passes) for calls in self._outermost().values() for each in calls)

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
        """Calls with such inputs as the example has; of the model all calls."""
        if "" in self._calls:
            return sum(len(each.passes) for each in self._calls[""])
        return math.gcd(*(len(each.passes) for calls in self._outermost().values() for each in calls))

    @property
    def elements(self) -> int:
        """Calls of the model x elements of the largest input of the first; 0 where parts of it were called."""
        return self.passes * num_elements(self.example()) if self.called else 0

    def _outermost(self) -> dict[str, list[_Calls]]:
        return {name: calls for name, calls in self._calls.items() if not self._inside(name)}

    def _most(self, name: str) -> _Calls:
        held = [each for each in self._calls[name] if each.inputs is not None]
        return max(reversed(held), key=lambda each: len(each.passes))

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
            args, kwargs = self._most("").inputs
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
        name = next(iter(self._outermost()), None)
        autocast = None if name is None else self._most(name).autocast
        if autocast is None:
            yield
            return
        device, dtype, cached = autocast
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
        self._forget()
        return self

    def _forget(self) -> None:
        for each in self._every():
            each.stop()
        self._calls, self._running, self._skipped = {}, {}, set()

    def stop(self) -> None:
        """Take the hooks away, and keep no inputs; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
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


def _equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except (ValueError, RuntimeError):  # of types of the user's, which may hold arrays
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.model, args, kwargs)
        output = getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        self.note.returned(self.model, output)
        return output


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(local(parameter.grad).any())


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
