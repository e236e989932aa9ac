"""How many units go together: as many as suits the device, and few enough to choose from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import setpoint
from setpoint.groups.build import block_size, device_type_of

KINDS = ("channel", "neuron", "feature")


@pytest.mark.parametrize("what", KINDS)
@given(num_units=st.integers(2, 20_000))
def test_blocks_suit_the_device_and_leave_a_choice(what: str, num_units: int) -> None:
    """Claim: a block is a power of two, one of at least eight, at most what the device wants, and coarser on a GPU."""
    on_cpu, on_gpu = (block_size(num_units, what, device) for device in ("cpu", "cuda"))
    assert {on_cpu.bit_count(), on_gpu.bit_count()} == {1}
    assert on_cpu <= on_gpu <= 64 and on_cpu <= (16 if what == "channel" else 8)
    assert on_cpu == 1 or num_units // on_cpu >= 8
    assert on_gpu in (1, on_cpu) or num_units // on_gpu >= 16
    assert block_size(num_units, "head", "cuda") == 1


def test_the_device_of_a_model_is_that_of_most_weights() -> None:
    """Claim: few weights elsewhere, or none at all, don't matter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40, device="meta"))
    assert device_type_of(model) == "meta"
    assert device_type_of(nn.ReLU()) == "cpu"


def test_groups_have_the_blocks_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: `find_groups` asks for the blocks of the model's own device."""
    monkeypatch.setattr("setpoint.groups.build.device_type_of", lambda model: "cuda")
    model = nn.Sequential(nn.Linear(4, 1024), nn.ReLU(), nn.Linear(1024, 2))
    (group,) = setpoint.find_groups(model, (torch.zeros(1, 4),))
    assert (group.multiple_of, group.min_units) == (64, 64)


def test_a_run_goes_on_where_blocks_are_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Claim: a run that a CPU began meets its budget on a GPU, in the blocks of that."""

    def started() -> tuple[setpoint.Loop, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loop = setpoint.attach(
            model, optimizer, 0.5, example=(torch.zeros(4, 8),), total_steps=60, verify=False,
            controller=setpoint.PricedController(),
        )  # fmt: skip
        return loop, model, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    loop, model, optimizer = started()
    train(model, optimizer, 10)
    between = dict(loop.widths)
    assert between["2"] < 512
    setpoint.save_run(tmp_path / "run", loop=loop, model=model, optimizer=optimizer)
    loop.detach()
    monkeypatch.setattr("setpoint.groups.build.device_type_of", lambda model: "cuda")
    loop, model, optimizer = started()
    setpoint.load_run(tmp_path / "run", loop=loop, model=model, optimizer=optimizer)
    assert loop.widths == between
    train(model, optimizer, 50)
    summary = loop.finish()
    assert summary.budget_met and loop.widths["0"] % 64 == loop.widths["2"] % 32 == 0
