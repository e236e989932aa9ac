"""A host: how the live model is held - in one process, by `DistributedDataParallel`, by `fully_shard`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from setpoint.distributed import unwrapped
from setpoint.errors import LoopError
from setpoint.host.ddp import DDP
from setpoint.host.fsdp import FSDP
from setpoint.host.local import Local
from setpoint.host.optimizers import Steps, real_optimizers
from setpoint.host.refuse import check_plain, check_unwrapped

Host = Local | DDP | FSDP
"""What a loop asks of the set-up that a model is trained in; `Local` says what each method is for."""


def host_of(model: nn.Module, optimizer: Steps | Sequence[Steps], copies: Sequence[nn.Module] = ()) -> Host:
    """How a model is held: it is taken out of `torch.compile` and `DistributedDataParallel` in any order.

    Args:
        model: as the user calls it.
        optimizer: those that train it, as the user calls them.
        copies: modules with the same tensors.

    Raises:
        LoopError: for what is no module, for any other wrapper for several devices, and for a model that is wrapped,
            but not given with its wrapper.
        OptimizerError: for what is no optimizer, and for one that cannot follow a cut.
    """
    if not isinstance(model, nn.Module):
        raise LoopError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    outer, model = model, unwrapped(model)
    parallel = next((each for each in outer.modules() if isinstance(each, DistributedDataParallel)), None)
    spread = check_plain(model)
    if spread and parallel is not None:
        raise LoopError("fully_shard inside DistributedDataParallel is not supported: use one of the two")
    if parallel is None:
        check_unwrapped(model)
    optimizers = real_optimizers(optimizer)
    compiled = any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in outer.modules())
    if parallel is not None:
        return DDP(model, optimizers, copies, compiled=compiled, parallel=parallel)
    return (FSDP if spread else Local)(model, optimizers, copies, compiled=compiled)
