"""Collection waits, and copies with data do not gather while it does."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.groups.rehearsal import Rehearsal
from setpoint.uncollected import uncollected


def test_collection_is_put_back() -> None:
    """Claim: it is off inside, on afterwards if it was on, also after an error; off stays off."""
    for on in (True, False):
        if not on:
            gc.disable()
        try:
            with pytest.raises(KeyError), uncollected():
                assert not gc.isenabled()
                raise KeyError
            assert gc.isenabled() is on
        finally:
            gc.enable()


class Circle(nn.Module):
    """Its copies refer to themselves, and it asks for a value, so copies have data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.holder, self.fails = nn.Parameter(torch.ones(3)), [self], False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails or bool((x * self.weight).sum().item() > 1e9):
            raise RuntimeError("it fails")
        return x * self.weight


@pytest.mark.parametrize("fails", [False, True])
def test_copies_with_data_do_not_gather(fails: bool) -> None:
    """Claim: while collection waits no more than two copies with data are alive, whether they run or fail."""
    model = Circle()
    rehearsal, alive = Rehearsal(model, (torch.ones(2, 3),)), list[weakref.ref[nn.Module]]()
    most = 0

    def prepare(twin: nn.Module) -> None:
        nonlocal most
        twin.fails = fails  # type: ignore[assignment]
        if next(twin.parameters()).device.type == "cpu" and type(next(twin.parameters())) is nn.Parameter:
            alive.append(weakref.ref(twin))
        most = max(most, sum(each() is not None for each in alive))

    def run() -> Any:
        try:
            return rehearsal.run(prepare)
        except RuntimeError:
            return None

    with uncollected():
        for _ in range(8):
            run()
    assert len(alive) >= 8 and most <= 3, most
