"""A family: models that differ in their widths alone, so that dense, small and pruned ones can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from setpoint_bench.task import Dimension

NUM_FACTORS = 1000


@runtime_checkable
class Family(Protocol):
    """The models of a task. A value: equal families have equal hashes."""

    def __hash__(self) -> int: ...

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """The free widths, by name."""
        ...

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        """A fresh model of these widths on PyTorch's default device, initialised from the global random state."""
        ...


@dataclass(frozen=True)
class ByFactor:
    """Models given by one number: the share of the dense widths, 1 for the dense model.

    Args:
        model: builds a model from that share, in steps of a thousandth.

    >>> family = ByFactor(lambda factor: nn.Linear(8, round(100 * factor)))
    >>> family.build({"width": 250})
    Linear(in_features=8, out_features=25, bias=True)
    """

    model: Callable[[float], nn.Module]

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        return {"width": Dimension(NUM_FACTORS)}

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        return self.model(widths["width"] / NUM_FACTORS)


@dataclass(frozen=True, eq=False)
class ByWidths:
    """Models given by a table of widths.

    Args:
        dimensions: dense width and block of each free width, by name.
        model: builds a model from a width for each name.

    >>> family = ByWidths({"hidden": Dimension(64, 8)}, lambda widths: nn.Linear(8, widths["hidden"]))
    >>> family.build({"hidden": 16})
    Linear(in_features=8, out_features=16, bias=True)
    """

    dimensions: Mapping[str, Dimension]
    model: Callable[[Mapping[str, int]], nn.Module]

    def build(self, widths: Mapping[str, int]) -> nn.Module:
        return self.model(widths)
