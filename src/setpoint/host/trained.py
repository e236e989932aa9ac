"""Trained: weights that were frozen when a loop began have no price in it, and may be trained later."""

from __future__ import annotations

import weakref

from torch import nn

from setpoint.messages import warn


class Trained:
    """Warns once when weights of a model are trained that were frozen at first."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = [(name, weakref.ref(each)) for name, each in model.named_parameters() if not each.requires_grad]

    def check(self) -> None:
        """Look whether any of them is trained now."""
        found = [name for name, each in self._frozen if (weight := each()) is not None and weight.requires_grad]
        if not found:
            return
        self._frozen = []
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        warn(
            f"{', '.join(found[:3])}{more} are trained now, and were frozen when the loop began: FLOPs are counted as "
            "they were then, so a step takes more than the loop reports. Call loop.detach(), and attach again"
        )
