"""A watch over the observed loss: what the last cut did to it, and whether that goes too far."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from setpoint.controller.trend import Excess, excess_after

_SIGNIFICANT = 4.0
"""Standard errors by which the loss must lie above its trend to have left it."""
_NOTABLE = 0.10
"""And by this share of what the trend foretold, at least: every cut costs a little."""


class LossWatch:
    """The losses that the user has told, and the steps of the last two changes of the model.

    Losses stay on their device until a decision is made; what lies before the change before last is forgotten.
    """

    def __init__(self) -> None:
        self._fresh: list[tuple[int, Tensor]] = []
        self._steps = np.zeros(0)
        self._losses = np.zeros(0)
        self._changed = 0
        self._cut: int | None = None
        self.gave_way = ""

    @property
    def watching(self) -> bool:
        """Whether any loss has been observed."""
        return bool(self._fresh) or len(self._steps) > 0

    def observe(self, step: int, loss: Tensor | float) -> None:
        """A loss was observed after so many optimizer steps."""
        value = loss.detach().clone() if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64)
        self._fresh.append((step, value.reshape(())))

    def changed(self, step: int, *, cut: bool) -> None:
        """The model was changed after this step: by a cut, which is to be watched, or by units that came back."""
        if self._cut is not None:
            self._changed = self._cut
        if cut:
            self._cut = step
        else:
            self._changed, self._cut = step, None
        recent = self._steps > self._changed
        self._steps, self._losses = self._steps[recent], self._losses[recent]

    def excess(self, now: int) -> Excess | None:
        """How far the loss lies above the trend that it had before the last cut, if enough is known."""
        if self._fresh:
            steps, losses = zip(*self._fresh, strict=True)
            self._fresh = []
            values = torch.stack([each.to(losses[0].device, torch.float64) for each in losses]).cpu().numpy()
            self._steps = np.concatenate([self._steps, np.array(steps, dtype=np.float64)])
            self._losses = np.concatenate([self._losses, values])
        if self._cut is None:
            return None
        return excess_after(self._steps, self._losses, changed=self._changed, cut=self._cut, now=now)


def left_trend(excess: Excess | None) -> bool:
    """Whether the loss has left its trend: significantly, and by more than cuts cost as a rule.

    >>> left_trend(Excess(0.5, error=0.1, foretold=2.0)), left_trend(Excess(0.1, error=0.01, foretold=2.0))
    (True, False)
    """
    if excess is None:
        return False
    return excess.value > max(_SIGNIFICANT * excess.error, _NOTABLE * abs(excess.foretold))
