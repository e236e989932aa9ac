"""Export: the model's forward as an ATen graph, without touching the model."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from setpoint.errors import ExampleError, ExportError
from setpoint.groups.custom import marked_functions
from setpoint.groups.rng import preserved_rng_state

Example = Any
"""A tuple of positional inputs, or a mapping of keyword inputs; `inputs_of` refuses anything else."""

TORCH_FOLDER = Path(torch.__file__).parent


class Forward(nn.Module):
    """The model, returning a flat list of its output tensors instead of their container."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Tensors of the output in a fixed order."""
        return list(tensors_of(self.model(*args, **kwargs)))


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside tuples, lists, mappings, dataclasses and the attributes of other objects, in order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))
    elif not isinstance(output, (type, nn.Module, ModuleType, FunctionType, BuiltinFunctionType)):
        for value in getattr(output, "__dict__", {}).values():
            if value is not output:
                yield from tensors_of(value)


def num_samples(example: Example) -> int:
    """Leading dim of the example's first tensor; 1 if it has none."""
    values = example.values() if isinstance(example, Mapping) else example
    first = next((value for value in values if isinstance(value, Tensor) and value.dim()), None)
    return max(1, first.shape[0]) if first is not None else 1


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
    """Check that the example's tensors are on a device of the model."""
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
    """Restore every module's attributes afterwards: a forward may store an activation in one."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def computed(model: nn.Module) -> dict[int, Any]:
    """The memo with which `copy.deepcopy` accepts tensors that a forward left on modules; it refuses non-leaves."""
    leaves = pytree.tree_leaves([list(vars(module).values()) for module in model.modules()])
    return {id(leaf): leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_leaf}


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Stop the exporter from looking up source lines of every op: a fifth of its time, and nothing here reads them."""
    config: Any = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", None)
    if before is None:  # a release of torch without the option
        yield
        return
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


@contextmanager
def _without_logs() -> Iterator[None]:
    """Suppress what torch logs and prints about a forward that it cannot export: the error says it in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def export(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The graph of `model(*example)`.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: no static graph can hold the forward (control flow by data, say); the message names the line.
    """
    args, kwargs = inputs_of(example)
    check_device(model, example)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise ExampleError(f"{name} is lazy and has no shape yet: run model(*example) once before")
    with (
        preserved_rng_state(model),
        untouched_attributes(model),
        _without_stack_traces(),
        marked_functions(),
        _without_logs(),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            return torch.export.export(Forward(model), args, kwargs, strict=False)
        except Exception as error:
            _explain(model, args, kwargs, error)
            raise


def _explain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
    """Distinguish a bad example from a forward that cannot be exported, by running a copy of the model eagerly."""
    try:
        with torch.no_grad():
            copy.deepcopy(model, computed(model))(*args, **kwargs)
    except Exception as plain:
        raise ExampleError(
            f"the model does not accept the example ({_describe([*args, *kwargs.items()])}): "
            f"{_first_line(plain)}{_user_line(plain)}"
        ) from plain
    hint = "torch.export cannot follow it; `torch.export.export(model, example, strict=False)` shows the same error"
    if {type(link).__name__ for link in _chain(error)} & _DEPENDS_ON_DATA:
        hint = (
            "its control flow depends on the values of a tensor; replace the Python `if` by torch.where, "
            "or compute the condition outside the model"
        )
    elif _in_recurrent_network(error):
        hint = "a packed sequence has sizes that depend on its lengths; give the recurrent network the padded tensor"
    where = f"{_first_line(error)}{_user_line(error)}"
    raise ExportError(f"the model's forward cannot be exported: {where}; {hint}") from error


_DEPENDS_ON_DATA = {"DataDependentOutputException", "DynamicOutputShapeException"}
_DEPENDS_ON_DATA |= {"GuardOnDataDependentSymNode", "UserError"}


def _in_recurrent_network(error: BaseException) -> bool:
    """Torch's recurrent networks fail to export by themselves only with packed sequences."""
    file = str(TORCH_FOLDER / "nn" / "modules" / "rnn.py")
    last = [frame for link in _chain(error) for frame in traceback.extract_tb(link.__traceback__)[-4:]]
    return any(frame.filename == file for frame in last)


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
