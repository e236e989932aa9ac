"""Examples: the inputs of a model, in whatever objects they come, and the method that training calls with them."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from setpoint.errors import ExampleError, ExportError, LoopError
from setpoint.messages import a_type

Example = Any
"""A tuple of positional inputs, or a mapping of keyword inputs; `inputs_of` refuses anything else."""


def tensors_of(value: Any, above: Set[int] = frozenset()) -> Iterator[Tensor]:
    """Every tensor inside tuples, lists, mappings, dataclasses and the attributes of other objects, in order.

    `above` are ids of the objects that hold the value.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in above:  # an object that holds itself
        return
    parts: Any = ()
    if isinstance(value, (Mapping, list, tuple)):
        parts = value.values() if isinstance(value, Mapping) else value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif not isinstance(value, (type, nn.Module, ModuleType, FunctionType, BuiltinFunctionType)):
        parts = getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from tensors_of(part, above | {id(value)})


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A copy of an object of any kind, each tensor inside of it replaced by what the function makes of it."""
    return with_tensors(value, {id(tensor): function(tensor) for tensor in tensors_of(value)})


def with_tensors(value: Any, tensors: Mapping[int, Any]) -> Any:
    """A copy of an object of any kind, its tensors replaced by these, by id."""
    try:
        return copy.deepcopy(value, dict(tensors))
    except Exception:  # noqa: BLE001 - an object of the user's may refuse to be copied; what is around it is not
        return pytree.tree_map_only(Tensor, lambda tensor: tensors.get(id(tensor), tensor), value)


def shapes_of(example: Example) -> list[list[int]]:
    """The shape of every tensor in an example, in order."""
    return [list(tensor.shape) for tensor in tensors_of(example)]


def num_samples(example: Example) -> int:
    """Leading dim of the example's first tensor, or length of its first list of tensors; 1 if it has none.

    >>> num_samples((torch.zeros(4, 2),)), num_samples(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)],))
    (4, 2)
    """
    return max(1, _num_rows(example if isinstance(example, Mapping) else tuple(example)) or 1)


def one_sample(example: Example) -> Example:
    """The first sample of a batch: the first row of every tensor that has as many rows as the batch has samples."""
    rows = num_samples(example)
    sample: Example = mapped(lambda leaf: leaf[:1] if leaf.dim() and leaf.shape[0] == rows else leaf, example)
    return sample


def _num_rows(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    if isinstance(value, list) and any(True for _ in tensors_of(value)):
        return len(value)
    parts = value if isinstance(value, tuple) else value.values() if isinstance(value, Mapping) else tensors_of(value)
    return next((rows for part in parts if (rows := _num_rows(part)) is not None), None)


def inputs_of(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    hint = "for a single tensor x write example=(x,)"
    if example is None:
        hint = "give inputs as the model gets them in training, at the batch shape of one optimizer step"
    raise ExampleError(
        "example must be a tuple of positional inputs or a mapping of keyword inputs, "
        f"got {'None' if example is None else type(example).__name__}: {hint}"
    )


def check_example(example: Example) -> None:
    """Check that an example is one, and has rows, or raise ExampleError."""
    inputs_of(example)
    if _num_rows(example) == 0:
        raise ExampleError("the example has no rows: give inputs at the batch shape of one optimizer step")


def example_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str = "forward") -> Example:
    """The inputs of a call as an example: a tuple where all are positional, else a dict by the names of the forward."""
    if not kwargs:
        return args
    if not args:
        return dict(kwargs)
    signature = inspect.signature(getattr(type(model), method).__get__(model))
    example: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        by_name = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        example.update(value if by_name else {name: value})
    return example


def without_cache(model: nn.Module, example: Example) -> Example:
    """The example with `use_cache=False`, where a decoder of Transformers would keep keys and values by default.

    Training reads nothing of them, and heads that go into a cache of changing length have no fixed place in a graph.
    """
    args, kwargs = inputs_of(example)
    named = "use_cache" in inspect.signature(type(model).forward).parameters
    wraps = any(kind.__module__.startswith("peft.") for kind in type(model).__mro__) and not args
    keeps = getattr(getattr(model, "config", None), "use_cache", False) is True
    if "use_cache" in kwargs or not keeps or not (named or wraps):
        return example
    try:
        return example_of(model, args, {**kwargs, "use_cache": False})
    except TypeError:  # too many inputs, or none of these names: the model itself says so
        return example


def check_device(model: nn.Module, example: Example) -> None:
    """Check that the example's tensors are on a device of the model."""
    args, kwargs = inputs_of(example)
    devices = {parameter.device for parameter in model.parameters()}
    for tensor in tensors_of([*args, *kwargs.values()]):
        if devices and tensor.device not in devices:
            raise ExampleError(
                f"example holds a tensor on {tensor.device}, but the model is on "
                f"{', '.join(sorted(map(str, devices)))}: move it with .to({str(min(devices, key=str))!r})"
            )


def holds_nan(value: Any) -> bool:
    """Whether a tensor inside it holds NaN or infinity; minus infinity may be a mask."""
    return any(
        # Not known of 8-bit floats; and inside of a vmap, values have no truth.
        tensor.is_floating_point()
        and tensor.itemsize > 1
        and is_dense(tensor)
        and not is_functorch_wrapped_tensor(tensor)
        and bool((tensor.isnan() | tensor.isposinf()).any())
        for tensor in tensors_of(value)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether every entry is stored."""
    return tensor.layout == torch.strided


class MethodForward:
    """Calls a method of a module; where the method calls the module itself, that is the module's own forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.own, self.running = module.__dict__.get("forward"), False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self.module)
        if self.running:
            return self.own(*args, **kwargs) if self.own else kind.forward(self.module, *args, **kwargs)
        self.running = True
        try:
            return getattr(kind, self.method)(self.module, *args, **kwargs)
        finally:
            self.running = False


def check_python(model: Any) -> None:
    """Check that the model is a module whose forward is Python code, or raise ExportError."""
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise ExportError(
            f"{a_type(model)} has no Python code that can be followed: give the torch.nn.Module that it was made of, "
            "before torch.jit.script, torch.jit.trace or torch.export"
        )


def check_method(model: nn.Module, method: str) -> None:
    """Check that the model has this method."""
    check_python(model)
    if not isinstance(method, str) or not callable(getattr(type(model), method, None)):
        raise LoopError(f"{type(model).__name__} has no method {method!r}: give the one that the training loop calls")


@contextmanager
def called_by(model: nn.Module, method: str) -> Iterator[None]:
    """Inside, a call of the model or of a copy of it is one of this method."""
    if method == "forward":
        yield
        return
    before = model.__dict__.get("forward")
    model.__dict__["forward"] = MethodForward(model, method)
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before
