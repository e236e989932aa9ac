"""What around a model, or in it, cannot follow a change of sizes, and is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from setpoint.distributed import is_sharded, is_sharded_tensor
from setpoint.errors import LoopError

_REFUSED = ("FullyShardedDataParallel", "DataParallel")


def check_plain(model: nn.Module) -> bool:
    """Check that no part of the model is sharded over ranks in a way that cannot be followed; whether any is at all."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise LoopError(
                "a part of the model is wrapped by DistributedDataParallel: wrap the whole model, and attach to that"
            )
        kinds = [kind.__name__ for kind in type(module).__mro__]
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


def watch_for_wrapper(model: nn.Module) -> Callable[[], None]:
    """Refuse a `DistributedDataParallel` around a model that was given without it, in the next forward in training.

    The wrapper would miss a change of sizes, after which gradients are silently not averaged any more.

    Returns:
        stops watching; may be called again.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return lambda: None

    def look(module: nn.Module, args: Any) -> None:
        # A module does not know what wraps it, but PyTorch says which wrapper is running its forward.
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None and any(part is model for part in wrapper.modules()):
            raise LoopError(
                "this model is wrapped by a DistributedDataParallel that the loop does not know: wrap the model first, "
                "and give attach the wrapper in place of the model"
            )
        if module is model and torch.is_grad_enabled():  # not a deep copy, which has this hook, too
            handle.remove()

    handle = model.register_forward_pre_hook(look)
    return handle.remove
