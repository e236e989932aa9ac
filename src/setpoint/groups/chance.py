"""Chance: the global random number generators, put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched_chance(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, PyTorch's, NumPy's and Python's global generators are as before.

    Args:
        model: on whose devices PyTorch's generators are kept, besides the host's.
    """
    devices = {parameter.device for parameter in model.parameters()}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def chance_state() -> dict[str, Any]:
    """States of PyTorch's, NumPy's and Python's global generators, of GPUs too, in tensors, numbers and strings."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def check_chance_state(state: Mapping[str, Any]) -> None:
    """Try a state on generators of their own.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: for what is no state.
    """
    torch.Generator().set_state(state["torch"].cpu())
    np.random.RandomState().set_state(_for_numpy(state["numpy"]))
    random.Random().setstate(_nested(state["python"]))
    if state["numpy"][1].shape != chance_state()["numpy"][1].shape:  # NumPy takes a longer one
        raise ValueError(f"the state of NumPy's generator has shape {tuple(state['numpy'][1].shape)}")
    if not all(isinstance(each, Tensor) for each in state["cuda"]):
        raise TypeError("the state of a GPU's generator is a tensor")


def set_chance_state(state: Mapping[str, Any]) -> None:
    """Put the generators into the state that `chance_state` returned; GPUs that are not there are left out."""
    torch.set_rng_state(state["torch"].cpu())
    for device, each in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(each.cpu(), device)
    np.random.set_state(_for_numpy(state["numpy"]))
    random.setstate(_nested(state["python"]))


def _for_numpy(state: Sequence[Any]) -> tuple[Any, ...]:
    name, keys, *rest = state
    return name, keys.cpu().numpy().astype(np.uint32), *rest


def _nested(state: Sequence[Any]) -> tuple[Any, ...]:
    version, numbers, pair = state
    return version, tuple(numbers), pair
