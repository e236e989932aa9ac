"""State-space models in the whole loop: found, ranked, balanced, cut, saved."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from pypi_s5 import S5Classifier
from setpoint.errors import StateSpaceError
from setpoint.groups.group import Group
from setpoint.groups.trace import trace
from setpoint_bench.models import LRU, SequenceClassifier


def _states(model: nn.Module) -> tuple[Group, ...]:
    groups = setpoint.find_groups(model, (torch.randn(16, 12, 1),))
    return tuple(group for group in groups if group.kind == "state")


def _attach(model: nn.Module, optimizer: torch.optim.Optimizer, budget: Any, total_steps: int) -> setpoint.Loop:
    example = (torch.randn(16, 12, 1),)
    return setpoint.attach(model, optimizer, budget, example=example, total_steps=total_steps, groups=_states(model))


def _run(model: nn.Module, budget: Any, steps: int = 60) -> tuple[setpoint.Loop, list[float]]:
    """A run that lands, and its losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with _attach(model, optimizer, budget, steps) as loop:
        losses = _train(model, loop, optimizer, steps)
    assert loop.summary is not None and loop.summary.budget_met
    return loop, losses


def _train(model: nn.Module, loop: setpoint.Loop, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of the steps."""
    generator, losses = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        x = torch.randn(16, 12, 1, generator=generator)
        target = (x.sum((1, 2)) > 0).long() + (x[:, 0, 0] > 0.8).long()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        loop.observe(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("resource", "fraction"), [("flops", 0.4), ("params", 0.5)])
def test_states_are_pruned_to_a_budget(resource: str, fraction: float, tmp_path: Path) -> None:
    """attach() with a plain budget balances and drops states, lands, and the cut model survives a checkpoint."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, num_channels=4, num_states=20, num_blocks=2)
    loop, _ = _run(model, setpoint.Budget.fraction(fraction, of=resource))
    assert loop.summary.spent[resource] <= loop.summary.limit[resource]
    widths = loop.widths
    assert widths == {f"blocks.{n}.lru": model.blocks[n].lru.nu_log.shape[0] for n in (0, 1)}
    assert sum(widths.values()) < 40
    for name, origin in loop.origin.items():
        assert origin.tolist() == list(range(widths[name]))  # ranks: the least are dropped first
    setpoint.save(model, tmp_path / "small.safetensors")
    again = setpoint.load(
        tmp_path / "small.safetensors", into=SequenceClassifier(1, 3, num_channels=4, num_states=20, num_blocks=2)
    )
    x = torch.randn(3, 12, 1)
    assert torch.equal(again(x), model(x))


def test_the_loss_right_after_each_truncation_is_recorded() -> None:
    """Each cut's entry holds the loss of the step before and of the step after it; the summary holds the final one."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, num_channels=4, num_states=16)
    loop, losses = _run(model, 0.5)
    assert loop.summary.final_loss == pytest.approx(losses[-1])
    cuts = [entry for entry in loop.ledger if entry.dropped]
    assert len(cuts) >= 2 and loop.ledger[-1] is cuts[-1] and loop.budget_met
    for entry in loop.ledger:
        assert entry.loss == pytest.approx(losses[entry.step - 1])
        assert entry.loss_after == (pytest.approx(losses[entry.step]) if entry.dropped else None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("theta_log", torch.nan, r"blocks.0.lru.*NaN"),
        ("nu_log", -60.0, r"blocks.0.lru.*not stable: 1 of 8"),
    ],
)
def test_an_unstable_layer_is_refused(name: str, value: float, message: str) -> None:
    """A layer whose eigenvalues are no numbers, or on the unit circle, is refused by name; nothing is changed."""
    model = SequenceClassifier(1, 3, num_channels=4, num_states=8)
    with torch.no_grad():
        getattr(model.blocks[0].lru, name)[3] = value
    before, optimizer = copy.deepcopy(model.state_dict()), torch.optim.AdamW(model.parameters())
    with pytest.raises(StateSpaceError, match=message):
        setpoint.attach(model, optimizer, 0.7, example=(torch.randn(2, 12, 1),), total_steps=10, verify=False)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_states_that_become_unstable_are_left_alone() -> None:
    """In mid-run: no decision is made while the layer is unstable, the ledger says why; once it is sound, it is cut."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, num_channels=4, num_states=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with _attach(model, optimizer, setpoint.Budget.fraction(0.5, of="params"), 60) as loop:
        place = model.blocks[0].lru.nu_log
        sound = place.detach()[3].clone()
        for step in range(60):
            with torch.no_grad():
                place[3 if len(place) > 3 else 0] = -60.0 if step < 30 else sound
            _train(model, loop, optimizer, 1)
            assert loop.widths["blocks.0.lru"] == 16 or step >= 30
    refused = [entry for entry in loop.ledger if entry.step <= 30]
    assert refused and all("no decision: the reading holds NaN" in entry.reason for entry in refused)
    assert loop.summary is not None and loop.summary.budget_met


class _Shared(nn.Module):
    """Two recurrences with one B."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = LRU(4, 8), LRU(4, 8), nn.Linear(4, 3)
        self.encoder = nn.Linear(1, 4)
        self.two.B_re = self.one.B_re

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        logits: Tensor = self.head((self.one(hidden) + self.two(hidden)).mean(1))
        return logits


def test_shared_states_are_units() -> None:
    """States that two layers share are dropped as they are, and the group says so."""
    groups = setpoint.find_groups(_Shared(), (torch.randn(2, 12, 1),))
    (shared,) = (group for group in groups if group.num_units == 8)
    assert shared.kind == "unit" and "shared by one and two: states are dropped without balancing" in shared.notes[0]


def test_a_foreign_layer_joins_by_three_methods() -> None:
    """PyPI's S5, whose forward tracing cannot follow, is balanced and pruned by parameters."""
    torch.manual_seed(0)
    model = S5Classifier()
    found = trace(model, (torch.randn(16, 12, 1),))
    (group,) = (each for each in found.groups if each.kind == "state")
    assert (group.name, group.num_units, group.lossless) == ("layer", 12, True)
    loop, _ = _run(model, "60% params", 40)
    assert loop.widths["layer"] < 12
    assert model.layer.s5.seq.C.shape == (4, loop.widths["layer"])


def test_a_layer_that_tells_too_little_stays_whole() -> None:
    """Where neither tracing nor the layer names all tensors of a state, the reason is recorded by name."""

    class Silent(S5Classifier):
        def __init__(self) -> None:
            super().__init__()
            tell = self.layer.state_weights
            self.layer.state_weights = lambda: type(tell())(*(tell().inputs, tell().outputs, tell().input_scale))

    found = trace(Silent(), (torch.randn(2, 12, 1),))
    assert all(group.kind != "state" for group in found.groups)
    assert any(each.place == "layer" and "StateWeights.carried" in each.reason for each in found.frozen)


@pytest.mark.parametrize(
    ("inputs", "words"), [(("nowhere",), "'nowhere' .* not there"), (("nu_log", "B_im"), r"shape \(8,\)")]
)
def test_a_layer_that_tells_wrongly_is_refused(inputs: tuple[str, ...], words: str) -> None:
    """A layer whose B is not where it says, or has no entry for each state there, is refused by name."""
    model = SequenceClassifier(1, 3, num_channels=4, num_states=8)
    layer = model.blocks[0].lru
    tell = layer.state_weights
    layer.state_weights = lambda: replace(tell(), inputs=inputs)
    with pytest.raises(StateSpaceError, match=words):
        setpoint.find_groups(model, (torch.randn(2, 12, 1),))


_COMPILED = """
import numpy as np
import torch
import setpoint
from setpoint.states import BalancedPairs, balance
from setpoint_bench.models import SequenceClassifier
from states.systems import balance_and_shrink

torch.manual_seed(0)
torch._dynamo.config.force_parameter_static_shapes = False
model, x = SequenceClassifier(1, 3, num_channels=4, num_states=16), torch.randn(4, 12, 1)
groups = tuple(group for group in setpoint.find_groups(model, (x,)) if group.kind == "state")
compiled = []
fast = torch.compile(model, backend=lambda graph, inputs: compiled.append(graph) or graph)
for kept in (16, 12, 9, 5, 2):
    keep = {groups[0].name: np.arange(groups[0].num_units) < kept}
    basis = {groups[0].name: BalancedPairs(balance(model.blocks[0].lru.state_space()))}
    groups = balance_and_shrink(model, None, groups, keep, basis)
    torch.testing.assert_close(fast(x), model(x))
    print(len(compiled))
"""


def test_truncations_cost_no_recompilation() -> None:
    """With sizes of parameters free, a compiled model compiles once more at the first cut, and never again.

    In a process of its own, since the annotations that tests check cannot be compiled.
    """
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "2", "2", "2", "2"], done.stderr


def test_worth_goes_across_layers() -> None:
    """With a budget over two layers, one of which does nothing for the loss, that one gives its states."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, num_channels=4, num_states=16, num_blocks=2)
    with torch.no_grad():
        model.blocks[1].gated.weight.mul_(0.01)
        model.blocks[1].gated.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with _attach(model, optimizer, 0.6, 60) as loop:
        _train(model, loop, optimizer, 60)
    assert loop.widths["blocks.1.lru"] < loop.widths["blocks.0.lru"]
    assert np.isfinite(loop.price) and loop.price > 0
