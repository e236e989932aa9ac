"""Checkpointing, once per process: whatever saves and loads models carries their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import nn

from setpoint.actuator.carried import KEY
from setpoint.actuator.lift import was_cut
from setpoint.checkpoint.resumable import is_resumable, resumable
from setpoint.integrations.huggingface import enable_huggingface


def enable_checkpointing() -> None:
    """Make every model of this process resumable, once and for all: each whose state dict carries sizes, or was cut.

    It wraps `torch.nn.Module.load_state_dict` and makes models resumable as they load; a state that carries no sizes is
    loaded into a model that was never cut as ever. Transformers' `save_pretrained` and `from_pretrained` follow
    (`enable_huggingface`). May be called again.
    """
    enable_huggingface()
    plain = nn.Module.load_state_dict
    if getattr(plain, KEY, False):
        return

    @wraps(plain)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **settings: Any) -> Any:
        metadata = getattr(state_dict, "_metadata", None) or {}
        if not is_resumable(self) and (was_cut(self) or any(KEY in each for each in metadata.values())):
            resumable(self)
        return plain(self, state_dict, *args, **settings)

    setattr(load_state_dict, KEY, True)
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
