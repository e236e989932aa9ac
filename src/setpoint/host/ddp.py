"""A wrapper: what is around a model, and how `DistributedDataParallel` follows when its sizes change."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.distributed import Ranks, is_sharded, is_spread, unwrapped
from setpoint.errors import CostError, LoopError, OptimizerError
from setpoint.host.fsdp import Sharding
from setpoint.loop.metering import METERED

if TYPE_CHECKING:
    from setpoint.loop.parts import Parts

_REFUSED = ("FullyShardedDataParallel", "DataParallel")
_BUILT_IN = "BuiltinCommHookType."
"""How PyTorch begins the names of its own communication hooks, which it remembers only by name."""


@dataclass(frozen=True, eq=False)
class Averaging:
    """A `DistributedDataParallel`, and the parameters of which it averages the gradients.

    Args:
        wrapper: the wrapper.
        parameters: those that trained when the loop was attached; one that is frozen for a while is still among them.
    """

    wrapper: DistributedDataParallel
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A model and what is around it.

    Args:
        model: the model itself.
        averaging: the `DistributedDataParallel` around it, or None.
        compiled: whether any of it runs as compiled code.
        sharding: how `fully_shard` has spread it over ranks, or None.
    """

    model: nn.Module
    averaging: Averaging | None
    compiled: bool
    sharding: Sharding | None = None

    @property
    def alone(self) -> bool:
        """Whether one process has all of the model and its gradients."""
        return self.ranks.count == 1 and self.sharding is None

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model together."""
        if self.sharding is not None:
            return self.sharding.ranks
        if self.averaging is None:
            return Ranks()
        return Ranks(self.averaging.wrapper.process_group, self.averaging.wrapper.device)


def unwrap(model: nn.Module, copies: Sequence[nn.Module] = ()) -> Wrapped:
    """The model itself, out of `torch.compile` and `DistributedDataParallel` in any order.

    Args:
        model: as the user calls it.
        copies: modules with the same tensors.

    Raises:
        LoopError: for what is no module, for any other wrapper for several devices, and for a model that is wrapped,
            but not given with its wrapper.
    """
    if not isinstance(model, nn.Module):
        raise LoopError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    outer, model = model, unwrapped(model)
    parallel = next((each for each in outer.modules() if isinstance(each, DistributedDataParallel)), None)
    spread = _check_plain(model)
    if spread and parallel is not None:
        raise LoopError("fully_shard inside DistributedDataParallel is not supported: use one of the two")
    if parallel is None:
        check_unwrapped(model)
    else:
        check_parallel(parallel)
    compiled = any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in outer.modules())
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    averaging = None if parallel is None else Averaging(parallel, trained)
    return Wrapped(model, averaging, compiled, Sharding.of(model, copies) if spread else None)


def _check_plain(model: nn.Module) -> bool:
    """Check that no part of the model is spread over ranks in a way that cannot be followed; whether any is at all."""
    for module in model.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        if isinstance(module, DistributedDataParallel):
            raise LoopError(
                "a part of the model is wrapped by DistributedDataParallel: wrap the whole model, and attach to that"
            )
        name = next((kind for kind in kinds if kind in _REFUSED), "")
        if name:
            raise LoopError(
                f"{name} is not supported by this version of Setpoint: train in one process, wrap the whole model in "
                "torch.nn.parallel.DistributedDataParallel and attach to that, or call fully_shard on it"
            )
    spread = any(is_sharded(module) for module in model.modules())
    if not spread and any(map(is_spread, model.parameters())):
        raise LoopError(
            "a DTensor is not supported by this version of Setpoint, unless fully_shard (FSDP2) has made it of a plain "
            "parameter"
        )
    return spread


def check_parallel(parallel: DistributedDataParallel) -> None:
    """Check that a wrapper can follow a change of sizes.

    Raises:
        LoopError: naming what cannot.
    """
    trouble = {
        "its own mixed_precision (use torch.autocast)": parallel.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(parallel._delay_all_reduce_params),
        "optimizers in the backward pass": any(hasattr(p, "_in_backward_optimizers") for p in parallel.parameters()),
        "the python_reducer of torch._dynamo.config.optimize_ddp": parallel._use_python_reducer,
        # What it remembers has the sizes of the buckets, which change.
        "the communication hook of PowerSGD": any(
            type(state).__name__ == "PowerSGDState" for _, state in parallel._comm_hooks
        ),
    }
    found = [name for name, there in trouble.items() if there]
    if found:
        raise LoopError(f"DistributedDataParallel with {'; '.join(found)} cannot follow a cut: leave that out")


def check_unwrapped(model: nn.Module) -> None:
    """Check that no `DistributedDataParallel` is around a model that was given without one.

    It would miss a change of sizes, after which gradients are silently not averaged any more. Where there are no
    process groups this costs nothing; elsewhere it looks at all objects of the process, so it is not for every step.

    Raises:
        LoopError: when there is one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if not _is_wrapped(model):
        return
    gc.collect()  # a wrapper that nobody has any more does no harm
    if _is_wrapped(model):
        raise LoopError(
            "this model is wrapped by a DistributedDataParallel that the loop does not know: wrap the model first, "
            "and give attach the wrapper in place of the model"
        )


