"""What around a model, or in it, cannot follow a change of sizes, and is refused by name."""

from __future__ import annotations

import gc

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from setpoint.distributed import is_sharded, is_sharded_tensor
from setpoint.errors import LoopError

_REFUSED = ("FullyShardedDataParallel", "DataParallel")


def check_plain(model: nn.Module) -> bool:
    """Check that no part of the model is sharded over ranks in a way that cannot be followed; whether any is at all."""
    for module in model.modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        if isinstance(module, DistributedDataParallel):
            raise LoopError(
                "a part of the model is wrapped by DistributedDataParallel: wrap the whole model, and attach to that"
            )
        name = next((kind for kind in kinds if kind in _REFUSED), "")
        if name:
            raise LoopError(
                f"{name} is not supported by this version of Setpoint: train on one device (CUDA_VISIBLE_DEVICES=0), "
                "wrap the whole model in DistributedDataParallel (torchrun, in a Trainer), or call fully_shard on it"
            )
    sharded = any(is_sharded(module) for module in model.modules())
    if not sharded and any(map(is_sharded_tensor, model.parameters())):
        raise LoopError(
            "a DTensor is not supported by this version of Setpoint, unless fully_shard (FSDP2) has made it of a plain "
            "parameter"
        )
    return sharded


def check_unsharded(model: nn.Module) -> None:
    """Check that a model whose ranks each had all of it is still so, or raise LoopError."""
    if check_plain(model):
        raise LoopError("fully_shard (FSDP2) was called on the model after attach: call it first, and attach then")


def check_parallel(parallel: DistributedDataParallel) -> None:
    """Check that a wrapper can follow a change of sizes, or raise LoopError naming what cannot."""
    trouble = {
        "its own mixed_precision (use torch.autocast)": parallel.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(parallel._delay_all_reduce_params),
        "optimizers in the backward pass": any(hasattr(p, "_in_backward_optimizers") for p in parallel.parameters()),
        "the python_reducer of torch._dynamo.config.optimize_ddp": parallel._use_python_reducer,
        # What it remembers has the sizes of the buckets, which change.
        "the communication hook of PowerSGD": "PowerSGDState"
        in {type(each).__name__ for _, each in parallel._comm_hooks},
    }
    found = [name for name, there in trouble.items() if there]
    if found:
        raise LoopError(f"DistributedDataParallel with {'; '.join(found)} cannot follow a cut: leave that out")


def check_unwrapped(model: nn.Module) -> None:
    """Check that no `DistributedDataParallel` is around a model that was given without one.

    It would miss a change of sizes, after which gradients are silently not averaged any more. Where there are process
    groups it looks at all objects of the process, so it is not for every step.

    Raises:
        LoopError: when there is one.
    """
    if not (dist.is_available() and dist.is_initialized() and _is_wrapped(model)):
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
