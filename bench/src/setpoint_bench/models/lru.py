"""The linear recurrent unit, a state-space layer that is stable by construction, and a classifier made of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.states import DiagonalSystem, StateWeights
from setpoint.states.scan import diagonal_scan

_MODULI = (0.9, 0.999)  # of the eigenvalues at the start
_LEAST_TURN = 1e-3  # angle of a real eigenvalue, as a fraction of its decay per step: log(0) would freeze it
_DECAY = (1e-12, 30.0)  # -log of the modulus: what its double logarithm can hold


class LRU(nn.Module):
    """Linear recurrent unit.

        x[t] = a * x[t-1] + gamma * (B u[t]),    y[t] = Re(C x[t]) + D * u[t]

    with complex states, `a = exp(-exp(nu_log) + i exp(theta_log))`, so that `|a| < 1` whatever the
    parameters are, and `gamma = exp(gamma_log)`, which starts at `sqrt(1 - |a|^2)`: states then have the
    variance of their input.

    It is a `StateSpaceLayer`: `find_groups` finds its states, and they are balanced before some go.

    Args:
        num_channels: channels of input and output.
        num_states: complex states.

    Raises:
        ValueError: for a size that is not positive.

    References:
        Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De: "Resurrecting Recurrent Neural Networks for Long
        Sequences", ICML 2023.

    >>> layer = LRU(num_channels=3, num_states=8)
    >>> layer(torch.randn(2, 10, 3)).shape
    torch.Size([2, 10, 3])
    """

    def __init__(self, num_channels: int, num_states: int) -> None:
        super().__init__()
        if num_channels < 1 or num_states < 1:
            raise ValueError(f"num_channels and num_states must be positive, got {num_channels} and {num_states}")
        # Uniform in the area of the ring.
        squares = _MODULI[1] ** 2 - torch.rand(num_states) * (_MODULI[1] ** 2 - _MODULI[0] ** 2)
        decay = (-0.5 * squares.log()).clamp_min(1e-6)
        self.nu_log = nn.Parameter(decay.log())
        self.theta_log = nn.Parameter((2 * math.pi * torch.rand(num_states)).clamp_min(1e-6).log())
        self.gamma_log = nn.Parameter(_normalisation(decay))
        self.B_re = nn.Parameter(torch.randn(num_states, num_channels) / math.sqrt(2 * num_channels))
        self.B_im = nn.Parameter(torch.randn(num_states, num_channels) / math.sqrt(2 * num_channels))
        self.C_re = nn.Parameter(torch.randn(num_channels, num_states) / math.sqrt(num_states))
        self.C_im = nn.Parameter(torch.randn(num_channels, num_states) / math.sqrt(num_states))
        self.D = nn.Parameter(torch.randn(num_channels))

    def forward(self, u: Float[Tensor, "batch steps channels"]) -> Float[Tensor, "batch steps channels"]:
        scale = self.gamma_log.exp().unsqueeze(-1)
        y = diagonal_scan(u, self._eigenvalues(), (self.B_re * scale, self.B_im * scale), (self.C_re, self.C_im))
        return y + self.D * u

    def _eigenvalues(self) -> tuple[Tensor, Tensor]:
        modulus, angle = torch.exp(-self.nu_log.exp()), self.theta_log.exp()
        return modulus * angle.cos(), modulus * angle.sin()

    @torch.no_grad()
    def state_space(self) -> DiagonalSystem:
        """The system as it is now, in double precision."""
        nu, theta, gamma = (each.double().exp() for each in (self.nu_log, self.theta_log, self.gamma_log))
        inputs = torch.complex(self.B_re.double(), self.B_im.double())
        outputs = torch.complex(self.C_re.double(), self.C_im.double())
        return DiagonalSystem(torch.polar(torch.exp(-nu), theta), gamma[:, None] * inputs, outputs)

    @torch.no_grad()
    def set_state_space(self, system: DiagonalSystem) -> None:
        """Take over a system with as many states; `gamma` starts again at `sqrt(1 - |a|^2)`.

        A mode below the real axis is replaced by its mirror image, whose real part is the same. An eigenvalue that is
        real and positive is turned by a thousandth of its decay, which changes the gain of its mode by a millionth.
        """
        below = system.eigenvalues.imag < 0
        values, inputs, outputs = (
            torch.where(mirror, part.conj(), part)
            for mirror, part in ((below, system.eigenvalues), (below[:, None], system.inputs), (below, system.outputs))
        )
        decay = (-values.abs().double().log()).clamp(*_DECAY)
        angle = torch.maximum(values.angle().double(), _LEAST_TURN * decay)
        gamma_log = _normalisation(decay)
        inputs = inputs / gamma_log.exp()[:, None]
        for parameter, value in (
            (self.nu_log, decay.log()),
            (self.theta_log, angle.log()),
            (self.gamma_log, gamma_log),
            (self.B_re, inputs.real),
            (self.B_im, inputs.imag),
            (self.C_re, outputs.real),
            (self.C_im, outputs.imag),
        ):
            parameter.copy_(value)

    def state_weights(self) -> StateWeights:
        """B and C are kept as real and imaginary parts, B without its normalisation."""
        scale = self.gamma_log.detach().double().exp()
        return StateWeights(("B_re", "B_im"), ("C_re", "C_im"), torch.complex(scale, torch.zeros_like(scale)))

    def extra_repr(self) -> str:
        return f"num_channels={self.D.shape[0]}, num_states={self.nu_log.shape[0]}"


def _normalisation(decay: Tensor) -> Tensor:
    """`log sqrt(1 - exp(-2 decay))`, exact for the slowest modes too."""
    return 0.5 * torch.log(-torch.expm1(-2.0 * decay))


class SequenceBlock(nn.Module):
    """`x + dropout(GLU(dropout(GELU(LRU(norm(x))))))`, where `GLU(h) = (W h) * sigmoid(V h)`.

    The norm is batch norm over samples and steps, without weights of its own.
    """

    def __init__(
        self,
        num_channels: int,
        num_states: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_channels, affine=False)
        self.lru = LRU(
            num_channels,
            num_states,
        )
        self.gated = nn.Linear(num_channels, num_channels)
        self.gate = nn.Linear(num_channels, num_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch steps channels"]) -> Float[Tensor, "batch steps channels"]:
        hidden = self.dropout(F.gelu(self.lru(self.norm(x.mT).mT)))
        gated: Tensor = self.dropout(self.gated(hidden) * torch.sigmoid(self.gate(hidden)))
        return x + gated


class SequenceClassifier(nn.Module):
    """Linear encoder, blocks, mean over time, linear head.

    >>> model = SequenceClassifier(num_inputs=1, num_classes=10, num_channels=8, num_states=16)
    >>> model(torch.randn(4, 196, 1)).shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        num_channels: int = 8,
        num_states: int = 256,
        num_blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_inputs, num_channels)
        self.blocks = nn.Sequential(
            *(
                SequenceBlock(
                    num_channels,
                    num_states,
                    dropout=dropout,
                )
                for _ in range(num_blocks)
            )
        )
        self.head = nn.Linear(num_channels, num_classes)

    def forward(self, x: Float[Tensor, "batch steps inputs"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.head(self.blocks(self.encoder(x)).mean(1))
        return logits
