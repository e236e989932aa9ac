"""Losses: what the user has observed of the loss, and what the last cut did to it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from setpoint.controller.trend import excess_after
from setpoint.ledger import Ledger

_MAX_FRESH = 4096  # losses that wait on their device before they are brought to the host at the latest


class Losses:
    """What the user has reported, and the steps of the last two changes of the model; what lies before is forgotten."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor | float | None] = {"loss": None, "val": None}
        self._fresh: list[tuple[int, Tensor]] = []
        self._steps = self._losses = np.zeros(0)
        self._changed = self._shared = 0
        self._cut: int | None = None

    @property
    def watching(self) -> bool:
        return bool(self._fresh) or len(self._steps) > 0

    @property
    def loss(self) -> float | None:
        return None if self._last["loss"] is None else float(self._last["loss"])

    @property
    def val(self) -> float | None:
        return None if self._last["val"] is None else float(self._last["val"])

    @property
    def _last_change(self) -> int:
        return self._changed if self._cut is None else self._cut

    def observe(self, step: int, loss: Tensor | float | None, val: Tensor | float | None, *, keep: bool) -> None:
        """Take in what is observed at a step, the coming one; ValueError for a tensor of several elements.

        `keep` says whether the loss is still watched; that of the first step after a change is kept anyway.
        """
        for name, value in (("loss", loss), ("val", val)):
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}: take its mean")
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(f"{name} is on the meta device and has no value: report one of a real device")
            if value is not None:
                # A copy: the user's loop may change it in place before it is read.
                self._last[name] = value.detach().clone() if isinstance(value, Tensor) else float(value)
        if loss is not None and (keep or self._first_after(step)):
            reported = self._last["loss"]
            dtype = None if isinstance(reported, Tensor) else torch.float64
            self._fresh.append((step, torch.as_tensor(reported, dtype=dtype).reshape(())))
            if len(self._fresh) >= _MAX_FRESH:
                self._gather()

    def _first_after(self, step: int) -> bool:
        last = self._fresh[-1][0] if self._fresh else int(self._steps[-1]) if len(self._steps) else 0
        return self._last_change > 0 and (last <= self._last_change or step == last == self._last_change + 1)

    def _gather(self) -> None:
        if not self._fresh:
            return
        steps, losses = zip(*self._fresh, strict=True)
        self._fresh = []
        values = torch.stack([loss.to(losses[0].device, torch.float64) for loss in losses]).cpu().numpy()
        self._steps = np.concatenate([self._steps, np.array(steps, dtype=np.float64)])
        self._losses = np.concatenate([self._losses, values])

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

    def known(self, step: int) -> dict[str, Any]:
        """Fields of a controller's observation, by name."""
        self._gather()
        excess = None
        if self._cut is not None and self.watching:
            excess = excess_after(self._steps, self._losses, changed=self._changed, cut=self._cut, now=step)
            excess = excess and replace(excess, cut=self._cut)
        return {"loss": self.loss if self.watching else None, "val": self.val, "excess": excess}

    def complete(self, ledger: Ledger) -> None:
        """Note what the last change of the model did to the loss, once that has been observed."""
        self._gather()
        after = self._steps > self._last_change
        if self._last_change and after.any():
            ledger.complete(float(self._losses[self._steps == self._steps[after].min()].mean()))

    # Of several ranks each is given losses of its own.

    def unshared(self, step: int) -> Float64[np.ndarray, " n"]:
        """What this rank alone was given up to a step, the same on all ranks: numbers whose mean `share` takes.

        The last loss and validation loss, each as value and 1, or 0 and 0 where there is none; then, of each step since
        the ranks last shared what they knew, the sum of its losses, and then how many those were.
        """
        self._gather()
        last = [(0.0, 0.0) if value is None else (float(value), 1.0) for value in self._last.values()]
        new = (self._steps > self._shared) & (self._steps <= step)
        at, length = self._steps[new].astype(np.int64) - self._shared - 1, step - self._shared
        sums, counts = np.bincount(at, self._losses[new], length), np.bincount(at, minlength=length)
        return np.concatenate([np.ravel(last), sums, counts]).astype(np.float64)

    def share(self, step: int, means: Float64[np.ndarray, " n"]) -> None:
        """Replace the losses up to this step by one mean over ranks for each; `means` are those of `unshared(step)`."""
        for name, (value, count) in zip(self._last, means[:4].reshape(2, 2), strict=True):
            if count:
                self._last[name] = float(value / count)
        sums, counts = np.split(means[4:], 2)
        observed = np.flatnonzero(counts)
        before, later = self._steps <= self._shared, self._steps > step
        steps = [self._steps[before], self._shared + 1.0 + observed, self._steps[later]]
        losses = [self._losses[before], sums[observed] / counts[observed], self._losses[later]]
        self._steps, self._losses, self._shared = np.concatenate(steps), np.concatenate(losses), step

    def state_dict(self) -> dict[str, Any]:
        self._gather()
        return {
            "loss": self.loss,
            "val": self.val,
            "steps": torch.from_numpy(self._steps.copy()),
            "losses": torch.from_numpy(self._losses.copy()),
            "changed": self._changed,
            "cut": self._cut,
            "shared": self._shared,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._losses = (state[name].cpu().double().numpy().copy() for name in ("steps", "losses"))
        self._last = {name: None if state[name] is None else float(state[name]) for name in ("loss", "val")}
        self._fresh = []
        self._changed, self._shared = int(state["changed"]), int(state["shared"])
        self._cut = None if state["cut"] is None else int(state["cut"])
