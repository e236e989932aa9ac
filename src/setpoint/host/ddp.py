"""`DistributedDataParallel`: how it follows when the sizes of the model in it change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.distributed import Ranks
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.host.agreement import SeveralRanks
from setpoint.host.host import Agreed
from setpoint.host.join import Joining
from setpoint.host.local import check_unsharded

_BUILT_IN = "BuiltinCommHookType."
"""How PyTorch begins the names of its own communication hooks, which it remembers only by name."""


class DDP(SeveralRanks):
    """A `Host` of ranks that each have all of the model in `parallel`, and average its gradients."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        copies: Sequence[Any],
        *,
        compiled: bool,
        parallel: DistributedDataParallel,
    ) -> None:
        super().__init__(model, optimizers, copies, compiled=compiled)
        check_parallel(parallel)
        self._parallel = parallel
        self._trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
        self._joining: Joining

    @property
    def ranks(self) -> Ranks:
        return Ranks(self._parallel.process_group, self._parallel.device)

    @contextmanager
    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> Iterator[Agreed]:
        try:
            yield agree
        finally:
            # Also after an exception in the middle: with the old reducer gradients would silently not be averaged.
            rewrap(self._parallel, self._trained)

    def begin(self, *, steps: Callable[[], int], missed: Callable[[], None], groups: tuple[Group, ...]) -> None:
        super().begin(steps=steps, missed=missed, groups=groups)
        self._joining = Joining(self._parallel, self.ranks, steps, missed)

    def before_step(self, *, first: bool, regrows: bool, by_hooks: bool) -> None:
        if first:
            check_unsharded(self.model)
        self._joining.check(regrows=regrows, by_hooks=by_hooks)
        self._frozen.check()

    def complete(self) -> bool:
        return self._joining.all_made()

    def stop(self) -> None:
        super().stop()
        self._joining.stop()


def check_parallel(parallel: DistributedDataParallel) -> None:
    """Check that a wrapper can follow a change of sizes, or raise LoopError naming what cannot."""
    trouble = {
        "its own mixed_precision (use torch.autocast)": parallel.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(parallel._delay_all_reduce_params),
        "optimizers in the backward pass": any(hasattr(p, "_in_backward_optimizers") for p in parallel.parameters()),
        "the python_reducer of torch._dynamo.config.optimize_ddp": parallel._use_python_reducer,
        # What it remembers has the sizes of the buckets, which change.
        "the communication hook of PowerSGD": "PowerSGDState"
        in {type(state).__name__ for _, state in parallel._comm_hooks},
    }
    found = [name for name, there in trouble.items() if there]
    if found:
        raise LoopError(f"DistributedDataParallel with {'; '.join(found)} cannot follow a cut: leave that out")


def rewrap(parallel: DistributedDataParallel, trained: Collection[nn.Parameter]) -> None:
    """Let a wrapper average the gradients of a model whose parameters have changed their shapes since the last step.

    The wrapper stays the same object, with all that the user has set on it. Only its reducer, which holds buckets for
    gradients of the old shapes, is built again, as PyTorch does when a wrapper is unpickled, and communication hooks
    are registered again. Nothing is sent. Gradients of `trained` are averaged, also of parameters frozen for a while.
    """
    check_parallel(parallel)
    wrapper: Any = parallel  # much of it has no types
    built_in = wrapper._get_ddp_logging_data().get("comm_hook", "")  # read now: the new reducer knows of none
    # The old reducer's hooks hang on the parameters, and would fill buckets of the old shapes.
    wrapper._remove_autograd_hooks()
    with _with_gradients(wrapper.module, trained):
        parameters, sparse = wrapper._build_params_for_reducer()
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    # As in a fresh wrapper: buckets are ordered after the first backward pass, and a static graph is recorded in it.
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
    if not hooks and built_in.startswith(_BUILT_IN):
        kind = getattr(torch._C._distributed_c10d.BuiltinCommHookType, built_in.removeprefix(_BUILT_IN))
        wrapper._register_builtin_comm_hook(kind)


@contextmanager
def _with_gradients(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Let exactly those parameters train whose gradients are to be averaged."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = set(trained)
    try:
        for parameter, trains in before:
            # A reducer takes the parameters that train when it is built, for good, and no empty ones.
            parameter.requires_grad_((trains or parameter in known) and parameter.numel() > 0)
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)
