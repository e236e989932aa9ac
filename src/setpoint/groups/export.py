"""Export: the model's forward as an ATen graph, without touching the model."""

from __future__ import annotations

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
from torch.nn.modules import module as hooks_of_all
from torch.utils import _pytree as pytree

from setpoint.errors import ExampleError, ExportError
from setpoint.groups.data_dependent import TORCH_FOLDER, following_data, is_code, is_library, users_question
from setpoint.groups.example import Example, check_device, inputs_of, tensors_of
from setpoint.groups.model_copy import copy_of, has_users_hooks, untouched_attributes, without_users_hooks
from setpoint.groups.partial import PartialForward, draw_for, marked_functions, modules_of_same_code, with_opaque
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.walk import op_name


class _FlatForward(nn.Module):
    """A forward on tensors that are given one by one, returning a flat list of all output tensors."""

    def __init__(self, model: nn.Module, forward: PartialForward) -> None:
        super().__init__()
        self.model, self.partial = model, forward
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of the output in a fixed order."""
        given = zip(self.partial.tensors, tensors, strict=True)
        return list(self.partial.with_tensors({id(own): tensor for own, tensor in given}).run(self.model))


@dataclass(frozen=True, eq=False)
class Exported:
    """What of a model could be exported.

    Args:
        program: the graph.
        forward: the calls that it holds.
        refused: of what could not be exported first, None where all could.
    """

    program: Any
    forward: PartialForward
    refused: ExportError | None = None


def check_model(model: nn.Module, example: Example) -> None:
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


_ATTEMPTS = 24
"""Exports of a model: one more for each kind of part that cannot be exported."""


def export(model: nn.Module, example: Example) -> Exported:
    """The graph of `model(*example)`, which `check_model` has accepted.

    Where the code of a library decides by values of a tensor, the graph holds the path of the example. A part of the
    model that cannot be exported is an opaque call in it.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: no static graph can hold the model's own forward (control flow by data, say); the message names the
            line.
    """
    forward = PartialForward.whole(example)
    first: ExportError | None = None
    for _ in range(_ATTEMPTS):
        running: list[str] = []
        try:
            program = _exported(model, forward, running)
        except Exception as error:  # anything may go wrong in a foreign forward
            fault = _Fault.of(error, running[-1] if running else "")
            if first is None:
                _check_runs(model, example)
                first = fault.refusal()
                program = _without_hooks(model, forward)
                if program is not None:
                    return Exported(program, forward)
            forward = _without(model, example, forward, fault, first)
        else:
            if "" not in forward.reasons:
                _check_outputs(program)
            return Exported(program, forward, first)
    assert first is not None, "every attempt has failed"
    raise first


def _exported(model: nn.Module, forward: PartialForward, running: list[str]) -> Any:
    with (
        preserved_rng_state(model),
        untouched_attributes(model),
        _without_what_nothing_reads(lines=forward.by_data),
        marked_functions(),
        _without_logs(),
        _noting_calls(model, running),
        warnings.catch_warnings(action="ignore"),
        following_data() if forward.by_data else nullcontext(),
    ):
        # Not strict: TorchDynamo refuses much Python that is harmless, and rewrites what the shims have to number.
        program = torch.export.export(_FlatForward(model, forward), tuple(forward.tensors), strict=False)
    _check_sizes(model, program, by_data=forward.by_data)
    question = users_question(program.graph) if forward.by_data else None
    if question is not None:
        node, line = question
        raise _ByDataError(module_of(node), False, f"it asks for the values of a tensor {line}")
    return program


@contextmanager
def _noting_calls(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Note which modules of the model are running; what an exception leaves there was running when it was raised."""
    # By the table of attributes: the exporter calls stand-ins of modules, which share it.
    names = {id(vars(module)): name for name, module in model.named_modules()}

    def before(module: nn.Module, args: Any) -> None:
        if id(vars(module)) in names:
            running.append(names[id(vars(module))])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        name = names.get(id(vars(module)))
        while running and name is not None and running.pop() != name:
            pass  # a module that raised, and whose caller caught it

    handles = [hooks_of_all.register_module_forward_pre_hook(before), hooks_of_all.register_module_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_what_nothing_reads(*, lines: bool) -> Iterator[None]:
    """Stop the exporter from writing Python code of the graph five times and, unless asked, from noting source lines.

    A release of torch may lack the options.
    """
    from torch.fx import _lazy_graph_module

    config: Any = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", None)
    lazily = getattr(_lazy_graph_module, "_use_lazy_graph_module", lambda use: nullcontext())
    with lazily(True):
        if before is not None:
            config.do_not_emit_stack_traces = not lines
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


def _check_outputs(program: Any) -> None:
    """Check that the forward returns numbers that a loss can be made of: they are what cuts and costs go by."""
    names = set(program.graph_signature.user_outputs)
    (output,) = [node for node in program.graph.nodes if node.op == "output"]
    found = [node.meta["val"] for node in output.args[0] if getattr(node, "name", None) in names]
    if not any(each.is_floating_point() or each.is_complex() for each in found if isinstance(each, torch.Tensor)):
        raise ExportError(
            "the model's forward returns no tensor of floats, also none in a list, a dict or a dataclass: return the "
            "loss or the outputs, since backward passes are tried and counted from what the forward returns"
        )


def _without_hooks(model: nn.Module, forward: PartialForward) -> Any:
    """The graph of the model without the user's hooks; None where there are none, or it cannot be exported either.

    A hook that only looks on may ask for values, which an export does not have. One that changes what flows is found
    out later: cuts are tried on copies with all hooks.
    """
    if has_users_hooks(model):
        with suppress(Exception), without_users_hooks(model):
            return _exported(model, forward, [])
    return None


def _without(
    model: nn.Module, example: Example, forward: PartialForward, fault: _Fault, first: ExportError
) -> PartialForward:
    """The forward without this fault: libraries may decide by data, and what else cannot be exported is opaque.

    Raises:
        ExportError: the forward of the model itself decides by data, which the user can change.
    """
    if fault.by_data and fault.library and not forward.by_data:
        return replace(forward, by_data=True, draw=draw_for(model, example))
    if fault.module in forward.reasons:
        raise first
    if fault.by_data and not (fault.module or fault.library):
        raise fault.refusal()
    why = f"it cannot be exported, so it is not pruned: {fault.text}"
    found = dict.fromkeys(modules_of_same_code(model, fault.module), why)
    return with_opaque(model, example, forward, {**forward.reasons, **found})


class _ByDataError(Exception):
    """A module decides by data; which one, and whether its code is a library's."""

    def __init__(self, module: str, library: bool, text: str) -> None:
        super().__init__(text)
        self.module, self.library = module, library


class _DynamicSizeError(_ByDataError):
    """A module makes a tensor whose size the data decides (tokens sent to an expert, say)."""


@dataclass(frozen=True, eq=False)
class _Fault:
    """Why an export has failed.

    Args:
        error: what was raised.
        module: name of the innermost module that was running.
        library: whether the line is not the user's own.
        by_data: whether the values of a tensor decide there.
        text: what was raised, and where.
    """

    error: Exception
    module: str
    library: bool
    by_data: bool
    text: str

    @classmethod
    def of(cls, error: Exception, module: str) -> _Fault:
        """Of an error in an export, raised while this module was running."""
        if isinstance(error, _ByDataError):
            return cls(error, error.module, error.library, True, str(error))
        by_data = bool({type(link).__name__ for link in _chain(error)} & _DEPENDS_ON_DATA)
        line = _innermost(error, is_code)
        library = line is not None and is_library(line.filename)
        return cls(error, module, library, by_data, f"{_first_line(error)}{_user_line(error)}")

    def refusal(self) -> ExportError:
        """The error that says so."""
        hint = "torch.export cannot follow it; `torch.export.export(model, example, strict=False)` shows the same error"
        if self.by_data and not self.library:
            hint = (
                "its control flow depends on the values of a tensor; replace the Python `if` by torch.where, "
                "or compute the condition outside the model"
            )
        elif _in_recurrent_network(self.error):
            hint = (
                "a packed sequence has sizes that depend on its lengths; give the recurrent network the padded tensor"
            )
        elif self.by_data:
            hint = "the code of a library decides by the values of a tensor there"
        text = f"the model's forward cannot be exported: {self.text}; {hint}"
        error = ExportError(self.text if isinstance(self.error, _DynamicSizeError) else text)
        error.__cause__ = self.error
        return error


def _check_sizes(model: nn.Module, program: Any, *, by_data: bool) -> None:
    """Check that every size in the graph is a number."""
    for node in program.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            sizes = leaf.shape if isinstance(leaf, torch.Tensor) else ()
            if any(not isinstance(known(size) if by_data else size, int) for size in sizes):
                module = module_of(node)
                kind = sys.modules.get(type(model.get_submodule(module)).__module__)
                raise _DynamicSizeError(
                    module,
                    is_library(str(getattr(kind, "__file__", ""))),
                    f"{module or 'model'}: {op_name(node.target)} makes a tensor whose size depends on the data, "
                    "so nothing after it can be followed: give every expert all tokens and weigh them, or leave it to "
                    "a batched product over experts",
                )


# PyTorch has no public name for these; 2.10 has the first two. Later releases have the others, and warn of the first.
_VALUES = ("var_to_val", "unbacked_var_to_val", "backed_var_to_val", "real_tensor_prop_unbacked_vals")


def known(value: Any) -> Any:
    """A number of a graph, by the example's data where that decides on it."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    node: Any = value.node
    tables = [vars(node.shape_env).get(name, {}) for name in _VALUES]
    answer = node.expr.xreplace({symbol: number for table in tables for symbol, number in table.items()})
    if getattr(answer, "free_symbols", None):
        return value
    return node.pytype(answer)


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of a tensor of a graph, by the example's data where that decides on it."""
    return torch.Size([int(known(size)) for size in tensor.shape])


def _check_runs(model: nn.Module, example: Example) -> None:
    """Distinguish a bad example from a forward that cannot be exported, by running a copy of the model eagerly."""
    args, kwargs = inputs_of(example)
    try:
        with preserved_rng_state(model), torch.no_grad():
            copy_of(model)(*args, **kwargs)
    except Exception as plain:
        inputs = ", ".join(
            f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for tensor in tensors_of([*args, *kwargs.items()])
        )
        few = "more than 1 value per channel" in str(plain)
        raise ExampleError(
            f"the model does not accept the example ({inputs}): {_first_line(plain)}{_user_line(plain)}"
            + (". Give two rows or more: a batch norm needs them" if few else "")
        ) from plain


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