def _is_wrapped(model: nn.Module) -> bool:
    found = [each for each in gc.get_objects() if DistributedDataParallel in type(each).__mro__]
    return any(model in set(each.modules()) for each in found)


def check_step(parts: Parts, first: bool) -> None:
    """Check before an optimizer step that the wrapper is the one that the loop knows.

    Args:
        parts: what the loop is made of.
        first: whether it is the first step of a loop.

    Raises:
        LoopError: where a wrapper came later.
    """
    if parts.sharding is not None:
        parts.sharding.reshard()
    elif first and _check_plain(parts.model):
        raise LoopError("fully_shard (FSDP2) was called on the model after attach: call it first, and attach then")
    if parts.averaging is None and first:
        check_unwrapped(parts.model)


def check_shared(wrapped: Wrapped, resources: Collection[str], optimizers: Sequence[Optimizer]) -> None:
    """Check that all ranks can follow one plan: that costs are the same on all, and each has all of the state.

    Args:
        wrapped: what they train together.
        resources: that a budget or price is on.
        optimizers: that train the model.

    Raises:
        CostError: for a resource that each of several ranks would measure for itself.
        OptimizerError: for ZeRO.
    """
    measured = sorted(set(resources) & set(METERED))
    if measured and (wrapped.ranks.count > 1 or wrapped.sharding is not None):
        raise CostError(
            f"a budget of {measured[0]!r} is not available on several ranks in this version, since each would measure "
            "another cost: use a budget of 'flops' or 'params'"
        )
    for each in optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(each).__mro__):
            raise OptimizerError(
                "ZeroRedundancyOptimizer keeps its state in parts on several ranks, which this version cannot cut: "
                "use the optimizer itself"
            )


def check_reads(wrapped: Wrapped, sensor: object) -> None:
    """Check that a sensor says that it reads weights of which each rank has a part, where that is so.

    Raises:
        LoopError: when it does not.
    """
    if wrapped.sharding is not None and not getattr(sensor, "reads_shards", False):
        raise LoopError(
            f"{type(sensor).__name__} does not say that it can read a model that fully_shard has spread over ranks: "
            "use TaylorSensor, or set reads_shards = True on a sensor that adds up what each rank has"
        )


def rewrap(averaging: Averaging) -> None:
    """Let a wrapper average the gradients of a model whose parameters have changed their shapes.

    The wrapper is the same object as before, with all that the user has set on it: its hooks, the state of `no_sync`,
    and everything that it was built with. Only the reducer, which holds buckets for gradients of the old shapes, is
    made anew, as PyTorch does it when a wrapper is unpickled, and communication hooks are registered again. Nothing
    is sent: the ranks have cut the same units off the same weights.

    Args:
        averaging: the wrapper, between `optimizer.step()` and the next forward pass.

    Raises:
        LoopError: when its communication hook cannot follow.
    """
    check_parallel(averaging.wrapper)
    wrapper: Any = averaging.wrapper  # much of it has no types
    built_in = wrapper._get_ddp_logging_data().get("comm_hook", "")
    wrapper._remove_autograd_hooks()
    with _with_gradients(averaging):
        parameters, sparse = wrapper._build_params_for_reducer()
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
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
def _with_gradients(averaging: Averaging) -> Iterator[None]:
    """Let exactly those parameters train whose gradients are to be averaged.

    One that is frozen at the moment is among them, one that has no entries left is not: it will have no gradient.
    """
    before = [(parameter, parameter.requires_grad) for parameter in averaging.wrapper.module.parameters()]
    known = set(averaging.parameters)
    try:
        for parameter, trains in before:
            parameter.requires_grad_((trains or parameter in known) and parameter.numel() > 0)
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)
