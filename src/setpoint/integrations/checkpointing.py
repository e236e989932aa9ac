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
    """Make each model of this process resumable that was cut, or that loads a state dict with sizes.

    The function wraps `torch.nn.Module.load_state_dict` and makes models resumable as they load. A state without sizes
    loads as usual into a model that was never cut. Transformers' `save_pretrained` and `from_pretrained` carry sizes,
    too (`enable_huggingface`). A second call changes nothing.

    >>> from setpoint import shrink_to
    >>> enable_checkpointing()
    >>> small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).state_dict()
    >>> cut = shrink_to(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), small)
    >>> dense = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> dense.load_state_dict(cut.state_dict())
    <All keys matched successfully>
    >>> dense[0]
    Linear(in_features=2, out_features=3, bias=True)
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
