"""Unit sums."""

import numpy as np
import pytest
import torch

from setpoint.groups.group import Slice
from setpoint.sensor.units import UnitSum

TABLES = {
    "identity": np.arange(6),
    "repeat": np.repeat(np.arange(3), 2),
    "interleaved": np.tile(np.arange(3), 2),
    "part of the dim": np.array([-1, -1, 0, 1, 2, -1]),
    "holes": np.array([0, -1, 1, -1, 2, 0]),
    "unequal": np.array([0, 0, 0, 1, 2, 2]),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("table", TABLES)
def test_adds_up_every_entry_to_its_unit(table: str, dim: int, layout: str) -> None:
    """For any index table, dim and memory layout the sums are those of the definition."""
    index = TABLES[table]
    num_units = int(index.max()) + 1
    shape = [2, 3, 4, 5]
    shape[dim] = len(index)
    values = torch.randn(shape, dtype=torch.float64)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        values = values.transpose(0, 3).contiguous().transpose(0, 3)
    sums = UnitSum.of(Slice("w", dim, "consume", index), num_units, values.device)
    rows = values.transpose(0, dim).reshape(len(index), -1).sum(1)
    want = torch.stack([rows[torch.from_numpy(index == unit)].sum() for unit in range(num_units)])
    torch.testing.assert_close(sums.add_up(sums.select(values)), want)


def test_selecting_copies_nothing() -> None:
    """The selected part shares memory with the tensor, in channels_last too."""
    weight = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    sums = UnitSum.of(Slice("w", 1, "consume", TABLES["part of the dim"]), 3, weight.device)
    assert sums.select(weight).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
