"""No runs: what takes the place of `Runs` in a run that no budget bounds as a whole."""

from __future__ import annotations

import math
from typing import Any


class NoRuns:
    """What takes the place of `Runs` where no budget is one of the whole run: no limits, nothing to plan or check."""

    metered = False

    def limit(self, *_: Any) -> dict[str, Any]:
        """Of no resource."""
        return {}

    spent = most = rest = limit

    def replan(self, *_: Any) -> None:
        """There is no plan."""

    read_joules = check = replan

    def spare_flops(self, *_: Any) -> float:
        """No limit."""
        return math.inf

    def length(self, total_steps: int, *_: Any) -> int:
        """The run is as long as it was said to be."""
        return total_steps

    planned, stepped, state_dict, load_state_dict = length, length, limit, replan

    def over(self, *_: Any) -> bool:
        """Never."""
        return False
