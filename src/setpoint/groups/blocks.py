"""Blocks: how many units go together, so that the widths that are left run fast on a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from setpoint.errors import GroupError
from setpoint.groups.group import Group

_MIN_BLOCKS = 8
"""Blocks are as large as suits the hardware, but a group has at least this many."""
_MIN_WIDE_BLOCKS = 16
"""A group has at least this many of the blocks that tensor cores want: they're four times as large as a CPU's."""
_LIKED = {"channel": 16}
"""Widths that a CPU's kernels want are multiples of this; of 8 for all that isn't listed."""
_TENSOR_CORES = 64
"""Sizes of a matrix product should be multiples of at least this on a GPU.

NVIDIA, Convolutional Layers User's Guide and Linear/Fully-Connected Layers User's Guide, quick start checklists.
"""


def check_blocks(groups: Iterable[Group]) -> None:
    """Check that the blocks of a user's own groups hold units, or raise GroupError by name."""
    for group in groups:
        size: Any = group.multiple_of
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise GroupError(
                f"multiple_of of group {group.name!r} is a whole number of units, at least 1; got {size!r}"
            )


def block_size(num_units: int, what: str, device_type: str) -> int:
    """Number of units that go together: a power of two, and 1 for heads.

    On a CPU it is 16 for channels and 8 for other units; on "cuda" 64 where the group then has 16 blocks, else half of
    that and so on. No block is smaller on "cuda" than on a CPU. A group has at least eight blocks; in a narrow group
    they are smaller.

    >>> [block_size(width, "neuron", "cpu") for width in (3072, 64, 16)]
    [8, 8, 2]
    >>> [block_size(width, "neuron", "cuda") for width in (3072, 512, 64, 16)]
    [64, 32, 8, 2]
    """
    if what == "head":
        return 1
    block = _largest(num_units, _LIKED.get(what, 8), _MIN_BLOCKS)
    return max(block, _largest(num_units, _TENSOR_CORES, _MIN_WIDE_BLOCKS)) if device_type == "cuda" else block


def device_type_of(model: nn.Module) -> str:
    """Type of the device that most of the weights are on; of a model without any, "cpu"."""
    sizes: dict[str, int] = {}
    for each in model.parameters():
        sizes[each.device.type] = sizes.get(each.device.type, 0) + each.numel()
    return max(sizes, key=sizes.__getitem__, default="cpu")


def _largest(num_units: int, liked: int, least: int) -> int:
    """Largest power of two up to `liked` that leaves at least so many blocks to choose from."""
    block = liked
    while block > 1 and num_units // block < least:
        block //= 2
    return block
