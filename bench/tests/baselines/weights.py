"""Weights, gradients and targets for rules, drawn from a fixed seed."""

from __future__ import annotations

import torch
from torch import Tensor

from setpoint_bench.baselines.rule import Masks, Rule, Sight, Target

SHAPES = {"conv": (8, 4, 3, 3), "wide": (40, 30), "narrow": (5, 8)}


def draw(seed: int = 0) -> dict[str, Tensor]:
    """Normal values of all shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def target(density: float = 0.2) -> Target:
    """The same density in all tensors, every weight of the same cost."""
    counts = {name: round(density * values.numel()) for name, values in draw().items()}
    return Target(counts, dict.fromkeys(SHAPES, 1.0), float(sum(counts.values())))


def masked(weights: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Weights with zeros where they are not active."""
    return {name: weights[name] * masks[name] for name in weights}


def run(rule: Rule, goal: Target, total_steps: int, seed: int = 0) -> list[tuple[int, Masks]]:
    """The masks at the start (step -1) and after each update, with new random weights and gradients at each step."""
    generator = torch.Generator().manual_seed(seed)
    masks = rule.start(draw(), goal, generator)
    history = [(-1, masks)]
    for step in range(total_steps):
        if rule.due(step, total_steps):
            weights, gradients = masked(draw(step + 1), masks), draw(1000 + step)
            masks = rule.update(Sight(step, total_steps, weights, gradients, masks), goal, generator)
            history.append((step, masks))
    return history


def counts(masks: Masks) -> dict[str, int]:
    """Active weights of each tensor."""
    return {name: int(mask.sum()) for name, mask in masks.items()}
