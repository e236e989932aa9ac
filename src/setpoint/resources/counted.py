"""Counted copies: steps that are made on them to learn what widths cost, in steps of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol, final

from torch import Tensor

from setpoint.groups.group import Group
from setpoint.resources.tape import Trainee


class Narrowing(Trainee, Protocol):
    """A copy that can become narrower."""

    def narrow(self, groups: tuple[Group, ...], widths: Mapping[str, int]) -> tuple[Group, ...]:
        """Cut its groups to these widths; gives the groups at them."""


Make = Callable[..., AbstractContextManager[Narrowing]]
"""Called with widths by group and `data`, False for a copy whose tensors have no memory; gives that copy."""
Share = Callable[[Mapping[str, int]], float]
"""FLOPs of a step at these widths / those of a step of the dense model."""


@final
class Tally:
    """Counts the steps of copies; copies without memory compute nothing and are left out."""

    def __init__(self) -> None:
        self.steps = 0.0

    def over(self, make: Make, share: Share, *, begun: int) -> Make:
        """What makes the same copies, counted.

        Args:
            make: makes them.
            share: of one of their steps.
            begun: steps that a copy has made when it is given out.
        """
        return partial(self._counting, make, share, begun)

    @contextmanager
    def _counting(
        self, make: Make, share: Share, begun: int, widths: Mapping[str, int], **settings: Any
    ) -> Iterator[Narrowing]:
        with make(widths, **settings) as copy:
            counted = _Counted(copy, widths, self if settings.get("data", True) else Tally(), share)
            counted.count(begun)
            yield counted

    def add(self, steps: float) -> None:
        """Further steps of the dense model."""
        self.steps += steps


class _Counted:
    """A copy with its widths."""

    def __init__(self, copy: Narrowing, widths: Mapping[str, int], tally: Tally, share: Share) -> None:
        self._copy, self._widths, self._tally, self._share = copy, dict(widths), tally, share

    def count(self, steps: int) -> None:
        self._tally.add(steps * self._share(self._widths))

    def step(self) -> None:
        self._copy.step()
        self.count(1)

    def held(self) -> Sequence[Tensor]:
        return self._copy.held()

    def narrow(self, groups: tuple[Group, ...], widths: Mapping[str, int]) -> tuple[Group, ...]:
        left = self._copy.narrow(groups, widths)
        self._widths |= widths
        return left
