"""What the benchmarks of predicted costs share: models in training, and random widths that cuts can reach."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import setpoint
from setpoint.controller.ladder import lowest_width
from setpoint.groups.group import Group
from setpoint_bench.networks import CharGPT, PlainNet


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in training, and the groups of it that may be pruned."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    example: tuple[Any, ...]
    groups: tuple[Group, ...]


def cnn() -> tuple[nn.Module, torch.optim.Optimizer, tuple[Any, ...]]:
    """The CIFAR-10 task's network in channels-last layout, 64 images a step."""
    widths = {f"conv{i}": width for i, width in enumerate((32, 128, 128, 256, 256, 256), start=1)}
    model = PlainNet(widths, frozenset({1, 3, 5}), channels=3, classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, optimizer, (torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last),)


def gpt() -> tuple[nn.Module, torch.optim.Optimizer, tuple[Any, ...]]:
    """The Shakespeare task's network, 16 windows of 64 characters a step."""
    widths = {f"layer{i}.{part}": num for i in range(1, 5) for part, num in (("heads", 6), ("neurons", 1536))}
    model = CharGPT(widths, 65, 64, 384, 64)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), (torch.randint(65, (16, 64)),)


def lru() -> tuple[nn.Module, torch.optim.Optimizer, tuple[Any, ...]]:
    """A sequence classifier of linear recurrent units, 16 sequences of 196 steps."""
    from setpoint_bench.models.classifier import SequenceClassifier

    model = SequenceClassifier(num_inputs=1, num_classes=10, num_channels=64, num_states=64, num_blocks=2)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), (torch.randn(16, 196, 1),)


BUILDS: dict[str, Callable[[], tuple[nn.Module, torch.optim.Optimizer, tuple[Any, ...]]]] = {"cnn": cnn, "gpt": gpt}
if importlib.util.find_spec("setpoint_bench.models"):
    BUILDS["lru"] = lru


def subject_named(name: str) -> Subject:
    """A model of the list, traced."""
    torch.manual_seed(0)
    model, optimizer, example = BUILDS[name]()
    return Subject(model, optimizer, example, setpoint.find_groups(model, example))


def random_widths(groups: tuple[Group, ...], count: int, seed: int) -> list[Mapping[str, int]]:
    """The dense widths, and random ones that whole blocks reach."""
    generator = np.random.default_rng(seed)
    reachable = {
        g.name: [
            g.num_units,
            *range((g.num_units - 1) // g.multiple_of * g.multiple_of, lowest_width(g) - 1, -g.multiple_of),
        ]
        for g in groups
    }
    drawn = [{name: int(generator.choice(widths)) for name, widths in reachable.items()} for _ in range(count)]
    return [{g.name: g.num_units for g in groups}, *drawn]
