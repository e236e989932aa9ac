"""Kinds: whether what a file holds for a scheduler or a scaler is of the kinds of what that one has itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from setpoint.errors import CheckpointError
from setpoint.messages import a_type


def check_kinds(name: str, part: Any, saved: Any) -> None:
    """Check the state of a learning-rate scheduler or a GradScaler, which take over whatever they are given.

    Every public entry must be there, and numbers, flags, texts, lists and tables where such are now; a new entry must
    not take the place of a method. What has another class is its own judge.

    Args:
        name: of the part.
        part: as it was built.
        saved: what its `load_state_dict` is about to be given.

    Raises:
        CheckpointError: naming the first entry that does not fit.
    """
    if not isinstance(part, LRScheduler) and type(part).__name__ != "GradScaler":
        return
    own, kind = part.state_dict(), type(part).__name__
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{name} ({kind}) cannot go on with {a_type(saved)} for its state")
    if not own or (not saved and not isinstance(part, LRScheduler)):
        return  # a disabled GradScaler: whether both are is asked elsewhere
    known = type(part).__module__.partition(".")[0] == "torch"
    for key, value in own.items():
        if key not in saved and not key.startswith("_"):
            raise CheckpointError(f"{name} ({kind}) cannot go on with a state that has no {key!r}")
        if key in saved and not _alike(value, saved[key], same_length=known):
            raise CheckpointError(
                f"{name} ({kind}) cannot go on with {key}={saved[key]!r:.80}, here it is {value!r:.80}"
            )
    for key in saved.keys() - own.keys():
        if key == "optimizer" or callable(getattr(part, str(key), None)):
            raise CheckpointError(f"{name} ({kind}) cannot go on with a state in which {key!r} is {saved[key]!r:.80}")


def _alike(own: Any, saved: Any, *, same_length: bool) -> bool:
    if own is None:
        return True
    if isinstance(own, bool):
        return isinstance(saved, bool)
    if _is_number(own):
        return _is_number(saved)
    if isinstance(own, str):
        return isinstance(saved, str)
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            return False
        both = own.keys() & saved.keys()
        return all(_alike(own[key], saved[key], same_length=same_length) for key in both)
    if isinstance(own, Sequence):
        if not isinstance(saved, Sequence) or isinstance(saved, str) or (same_length and len(own) != len(saved)):
            return False
        return all(_alike(one, other, same_length=same_length) for one, other in zip(own, saved, strict=False))
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
