"""Export: the model's forward as an ATen graph, without touching the model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from setpoint.errors import ExampleError, ExportError
from setpoint.groups.custom import marked_functions

Example = Any
"""A tuple of positional inputs, or a mapping of keyword inputs; anything else is told so by `inputs_of`."""

TORCH_FOLDER = Path(torch.__file__).parent


class Forward(nn.Module):
    """The model, returning a flat list of its output tensors, whatever container they came in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Tensors of the output in a fixed order."""
        return list(tensors_of(self.model(*args, **kwargs)))


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside tuples, lists, mappings and dataclasses, in order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))


def inputs_of(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    raise ExampleError(
        f"example must be a tuple of positional inputs or a dict of keyword inputs, got {type(example).__name__}: "
        "for a single tensor x write example=(x,)"
    )


def check_device(model: nn.Module, example: Example) -> None:
    """The example's tensors must lie where the model lies."""
    args, kwargs = inputs_of(example)
    devices = {parameter.device for parameter in model.parameters()}
    for tensor in tensors_of([*args, *kwargs.values()]):
        if devices and tensor.device not in devices:
            raise ExampleError(
                f"example holds a tensor on {tensor.device}, but the model is on "
                f"{', '.join(sorted(map(str, devices)))}: move it with .to({str(min(devices, key=str))!r})"
            )


@contextmanager
def untouched_attributes(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back: a forward may keep an activation in one."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def computed(model: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` needs to know of tensors that a forward left behind: it refuses them otherwise."""
    leaves = pytree.tree_leaves([list(vars(module).values()) for module in model.modules()])
    return {id(leaf): leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_leaf}


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave the global random state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


def export(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The graph of `model(*example)`.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: the forward does what no static graph can hold, such as control flow that
            depends on data; the message names the line.
    """
    args, kwargs = inputs_of(example)
    check_device(model, example)
    with untouched_rng(), untouched_attributes(model), marked_functions(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(Forward(model), args, kwargs, strict=False)
        except Exception as error:
            _explain(model, args, kwargs, error)
            raise


def _explain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
    """Tell a bad example from a forward that cannot be exported, by running a copy of the model for real."""
    try:
        with torch.no_grad():
            copy.deepcopy(model, computed(model))(*args, **kwargs)
    except Exception as plain:
        raise ExampleError(
            f"the model does not accept the example ({_describe([*args, *kwargs.items()])}): "
            f"{_first_line(plain)}{_user_line(plain)}"
        ) from plain
    hint = (
        "its control flow depends on the values of a tensor; replace the Python `if` by torch.where, "
        "or compute the condition outside the model"
        if _depends_on_data(error)
        else "a packed sequence has sizes that depend on its lengths; give the recurrent network the padded tensor"
        if _in_recurrent_network(error)
        else "torch.export cannot follow it; `torch.export.export(model, example, strict=False)` shows the same error"
    )
    raise ExportError(f"the model's forward cannot be exported: {_first_line(error)}{_user_line(error)}; {hint}") from (
        error
    )


def _depends_on_data(error: BaseException) -> bool:
    names = {type(error).__name__ for error in _chain(error)}
    return bool(
        names
        & {
            "DataDependentOutputException",
            "DynamicOutputShapeException",
            "GuardOnDataDependentSymNode",
            "UserError",
        }
    )


def _in_recurrent_network(error: BaseException) -> bool:
    """Torch's recurrent networks fail to export by themselves only with packed sequences."""
    file = str(TORCH_FOLDER / "nn" / "modules" / "rnn.py")
    return any(
        frame.filename == file for link in _chain(error) for frame in traceback.extract_tb(link.__traceback__)[-4:]
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _user_line(error: BaseException) -> str:
    own = Path(__file__).parent
    for link in _chain(error):
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            path = Path(frame.filename)
            if TORCH_FOLDER not in path.parents and own not in path.parents and frame.line:
                return f' (at {frame.filename}:{frame.lineno}: "{frame.line}")'
    return ""


def _describe(inputs: list[Any]) -> str:
    return ", ".join(
        f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors_of(inputs)
    )


def run_without_data(
    model: nn.Module, example: Example, prepare: Callable[[nn.Module], None] = lambda twin: None
) -> list[torch.Size]:
    """Shapes of what a copy of the model returns whose tensors have shapes but no data.

    Meta tensors are the quickest; where a forward asks of them what only fake ones can tell (a device, for
    example), it runs again on those, and where it asks for values, on real ones.

    Args:
        model: the model, left alone.
        example: its inputs.
        prepare: called with the copy before it runs, and again with each further copy.

    Raises:
        Exception: whatever the forward raises on real tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    failures = logging.getLogger("torch._subclasses.fake_tensor")
    level = failures.level
    failures.setLevel(logging.CRITICAL)
    try:
        for mode in (torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True)):
            try:
                return _run_copy(model, example, prepare, mode)
            except Exception:  # noqa: BLE001 - a foreign forward may do anything
                continue
    finally:
        failures.setLevel(level)
    return _run_copy(model, example, prepare, None)


def _run_copy(model: nn.Module, example: Example, prepare: Callable[[nn.Module], None], mode: Any) -> list[torch.Size]:
    def empty(tensor: torch.Tensor) -> Any:
        if mode is None:
            return tensor.detach().clone()
        return tensor.detach().to(mode) if isinstance(mode, torch.device) else mode.from_tensor(tensor.detach())

    memo: dict[int, Any] = {key: empty(tensor) for key, tensor in computed(model).items()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo:
            new = empty(tensor)
            trained = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if trained else new
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
                del hooks[key]  # a user's; those of weight norm and its like compute a weight
    args, kwargs = pytree.tree_map_only(torch.Tensor, empty, inputs_of(example))
    with mode or nullcontext(), untouched_rng():
        prepare(twin)
        return [tensor.shape for tensor in tensors_of(twin(*args, **kwargs))]
