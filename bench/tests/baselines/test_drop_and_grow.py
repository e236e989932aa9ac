"""SET and RigL: the density stays, the mask changes, and by how much follows the cosine."""

from __future__ import annotations

import pytest
import torch

from baselines.weights import counts, draw, masked, run, target
from setpoint_bench.baselines.drop_and_grow import DropAndGrow, Static
from setpoint_bench.baselines.rule import Sight
from setpoint_bench.baselines.schedule import cosine_fraction

RULES = {"set": DropAndGrow("random"), "rigl": DropAndGrow("gradient")}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@rules
def test_density_constant_and_mask_changes(rule: DropAndGrow) -> None:
    """Every update keeps the number of active weights of every tensor and exchanges at most the cosine's share."""
    history = run(rule, target(), 400)
    assert len(history) == 1 + len([step for step in range(1, 300) if step % 10 == 0])
    for (_, before), (step, after) in zip(history, history[1:], strict=False):
        assert counts(after) == counts(before) == target().counts
        share = cosine_fraction(step, 300, 0.3)
        for name, count in target().counts.items():
            # Less where weights that have just gone come in again.
            assert 0.5 * int(share * count) <= int((before[name] & ~after[name]).sum()) <= int(share * count)


@rules
def test_the_smallest_active_weights_go(rule: DropAndGrow) -> None:
    """Every weight that goes is among the smallest of the cosine's share."""
    goal, generator = target(), torch.Generator().manual_seed(0)
    before = rule.start(draw(), goal, generator)
    weights = masked(draw(1), before)
    after = rule.update(Sight(10, 400, weights, draw(2), before), goal, generator)
    for name, weight in weights.items():
        gone, sizes = before[name] & ~after[name], weight[before[name]].abs().sort().values
        count = int(cosine_fraction(10, 300, 0.3) * len(sizes))
        assert gone.any() and weight[gone].abs().max() <= sizes[count - 1]


def test_rigl_grows_by_gradient() -> None:
    """What comes in has the largest gradients among all weights that do not stay, those that have just gone too."""
    rule, goal, generator = RULES["rigl"], target(), torch.Generator().manual_seed(0)
    before = rule.start(draw(), goal, generator)
    gradients = draw(2)
    after = rule.update(Sight(10, 400, masked(draw(1), before), gradients, before), goal, generator)
    for name, gradient in gradients.items():
        grown, left_out = after[name] & ~before[name], ~after[name]
        assert grown.any() and gradient[grown].abs().min() >= gradient[left_out].abs().max()


def test_what_has_just_gone_may_come_in_again() -> None:
    """A weight among the smallest whose gradient is the largest stays in RigL's mask."""
    rule, goal, generator = RULES["rigl"], target(), torch.Generator().manual_seed(0)
    before = rule.start(draw(), goal, generator)
    weights, gradients = masked(draw(1), before), draw(2)
    place = weights["wide"].abs().masked_fill(~before["wide"], torch.inf).argmin()
    gradients["wide"].view(-1)[place] = 1e6
    after = rule.update(Sight(10, 400, weights, gradients, before), goal, generator)
    assert before["wide"].view(-1)[place] and after["wide"].view(-1)[place]


def test_set_grows_at_random() -> None:
    """SET does not look at gradients, and with another generator it grows other weights."""
    rule, goal = RULES["set"], target()
    before = rule.start(draw(), goal, torch.Generator().manual_seed(0))

    def update(gradient_seed: int, seed: int) -> list[int]:
        sight = Sight(10, 400, masked(draw(1), before), draw(gradient_seed), before)
        return rule.update(sight, goal, torch.Generator().manual_seed(seed))["wide"].flatten().nonzero().tolist()

    assert update(2, 0) == update(3, 0) != update(2, 1)
    assert not rule.dense_gradient and RULES["rigl"].dense_gradient


def test_static_never_changes() -> None:
    """A static mask has the target's counts and no update."""
    ((_, masks),) = run(Static(), target(), 400)
    assert counts(masks) == target().counts


def test_an_almost_full_mask_keeps_its_density() -> None:
    """Where fewer weights are inactive than the share asks for, some that have just gone come in again."""
    history = run(DropAndGrow("gradient", fraction=0.9), target(0.95), 80)
    assert len(history) > 2
    assert all(counts(masks) == target(0.95).counts for _, masks in history)


def test_a_period_that_is_set_holds_in_short_runs_too() -> None:
    """Without one, updates are 100 steps apart, or a fortieth of the run; one that is set is kept as it is."""

    def steps(rule: DropAndGrow, total: int) -> list[int]:
        return [step for step in range(total) if rule.due(step, total)]

    assert steps(DropAndGrow("random"), 8000)[:2] == [100, 200]
    assert steps(DropAndGrow("random"), 400)[:2] == [10, 20]
    assert steps(DropAndGrow("random", period=100), 400) == [100, 200]


@pytest.mark.parametrize("settings", [{"fraction": 0.0}, {"period": -1}, {"end": 1.5}])
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    """They are errors."""
    with pytest.raises(ValueError, match="drop and grow needs"):
        DropAndGrow("random", **settings)  # type: ignore[arg-type]
