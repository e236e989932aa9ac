"""Export: the model's forward as an ATen graph, without touching the model."""

from __future__ import annotations

import copy
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from setpoint.errors import ExampleError, ExportError
from setpoint.groups.custom import marked_functions
from setpoint.groups.example import Example as Example
from setpoint.groups.example import check_device as check_device
from setpoint.groups.example import computed as computed
from setpoint.groups.example import example_of as example_of
from setpoint.groups.example import inputs_of as inputs_of
from setpoint.groups.example import is_dense as is_dense
from setpoint.groups.example import num_samples as num_samples
from setpoint.groups.example import tensors_of as tensors_of
from setpoint.groups.example import untouched_attributes as untouched_attributes
from setpoint.groups.follow_data import following_data, is_code, is_library, known
from setpoint.groups.opaque import Staging, alike, draw_for, recorded, running_at
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.users_hooks import has_users_hooks, without_users_hooks
from setpoint.groups.walk import op_name

TORCH_FOLDER = Path(torch.__file__).parent


class Forward(nn.Module):
    """The calls of a staging, on tensors that are given one by one, returning a flat list of all output tensors."""

    def __init__(self, model: nn.Module, staging: Staging) -> None:
        super().__init__()
        self.model, self.staging = model, staging
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of the output in a fixed order."""
        given = zip(self.staging.tensors, tensors, strict=True)
        return list(self.staging.with_tensors({id(own): each for own, each in given}).play(self.model))


@dataclass(frozen=True, eq=False)
class Exported:
    """What of a model could be exported.

    Args:
        program: the graph.
        staging: the calls that it holds.
        refused: of what could not be exported first, None where all could.
    """

    program: Any
    staging: Staging
    refused: ExportError | None = None


@contextmanager
def _without_what_nothing_reads() -> Iterator[None]:
    """Stop the exporter from looking up source lines of every op, and from writing Python code of the graph five times.

    Nothing here reads either. A release of torch may lack the options.
    """
    from torch.fx import _lazy_graph_module

    config: Any = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", None)
    lazily = getattr(_lazy_graph_module, "_use_lazy_graph_module", lambda use: nullcontext())
    with lazily(True):
        if before is not None:
            config.do_not_emit_stack_traces = True
        try:
            yield
        finally:
            if before is not None:
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


def check_example(model: nn.Module, example: Example) -> None:
    """Check what can be seen of a model and an example before a forward.

    Raises:
        ExampleError: the model has no forward, no shapes yet, or is on another device than the example.
        ExportError: the model is scripted.
    """
    inputs_of(example)
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError("a scripted model has no Python code that can be followed: give it before torch.jit.script")
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise ExampleError(
            f'{type(model).__name__} has no forward: name the method that training calls, attach(..., method="name")'
        )
    check_device(model, example)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise ExampleError(f"{name} is lazy and has no shape yet: run model(*example) once before")


def export(model: nn.Module, example: Example) -> Exported:
    """The graph of `model(*example)`, which `check_example` has accepted.

    Where the code of a library decides by values of a tensor, the graph holds the path of the example. A part of the
    model that cannot be exported is an opaque call in it.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: no static graph can hold the model's own forward (control flow by data, say); the message names the
            line.
    """
    staging = Staging.whole(example)
    first: ExportError | None = None
    for _ in range(_ATTEMPTS):
        try:
            program = _exported(model, staging)
        except Exception as error:
            fault = _Fault.of(model, error)
            if first is None:
                _check_runs(model, example)
                first = fault.refusal()
                program = _without_hooks(model, staging)
                if program is not None:
                    return Exported(program, staging)
            staging = _without(model, example, staging, fault, first)
        else:
            if "" not in staging.reasons:
                _check_outputs(program)
            return Exported(program, staging, first)
    assert first is not None, "every attempt has failed"
    raise first


def _check_outputs(program: Any) -> None:
    """Check that the forward returns numbers that a loss can be made of: they are what trials and costs go by."""
    names = set(program.graph_signature.user_outputs)
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    found = [each.meta["val"] for each in output.args[0] if getattr(each, "name", None) in names]
    if not any(each.is_floating_point() or each.is_complex() for each in found if isinstance(each, torch.Tensor)):
        raise ExportError(
            "the model's forward returns no tensor of floats, also none in a list, a dict or a dataclass: return the "
            "loss or the outputs, since backward passes are tried and counted from what the forward returns"
        )


def _without_hooks(model: nn.Module, staging: Staging) -> Any:
    """The graph of the model without the user's hooks; None where there are none, or it cannot be exported either.

    A hook that only looks on may ask for values, which an export does not have. One that changes what flows is found
    out later: cuts are tried on copies with all hooks.
    """
    if has_users_hooks(model):
        with suppress(Exception), without_users_hooks(model):
            return _exported(model, staging)
    return None


_ATTEMPTS = 24
"""Exports of a model: one more for each kind of part that cannot be exported."""


def _exported(model: nn.Module, staging: Staging) -> Any:
    with (
        preserved_rng_state(model),
        untouched_attributes(model),
        _without_what_nothing_reads(),
        marked_functions(),
        _without_logs(),
        warnings.catch_warnings(action="ignore"),
        following_data() if staging.by_data else nullcontext(),
    ):
        program = torch.export.export(Forward(model, staging), tuple(staging.tensors), strict=False)
    _check_sizes(model, program, by_data=staging.by_data)
    return program


def _without(model: nn.Module, example: Example, staging: Staging, fault: _Fault, first: ExportError) -> Staging:
    """The staging without this fault: libraries may decide by data, and what else cannot be exported is opaque.

    Raises:
        ExportError: the forward of the model itself decides by data, which the user can change.
    """
    if fault.by_data and fault.library and not staging.by_data:
        return replace(staging, by_data=True, draw=draw_for(model, example))
    name = fault.module or ""
    if name in staging.reasons:
        raise first
    if fault.by_data and not (name or fault.library):
        raise fault.refusal()
    found = dict.fromkeys(alike(model, name), f"it cannot be exported, so it is not pruned: {fault.text}")
    return recorded(model, example, staging, {**staging.reasons, **found})


@dataclass(frozen=True, eq=False)
class _Fault:
    """Why an export has failed.

    Args:
        error: what was raised.
        module: name of the innermost module that was running, None where that is not known.
        library: whether the line is not the user's own.
        by_data: whether the values of a tensor decide there.
    """

    error: Exception
    module: str | None
    library: bool
    by_data: bool

    @classmethod
    def of(cls, model: nn.Module, error: Exception) -> _Fault:
        """Of an error in an export."""
        if isinstance(error, _DynamicSizeError):
            return cls(error, error.module, is_library(error.file), True)
        by_data = bool({type(link).__name__ for link in _chain(error)} & _DEPENDS_ON_DATA)
        line = _innermost(error, is_code)
        return cls(error, running_at(model, error), line is not None and is_library(line.filename), by_data)

    @property
    def text(self) -> str:
        """What was raised, and where."""
        return f"{_first_line(self.error)}{_user_line(self.error)}"

    def refusal(self) -> ExportError:
        """The error that says so."""
        if isinstance(self.error, _DynamicSizeError):
            error = ExportError(str(self.error))
        else:
            hint = "torch.export cannot follow it; `torch.export.export(model, example, strict=False)` shows the same"
            hint += " error"
            if self.by_data and not self.library:
                hint = (
                    "its control flow depends on the values of a tensor; replace the Python `if` by torch.where, "
                    "or compute the condition outside the model"
                )
            elif _in_recurrent_network(self.error):
                hint = "a packed sequence has sizes that depend on its lengths; "
                hint += "give the recurrent network the padded tensor"
            elif self.by_data:
                hint = "the code of a library decides by the values of a tensor there"
            error = ExportError(f"the model's forward cannot be exported: {self.text}; {hint}")
        error.__cause__ = self.error
        return error


class _DynamicSizeError(Exception):
    """A module makes a tensor whose size the data decides (tokens sent to an expert, say)."""

    def __init__(self, module: str, file: str, op: str) -> None:
        super().__init__(
            f"{module or 'model'}: {op} makes a tensor whose size depends on the data, "
            "so nothing after it can be followed: give every expert all tokens and weigh them, or leave it to a "
            "batched product over experts"
        )
        self.module, self.file = module, file


def _check_sizes(model: nn.Module, program: Any, *, by_data: bool) -> None:
    for node in program.graph.nodes:
        for each in pytree.tree_leaves(node.meta.get("val")):
            sizes = each.shape if isinstance(each, torch.Tensor) else ()
            if any(not isinstance(known(size) if by_data else size, int) for size in sizes):
                module = module_of(node)
                kind = sys.modules.get(type(model.get_submodule(module)).__module__)
                raise _DynamicSizeError(module, str(getattr(kind, "__file__", "")), op_name(node.target))


def _check_runs(model: nn.Module, example: Example) -> None:
    """Distinguish a bad example from a forward that cannot be exported, by running a copy of the model eagerly."""
    args, kwargs = inputs_of(example)
    try:
        with preserved_rng_state(model), torch.no_grad():
            copy.deepcopy(model, computed(model))(*args, **kwargs)
    except Exception as plain:
        raise ExampleError(
            f"the model does not accept the example ({_describe([*args, *kwargs.items()])}): "
            f"{_first_line(plain)}{_user_line(plain)}{_advice(plain)}"
        ) from plain


def _advice(error: Exception) -> str:
    return ". Give two rows or more: a batch norm needs them" if "more than 1 value per channel" in str(error) else ""


_DEPENDS_ON_DATA = {"DataDependentOutputException", "DynamicOutputShapeException"}
_DEPENDS_ON_DATA |= {"GuardOnDataDependentSymNode", "UserError", "AskedForDataError"}


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
    frame = _innermost(error, lambda file: is_code(file) and TORCH_FOLDER not in Path(file).parents)
    return f' (at {frame.filename}:{frame.lineno}: "{frame.line}")' if frame is not None and frame.line else ""


def _innermost(error: BaseException, fits: Callable[[str], bool]) -> traceback.FrameSummary | None:
    """The innermost line in a file that fits."""
    for link in _chain(error):
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            if fits(frame.filename):
                return frame
    return None


def module_of(node: torch.fx.Node) -> str:
    """Name of the module of the user's model whose own forward holds a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return plain_path(next(reversed(stack.values()))[0] if stack else "")


def plain_path(path: str) -> str:
    """Module path in the user's model: without the wrapper, and without the number of a repeated call."""
    path = path.split("@")[0]
    return "" if path in ("", "model") else path.removeprefix("model.")


def _describe(inputs: list[Any]) -> str:
    return ", ".join(
        f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors_of(inputs)
    )
