"""Carrying: a loop's state inside its optimizer's own state dict, so that any framework saves and loads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from setpoint.checkpoint.plain import from_tensors, to_tensors
from setpoint.errors import CheckpointError

KEY = "setpoint"
"""Entry of the first parameter group: PyTorch keeps such entries through its optimizers' states as they are."""


def packed(state: Mapping[str, Any]) -> Tensor:
    """A state as one tensor of bytes, which every format keeps."""
    return torch.frombuffer(bytearray(save(to_tensors(state))), dtype=torch.uint8)


def unpacked(data: Any) -> Any:
    """What `packed` was given.

    Raises:
        CheckpointError: for anything else.
    """
    try:
        return from_tensors(load(data.cpu().numpy().tobytes()))
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the loop's state in the optimizer's state dict is damaged: {error!r}") from error


def brought(optimizer: Optimizer) -> Any | None:
    """The loop's state that an optimizer has loaded with its own; None if there is none."""
    data = optimizer.param_groups[0].get(KEY)
    return None if data is None else unpacked(data)


def forget(optimizer: Optimizer) -> None:
    """The state that `brought` gives has been taken over."""
    optimizer.param_groups[0].pop(KEY, None)


class Carrying:
    """Puts a loop's state into what an optimizer saves, and takes it out of what it loads.

    Args:
        optimizer: the first of the loop's.
        state: of the loop.
        take: called with the state of a loop and what the optimizer is about to load itself.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        state: Callable[[], Mapping[str, Any]],
        take: Callable[[Any, Mapping[str, Any]], None],
    ) -> None:
        self._state, self._take = state, take
        self._handles = [
            optimizer.register_state_dict_post_hook(self._put),
            optimizer.register_load_state_dict_pre_hook(self._look, prepend=True),
        ]

    def _put(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        saved["param_groups"][0][KEY] = packed(self._state())

    def _look(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        first, *others = saved["param_groups"] or [{}]
        if not isinstance(first, dict) or KEY not in first:
            return None
        rest = {**saved, "param_groups": [{name: each for name, each in first.items() if name != KEY}, *others]}
        self._take(unpacked(first[KEY]), rest)
        return rest

    def stop(self) -> None:
        """Take the hooks away; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
