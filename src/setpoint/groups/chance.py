"""Chance: the global random number generators, put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


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
