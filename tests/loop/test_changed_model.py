"""A model that somebody else changes in the middle of a run: a sentence, nothing is cut, and training can go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import setpoint
from setpoint.errors import LoopError


class Run:
    """A small network, its averaged copy, Adam, half of the FLOPs."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
        self.model = nn.Sequential(*layers, nn.Linear(16, 4))
        self.ema = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        half = setpoint.Budget.fraction(0.5, of="flops")
        options = {"example": (torch.zeros(4, 8),), "copies": [self.ema], "verify": False, **options}
        options = {"controller": setpoint.PricedController(), **options}
        self.loop = setpoint.attach(self.model, self.optimizer, half, total_steps=30, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(4, 8)).square().mean().backward()
        self.optimizer.step()

    def sizes(self) -> list[tuple[int, ...]]:
        """Of everything that training holds."""
        tensors: list[Tensor] = [*self.model.parameters(), *self.ema.parameters()]
        return [tuple(each.shape) for each in tensors] + [(each,) for each in self.loop.widths.values()]


def _exchange(run: Run, place: str, layer: Callable[[nn.Linear], nn.Module]) -> None:
    number = int(place)
    run.model[number] = layer(run.model[number])  # type: ignore[arg-type]


def _like(layer: nn.Linear) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features)


def _tie(run: Run) -> None:
    run.model[4].weight = run.model[2].weight  # type: ignore[union-attr, assignment]


def _other_copy(run: Run) -> None:
    run.ema[2] = nn.Linear(3, 3)  # type: ignore[operator, index]


CHANGES: dict[str, tuple[Callable[[Run], Any], str]] = {
    "weight_norm": (
        lambda run: parametrizations.weight_norm(run.model[2]),
        "no tensor '2.weight' any more",
    ),
    "pruned": (
        lambda run: prune.l1_unstructured(run.model[2], "weight", 0.5),  # type: ignore[no-untyped-call]
        "no tensor '2.weight' any more",
    ),
    "a layer taken out": (
        lambda run: _exchange(run, "2", lambda layer: nn.Identity()),
        "no tensor '2.weight' any more",
    ),
    "a layer exchanged": (lambda run: _exchange(run, "2", _like), "'2.weight' is another tensor"),
    "a copy changed": (_other_copy, r"copies\[0\] \(Sequential\) was changed: '2.weight' has shape \(3, 3\)"),
    "weights tied": (_tie, "'4.weight' is another tensor"),
}


@pytest.mark.parametrize(
    ("change", "after_a_cut"),
    [*((change, False) for change in CHANGES), ("weight_norm", True), ("pruned", True), ("a layer exchanged", True)],
)
def test_a_model_that_others_have_changed_is_not_cut(change: str, after_a_cut: bool) -> None:
    """Claim: whoever ties, normalises, masks, exchanges or takes out a layer, or changes a copy, is told so by the next
    decision or earlier, in a sentence; nothing was cut, and once the loop is detached training goes on.
    """
    function, words = CHANGES[change]
    run = Run()
    while run.loop.step < 2 or (after_a_cut and run.loop.widths == run.loop.dense_widths):
        run.step()
    function(run)
    sizes = run.sizes()
    with pytest.raises(LoopError, match=f"({words}).* since attach. Nothing was cut now; loop.detach"):
        while run.loop.step < 30:
            run.step()
    assert run.sizes() == sizes and run.loop.step < 30
    run.loop.detach()
    for _ in range(3):
        run.step()
    assert run.sizes() == sizes


def test_a_model_with_masks_that_others_have_changed() -> None:
    """Claim: so it is where single weights are masked."""
    run = Run(actuator=setpoint.Masking())
    function, words = CHANGES["pruned"]
    run.step()
    function(run)
    with pytest.raises(LoopError, match=words):
        while run.loop.step < 30:
            run.step()


def test_a_model_that_is_attached_is_not_shrunk_by_hand(tmp_path: Path) -> None:
    """Claim: shrink, and load into the model, say that it has a loop; nothing is changed, and the run goes on."""
    run = Run()
    setpoint.save(run.model, tmp_path / "model")
    group = run.loop.groups[0]
    keep = {group.name: np.arange(group.num_units) > 0}
    wrapped = nn.Sequential(run.model)
    for call in (
        lambda: setpoint.shrink(run.model, run.optimizer, run.loop.groups, keep),
        lambda: setpoint.load(tmp_path / "model", into=run.model),
        lambda: setpoint.load(tmp_path / "model", into=wrapped),
    ):
        with pytest.raises(LoopError, match=r"has a loop already: call finish\(\) or detach\(\)"):
            call()
    while run.loop.step < 30:
        run.step()
    assert run.loop.finish().budget_met
    setpoint.shrink(run.model, run.optimizer, run.loop.groups, {})
