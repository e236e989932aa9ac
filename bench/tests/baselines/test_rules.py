"""Conformance of rules: every rule that masks single weights keeps the contract of the protocol."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from baselines.weights import SHAPES, counts, run, target
from setpoint_bench.baselines.drop_and_grow import DropAndGrow, Static
from setpoint_bench.baselines.magnitude import Gradual, OneShot
from setpoint_bench.baselines.rule import Rule

RULES: dict[str, Rule] = {
    "one-shot": OneShot(),
    "gradual": Gradual(),
    "gradual, late and coarse": Gradual(begin=0.3, end=1.0, num_updates=3),
    "static": Static(),
    "set": DropAndGrow("random"),
    "rigl": DropAndGrow("gradient"),
    "rigl, often and much": DropAndGrow("gradient", fraction=0.6, period=1),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@rules
@pytest.mark.parametrize("total_steps", [1, 2, 7, 200])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_ends_at_the_target(rule: Rule, total_steps: int, density: float) -> None:
    """However long the run, it ends with the target's number of active weights, and within the limit."""
    goal = target(density)
    last = counts(run(rule, goal, total_steps)[-1][1])
    assert sum(last.values()) == sum(goal.counts.values())
    assert sum(goal.cost[name] * count for name, count in last.items()) <= goal.limit


@rules
def test_masks_are_boolean_and_complete(rule: Rule) -> None:
    """At any time there is one boolean per element of every tensor."""
    for _, masks in run(rule, target(), 100):
        assert {name: tuple(mask.shape) for name, mask in masks.items()} == SHAPES
        assert all(mask.dtype == torch.bool for mask in masks.values())


@rules
def test_same_arguments_same_answer(rule: Rule) -> None:
    """Two runs from the same generator are equal, mask by mask."""
    for (step, one), (again, other) in zip(run(rule, target(), 100), run(rule, target(), 100), strict=True):
        assert step == again and all(torch.equal(one[name], other[name]) for name in one)


@rules
def test_is_a_rule(rule: Rule) -> None:
    """It has the methods of the protocol, and its settings are a value."""
    assert isinstance(rule, Rule) and rule.allocation in ("erk", "uniform")
    copy = dataclasses.replace(rule)  # type: ignore[type-var]
    assert copy == rule and hash(copy) == hash(rule)
