"""What units are ranked by under a budget of FLOPs: predicted time, by FLOPs and by elements that are moved."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import setpoint
from controller.plants import observe
from groups.zoo import DepthwiseCNN, images
from setpoint.controller.landing import free_ladders
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.selection import Selection, descend, start
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost
from setpoint.cost.params import params_cost
from setpoint.cost.price import Price
from setpoint.cost.ranking import FLOPS_PER_ELEMENT, ranking_of
from setpoint.groups.group import widths_of
from setpoint.groups.kept import random_keep
from setpoint.groups.trace import repeated, trace
from setpoint.sensor.reading import Reading

SETTLED = 300


class Attention(nn.Module):
    """Four heads of a fused attention over residual width 16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], 16))


def test_a_group_saves_its_flops_and_its_elements() -> None:
    """Claim: the ranking is `c * (FLOPs + 200 * elements)`, in closed form; at the present widths it is the FLOPs."""
    batch, hidden = 16, 8
    found = trace(nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2)), (torch.zeros(batch, 4),))
    cost = flops_cost(found)

    def flops(width: int) -> float:
        return 2 * batch * width * (2 * 4 + 3 * 2)  # the input needs no gradient

    def both(width: int) -> float:
        return flops(width) + FLOPS_PER_ELEMENT * batch * (width + width + 2)  # linear, relu, output

    scale = flops(hidden) / both(hidden)
    for width in range(1, hidden + 1):
        assert cost.total({"0": width}) == flops(width)
        assert ranking_of(cost).total({"0": width}) == pytest.approx(scale * both(width))


def test_views_move_nothing_and_attention_makes_its_weights() -> None:
    """Claim: of a fused attention, projections, two tensors of weights, a copy and results count; no view does."""
    found = trace(Attention(), (torch.zeros(2, 5, 16),))
    made = sum(
        each.coefficient * np.prod([size.at(widths_of(found.groups)) for size in each.sizes])
        for each in found.activations
    )
    tokens = 2 * 5
    mixed, copied = 16 * tokens, 0  # `reshape` may copy; as an op it says that it is a view
    assert made == 48 * tokens + 2 * (2 * 4 * 5 * 5) + mixed + copied + 16 * tokens


def test_expanded_channels_of_depthwise_convolutions_are_dear() -> None:
    """Claim: beside the channels that a block hands on, expanded ones save more of the ranking than of the FLOPs."""
    found = trace(DepthwiseCNN(), images())
    cost, widths = flops_cost(found), widths_of(found.groups)
    expanded, handed_on = (
        next(group for group in found.groups if group.name.startswith(name)) for name in ("expand", "stem")
    )

    def dearer(name: str) -> float:
        units = widths[name] // 2
        return ranking_of(cost).saving(widths, name, units) / cost.saving(widths, name, units)

    assert dearer(expanded.name) > dearer(handed_on.name)


@pytest.mark.parametrize("seed", range(3))
def test_the_widths_found_meet_the_budget_in_flops(seed: int) -> None:
    """Claim: whatever units are ranked by, the descent ends when the FLOPs are at the target, not before."""
    found = trace(DepthwiseCNN(), images())
    cost, widths = flops_cost(found), widths_of(found.groups)
    rng = np.random.default_rng(seed)
    saliency = {group.name: rng.random(group.num_units) for group in found.groups}
    target = 0.6 * cost.total(widths)
    selection = start(cost, free_ladders(widths, found.groups, saliency, {}), widths, "worth")
    descend(selection, target)
    assert selection.total == pytest.approx(cost.total(selection.widths)) and selection.total <= target
    name, rung = next((name, rung) for name, rung in selection.rungs.items() if rung)
    assert selection.worth[name][rung - 1] <= selection.highest
    assert _given_back(selection, cost) > target


def _given_back(selection: Selection, cost: Cost) -> float:
    """FLOPs with the block that was taken last, the one of the highest worth, back in its place."""
    last = max(
        (name for name, rung in selection.rungs.items() if rung),
        key=lambda name: float(selection.worth[name][selection.rungs[name] - 1]),
    )
    selection.move(last, -1)
    return cost.total(selection.widths)


def test_accumulation_leaves_the_ranking_of_groups_as_it_is() -> None:
    """Claim: four passes a step cost four times as much of FLOPs and of the ranking, so no order changes."""
    found = trace(DepthwiseCNN(), images())
    once, often = flops_cost(found), flops_cost(repeated(found, 4))
    widths = widths_of(found.groups)
    for group in found.groups:
        saved = ranking_of(once).saving(widths, group.name, 2)
        assert ranking_of(often).saving(widths, group.name, 2) == pytest.approx(4 * saved)


def test_a_cut_model_ranks_as_it_was_predicted() -> None:
    """Claim: traced afresh after a cut, groups save in the proportions that the trace before it foretold."""
    model = DepthwiseCNN()
    found = trace(model, images())
    cut = copy.deepcopy(model)
    groups = setpoint.shrink(cut, None, found.groups, random_keep(found.groups, 0))
    foretold, seen = ranking_of(flops_cost(found)), ranking_of(flops_cost(trace(cut, images())))
    widths = widths_of(groups)
    factors = [seen.saving(widths, each.name, 1) / foretold.saving(widths, each.name, 1) for each in groups]
    assert factors == pytest.approx([factors[0]] * len(factors))


def test_parameters_rank_by_themselves() -> None:
    """Claim: a budget of parameters ranks by parameters."""
    model = DepthwiseCNN()
    cost = params_cost(model, trace(model, images()).groups)
    assert ranking_of(cost) is cost


def test_a_price_of_flops_is_one_of_flops() -> None:
    """Claim: under `Price` a block's worth is its saliency per FLOP, whatever its activations take."""
    found = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(16, 4),))
    cost = flops_cost(found)
    dense = cost.total({"0": 8})
    reading = Reading(SETTLED, {"0": np.ones(8)}, 16, calibrated=True)
    seen = observe(found.groups, cost, limit=math.inf, dense=dense, reading=reading, step=SETTLED, total_steps=1000)
    _, plan = PenaltyController(Price(20.0, of="flops")).decide(None, seen, cost, found.groups)
    saved = cost.saving({"0": 8}, "0", found.groups[0].multiple_of)
    assert np.nanmin(plan.worth["0"]) == pytest.approx(found.groups[0].multiple_of / saved)
