"""Torch-Pruning: what it cuts runs its own forward, attention with one layer for queries, keys and values too."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint_bench.counter import step_flops
from setpoint_bench.methods.torch_pruning import Criterion, TorchPruning, taken_apart
from setpoint_bench.networks import CharGPT
from setpoint_bench.recipe import Recipe
from setpoint_bench.simple_task import SimpleTask
from setpoint_bench.task import Dimension, Split

WIDTHS = {"layer1.heads": 4, "layer1.neurons": 48, "layer2.heads": 4, "layer2.neurons": 48}


class Characters:
    """Random characters."""

    num_train = None

    def example(self, batch: int) -> Tensor:
        """Tokens."""
        return torch.randint(11, (batch, 8), generator=torch.Generator().manual_seed(0))

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same tokens for ever, to be said once more."""
        while True:
            yield self.example(batch), self.example(batch)

    def split(self, split: Split) -> tuple[Tensor, Tensor]:
        return self.example(4), self.example(4)


class Gpts:
    """Small GPTs of two layers."""

    dimensions = {name: Dimension(width) for name, width in WIDTHS.items()}

    def build(self, widths: dict[str, int]) -> nn.Module:
        """One of them."""
        return CharGPT(widths, 11, 8, 16, 4)


TASK = SimpleTask("characters", Gpts(), Characters(), Recipe(steps=4, batch=4), metric="loss")


@pytest.mark.parametrize(("criterion", "even"), [("norm", True), ("taylor", False), ("taylor", True)])
@pytest.mark.parametrize("budget", [0.75, 0.4])
def test_cuts_attention(criterion: Criterion, even: bool, budget: float) -> None:
    """A GPT is cut to the budget by heads and neurons alone, trains on, and can be saved and loaded."""
    model = TASK.build(WIDTHS)
    dense = step_flops(model, TASK.example())
    optimizer, pruner = TorchPruning("cut", criterion, even).begin(TASK, model, budget, TASK.batches(0))
    assert pruner is not None
    outcome = pruner.finish()
    assert outcome.budget_met and 0.8 * budget <= step_flops(model, TASK.example()) / dense <= budget
    assert all(module.training for module in model.modules())
    assert outcome.widths != outcome.dense_widths == dict(zip(outcome.widths, (4, 48, 4, 48), strict=True))
    assert model.get_parameter("wte.weight").shape == (11, 16)
    assert model.get_parameter("wte.weight") is model.get_parameter("lm_head.weight")
    for inputs, targets in (next(TASK.batches(0)) for _ in range(2)):
        torch.autograd.backward(TASK.loss(model, inputs, targets))
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def test_taking_apart_changes_nothing() -> None:
    """With fused layers taken apart the model does what it did; put together again it is what it was."""
    model = TASK.build(WIDTHS)
    twin, x = copy.deepcopy(model), TASK.example()[0]
    groups = tuple(group for group in setpoint.find_groups(model, (x,)) if group.lossless)
    with taken_apart(model, groups) as heads:
        assert len(heads) == 6 and set(heads.values()) == {4}
        torch.testing.assert_close(model(x), twin(x))
    assert torch.equal(model(x), twin(x))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]
