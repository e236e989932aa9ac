"""Export: the model's forward as an ATen graph, without touching the model."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils import _pytree as pytree

from setpoint.errors import ExampleError, ExportError
from setpoint.groups.example import Example, check_device, inputs_of
from setpoint.groups.forward import PartialForward, marked_functions, plain_checkpoints
from setpoint.groups.untouched import has_users_hooks, preserved_rng_state, untouched_attributes, without_users_hooks

_ATTEMPTS = 24  # exports of a model: one more for each kind of part that cannot be exported
# PyTorch has no public name for these; 2.10 has the first two. Later releases have the others, and warn of the first.
_VALUES = ("var_to_val", "unbacked_var_to_val", "backed_var_to_val", "real_tensor_prop_unbacked_vals")


class _FlatForward(nn.Module):
    """A forward on tensors that are given one by one, returning a flat list of all output tensors."""

    def __init__(self, model: nn.Module, forward: PartialForward) -> None:
        super().__init__()
        self.model, self.partial = model, forward
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self.partial.tensors, tensors, strict=True)
        return list(self.partial.with_tensors({id(own): tensor for own, tensor in pairs}).run(self.model))


def check_model(model: nn.Module, example: Example) -> None:
    """Check what can be seen of a model and an example before a forward, or raise ExampleError or ExportError."""
    inputs_of(example)
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise ExampleError(
            f'{type(model).__name__} has no forward: name the method that training calls, attach(..., method="name")'
        )
    check_device(model, example)


def export(model: nn.Module, example: Example) -> tuple[Any, PartialForward, ExportError | None]:
    """The graph of `model(*example)`, the calls that it holds, and why something could not be exported, if so.

    Where the code of a library decides by values of a tensor, the graph holds the path of the example. A part of the
    model that cannot be exported is an opaque call in it. An ExportError names the line of the model's own forward that
    no static graph can hold; an ExampleError says that the model does not accept the example.
    """
    forward = PartialForward.whole(example)
    first: ExportError | None = None
    for _ in range(_ATTEMPTS):
        running: list[str] = []
        try:
            program = _exported(model, forward, running)
        except Exception as error:  # anything may go wrong in a foreign forward
            from setpoint.groups.partial import Fault, check_runs, without

            fault = Fault(error, running[-1] if running else "")
            if first is None:
                check_runs(model, example)
                first = fault.refusal()
                # A hook that only looks on may ask for values, which an export does not have. One that changes what
                # flows is found out later: cuts are tried on copies with all hooks.
                if has_users_hooks(model):
                    with suppress(Exception), without_users_hooks(model):
                        return _exported(model, forward, []), forward, None
            forward = without(model, example, forward, fault, first)
        else:
            if "" not in forward.reasons:
                _check_outputs(program)
            return program, forward, first
    assert first is not None, "every attempt has failed"
    raise first


def _exported(model: nn.Module, forward: PartialForward, running: list[str]) -> Any:
    checkpoints: list[Any] = []
    with (
        preserved_rng_state(model),
        untouched_attributes(model),
        _without_what_nothing_reads(lines=forward.by_data),
        marked_functions(),
        plain_checkpoints(checkpoints),
        _noting_calls(model, running),
        warnings.catch_warnings(action="ignore"),
        ExitStack() as stack,
    ):
        if forward.by_data:
            from setpoint.groups.partial import following_data

            stack.enter_context(following_data())
        # Not strict: TorchDynamo refuses much Python that is harmless, and rewrites what the shims have to number.
        program = torch.export.export(_FlatForward(model, forward), tuple(forward.tensors), strict=False)
    program.graph_module.meta["checkpointed"] = bool(checkpoints)
    _check_sizes(model, program, by_data=forward.by_data)
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
    """Stop the exporter from logging, from writing Python code of the graph and, unless asked, from noting lines."""
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    config: Any = torch.fx.config
    before = getattr(config, "do_not_emit_stack_traces", False), logging.root.manager.disable
    config.do_not_emit_stack_traces = not lines  # without effect in a release of torch that does not know it
    logging.disable(logging.ERROR)
    try:
        with _use_lazy_graph_module(True), redirect_stderr(io.StringIO()):
            yield
    finally:
        config.do_not_emit_stack_traces, disabled = before
        logging.disable(disabled)


def _check_outputs(program: Any) -> None:
    outputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_outputs]
    if not any(map(has_floats, outputs)):
        raise ExportError(
            "the model's forward returns no tensor of floats, also none in a list, a dict or a dataclass: return the "
            "loss or the outputs, since backward passes are tried and counted from what the forward returns"
        )


def has_floats(node: fx.Node) -> bool:
    """Whether a node gives numbers that a gradient may go through."""
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)


def _check_sizes(model: nn.Module, program: Any, *, by_data: bool) -> None:
    """Check that every size in the graph is a number, and that only libraries ask for values."""
    for node in program.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            sizes = leaf.shape if isinstance(leaf, torch.Tensor) else ()
            if any(not isinstance(known(size) if by_data else size, int) for size in sizes):
                from setpoint.groups.partial import dynamic_size

                raise dynamic_size(model, node)
    if by_data:
        from setpoint.groups.partial import check_asks_nothing

        check_asks_nothing(program.graph)


def known(value: Any) -> Any:
    """A number of a graph, by the example's data where that decides on it."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    node: Any = value.node
    tables = [vars(node.shape_env).get(name, {}) for name in _VALUES]
    answer = node.expr.xreplace({symbol: number for table in tables for symbol, number in table.items()})
    return value if getattr(answer, "free_symbols", None) else node.pytype(answer)


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of a tensor of a graph, by the example's data where that decides on it."""
    return torch.Size([int(known(size)) for size in tensor.shape])
