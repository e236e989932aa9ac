"""The S5 layer of PyPI's `s5-pytorch` as a user's own StateSpaceLayer: complex weights, zero-order hold."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.states import DiagonalSystem, StateWeights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a function, which torch calls deprecated
    from s5 import S5


class BalancedS5(nn.Module):
    """S5 with the three methods; its forward is the package's own."""

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.s5: Any = S5(channels, states)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.s5(x)
        return result

    def _hold(self) -> tuple[Tensor, Tensor, Tensor]:
        """Step, eigenvalue in discrete time, and what B is multiplied by."""
        seq = self.s5.seq
        step = seq.log_step.detach().exp()
        values = (seq.Lambda.detach() * step).exp()
        return step, values, (values - 1) / seq.Lambda.detach()

    def state_space(self) -> DiagonalSystem:
        _, values, scale = self._hold()
        inputs = torch.view_as_complex(self.s5.seq.B.detach())
        return DiagonalSystem(values, scale[:, None] * inputs, self.s5.seq.C.detach())

    @torch.no_grad()
    def set_state_space(self, system: DiagonalSystem) -> None:
        step = self.s5.seq.log_step.exp()
        self.s5.seq.Lambda.copy_(system.eigenvalues.log() / step)
        scale = self._hold()[2]
        self.s5.seq.B.copy_(torch.view_as_real(system.inputs.to(scale) / scale[:, None]))
        self.s5.seq.C.copy_(system.outputs)

    def state_weights(self) -> StateWeights:
        return StateWeights(("s5.seq.B",), ("s5.seq.C",), self._hold()[2], ("s5.seq.Lambda", "s5.seq.log_step"))


class S5Classifier(nn.Module):
    """One such layer between two linear ones."""

    def __init__(self, channels: int = 4, states: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, channels)
        self.layer = BalancedS5(channels, states)
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.encoder(x)).mean(1))
        return logits
