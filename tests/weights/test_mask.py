"""Weight masks: a masked weight stays exactly zero, whatever the optimizer remembers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from setpoint.weights.masking import mask_gradients, mask_weights

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_masked_weights_stay_zero(make: object) -> None:
    """After dense steps and a mask, ten more steps leave every masked weight and its moments at exactly zero."""
    model = nn.Linear(6, 5)
    optimizer: Optimizer = make(model.parameters())  # type: ignore[operator]
    mask = torch.rand(5, 6) < 0.5

    def step(masked: bool) -> None:
        model(torch.randn(8, 6)).square().mean().backward()
        if masked:
            mask_gradients({"weight": model.weight}, {"weight": mask})
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step(masked=False)
    before = model.weight.detach().clone()
    mask_weights({"weight": model.weight}, optimizer, {"weight": mask})
    assert torch.equal(model.weight, before * mask)
    for _ in range(10):
        step(masked=True)
        moments = [value for value in optimizer.state[model.weight].values() if torch.is_tensor(value) and value.dim()]
        assert moments and all(not each[~mask].any() for each in (model.weight.detach(), *moments))
    assert (model.weight[mask] != before[mask]).all()
