"""Lets Accelerate shard on a CPU, where by itself it would take DDP in place of FSDP."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    """From here on an Accelerator with an FSDP plugin shards."""
    before = AcceleratorState.__init__

    @functools.wraps(before)
    def init(self: Any, *args: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **settings: Any) -> None:
        before(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
