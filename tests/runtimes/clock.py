"""A runtime for tests, whose seconds follow from the shapes of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from setpoint.errors import RuntimeUnavailable
from setpoint.runtimes import Forward


@dataclass
class Clock:
    """A runtime whose seconds follow from the shapes of the model by a law of its own, on a machine of any speed."""

    name = "clock"
    law: Callable[[nn.Module], float]
    speed: Callable[[int], float] = lambda number: 1.0  # by the number of the forward
    fails_after: int = 10**6  # loads
    error: Exception = field(default_factory=lambda: RuntimeUnavailable("clock lacks the op Relu"))
    batches: list[int] = field(default_factory=list)
    loads: int = 0
    forwards: int = 0

    def load(self, model: nn.Module, example: Any) -> Forward:
        self.loads += 1
        if self.loads > self.fails_after:
            raise self.error
        self.batches.append(len(example[0]))
        assert not any(module.training for module in model.modules())
        seconds = self.law(model)

        def forward() -> float:
            self.forwards += 1
            return seconds * self.speed(self.forwards)

        return forward

    def __deepcopy__(self, memo: Any) -> Clock:
        return self


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def straight(model: nn.Module) -> float:
    """A constant part of a tenth of the dense model's, and FLOPs."""
    return 1e-3 + 1e-7 * sum(module.weight.numel() for module in linears(model))
