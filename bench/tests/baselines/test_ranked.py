"""Ranked cuts: blocks go by their scores over all groups, or over all of a kind, and the limit is met."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from controller.plants import chain, lognormal, observe, run
from setpoint.groups.group import Group, widths_of
from setpoint.sensor.reading import Reading
from setpoint_bench.baselines.ranked import ranked_plan
from setpoint_bench.baselines.scheduled import Ranking, ScheduledController

GROUPS, COST = chain(32, 64, 48)
DENSE = COST.total(widths_of(GROUPS))


def kept(groups: tuple[Group, ...], saliency: dict[str, np.ndarray], *, by_kind: bool) -> dict[str, np.ndarray]:
    """Which units stay at half of the cost."""
    reading = Reading(50, saliency, 1, calibrated=False)
    seen = observe(groups, COST, limit=0.5 * DENSE, dense=DENSE, reading=reading, step=50, total_steps=100)
    plan = ranked_plan(seen, COST, groups, 0.5 * DENSE, "test", by_kind=by_kind)
    assert plan.budget_met
    widths = {name: int(each.sum()) for name, each in plan.keep.items()}
    assert 0.97 * 0.5 * DENSE <= COST.total(widths) <= 0.5 * DENSE
    return dict(plan.keep)


def test_all_groups_are_ranked_together() -> None:
    """Claim: no unit that stays has a lower score than one that goes, but for the last ones, which fill the budget."""
    saliency = lognormal(GROUPS)
    stay = kept(GROUPS, saliency, by_kind=False)
    scores = np.concatenate([saliency[name] for name in stay])
    stays = np.concatenate(list(stay.values()))
    highest_gone, lowest_kept = np.sort(scores[~stays]), np.sort(scores[stays])
    assert (highest_gone[:-3] <= lowest_kept[3]).all()


def test_kinds_keep_the_same_density() -> None:
    """Claim: neurons whose scores are all below those of heads lose the same share of their units as these."""
    what = ("head", "neuron", "neuron")
    groups = tuple(replace(group, what=kind) for group, kind in zip(GROUPS, what, strict=True))
    saliency = lognormal(groups)
    saliency["layer0"] = saliency["layer0"] + 1e3
    stay = kept(groups, saliency, by_kind=True)
    heads, neurons = stay["layer0"].mean(), np.concatenate([stay["layer1"], stay["layer2"]]).mean()
    assert heads == pytest.approx(neurons, abs=0.06)
    assert kept(groups, saliency, by_kind=False)["layer0"].all()


@pytest.mark.parametrize("ranking", ["kind", "all"])
@pytest.mark.parametrize("blocks", [1, 8])
def test_lands_within_the_limit(ranking: Ranking, blocks: int) -> None:
    """Claim: along the whole schedule each cut ends within its target, and the last one within the limit."""
    groups, cost = chain(32, 64, 48, multiple_of=blocks)
    for fraction in (0.2, 0.5, 0.9):
        controller = ScheduledController(ranking=ranking)
        decisions = run(controller, groups, cost, lognormal(groups), fraction=fraction, total_steps=400)
        assert all(each.predicted <= each.reference for each in decisions)
        assert decisions[-1].plan.budget_met
        assert decisions[-1].predicted <= fraction * cost.total(widths_of(groups))


def test_ranking_is_one_of_three() -> None:
    """Claim: another word is refused by name."""
    with pytest.raises(ValueError, match="ranking is one of group, kind, all, got 'some'"):
        ScheduledController(ranking="some")  # type: ignore[arg-type]
