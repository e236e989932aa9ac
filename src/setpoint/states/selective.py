"""The selective sensor: states of Mamba and Mamba-2 ranked by the Gramians of their averaged dynamics."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.groups.example import Example, inputs_of
from setpoint.groups.group import Group
from setpoint.groups.states import selective_kind, selective_layer
from setpoint.groups.untouched import in_mode
from setpoint.sensor.reading import Reading, Sensor, Traits


@dataclass(frozen=True, eq=False)
class SelectiveState:
    """The model whose live layers are read, and the steps so far."""

    model: nn.Module = field(metadata={"live": True})
    num_steps: int = 0


class SelectiveSensor(Sensor[SelectiveState]):
    """Saliency of the states of selective layers, from one pass over a calibration batch.

    State n of channel c obeys `h[t] = exp(d[t,c] A[c,n]) h[t-1] + d[t,c] B[t,n] u[t,c]` and is read by
    `C[t,n]`; step size d, B and C depend on the input, so there is no transfer function, no Hankel operator, and
    no balanced basis that a rotation could be folded into. With averages over all tokens of the batch,

        a[c,n] = mean exp(d A),    P[c,n] = mean (d B u)^2 / (1 - a^2),    Q[c,n] = mean C^2 / (1 - a^2)

    are the Gramians of the averaged, diagonal system, one mode at a time, and the saliency of state n is
    `sum over c of P[c,n] Q[c,n]`, a sum of squared Hankel values. It serves to *select* states. The error bound of
    balanced truncation does not apply, and saliencies of different layers cannot be compared
    (`Reading.calibrated` is False), so that all groups are cut to the same density.

    A reading runs the model once, in evaluation mode and without gradients. Its time counts as the decision's;
    its FLOPs are not in the account.

    Args:
        example: the calibration batch: a tuple of positional, or a mapping of keyword inputs of the model.

    References:
        Gu, Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. Dao, Gu: "Transformers are
        SSMs", ICML 2024.
    """

    traits = Traits(calibrated=False, in_loss=False)

    def __init__(self, example: Example) -> None:
        self.example = example

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        return tuple(group for group in groups if selective_layer(model, group) is not None)

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> SelectiveState:
        return SelectiveState(model)

    def update(
        self, state: SelectiveState, groups: tuple[Group, ...], model: nn.Module, grad_scale: Tensor | None = None
    ) -> SelectiveState:
        return SelectiveState(model, state.num_steps + 1)

    @torch.no_grad()
    def read(self, state: SelectiveState, groups: tuple[Group, ...], step: int) -> Reading:
        layers = {}
        for group in groups:
            if (found := selective_layer(state.model, group)) is not None:
                layers[group.name] = state.model.get_submodule(found[0])
        inputs: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[module] = args[0] if args else kwargs["hidden_states"]

        args, kwargs = inputs_of(self.example)
        with in_mode(state.model, training=False), ExitStack() as afterwards:
            for layer in layers.values():
                afterwards.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            state.model(*args, **kwargs)
        saliency = {name: _energies(layer, inputs[layer]).double().cpu().numpy() for name, layer in layers.items()}
        return Reading(step, saliency, num_samples=1, calibrated=False, num_steps=state.num_steps)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What the states of some channels are driven by at each token of the batch."""

    u: Tensor  # what the channels carry, shape (tokens, channels)
    steps: Tensor  # step sizes d, of the same shape
    inputs: Tensor  # B, shape (tokens, states)
    outputs: Tensor  # C, of the same shape
    rates: Tensor  # A, negative, shape (channels, states), or (channels, 1) where all states of a channel decay alike

    def energies(self) -> Float[Tensor, " states"]:
        """Sum over channels of the squared Hankel values of the averaged modes."""
        decay = torch.stack([torch.exp(self.steps * rate).mean(0) for rate in self.rates.unbind(1)], 1)
        # A state that never forgets would have no finite Gramian.
        room = (1.0 - decay.square()).clamp_min(1e-12)
        reached = (self.steps * self.u).square().mT @ self.inputs.square() / len(self.u) / room
        found: Tensor = (reached * self.outputs.square().mean(0) / room).sum(0)
        return found


def _energies(layer: Any, hidden: Float[Tensor, "batch steps features"]) -> Float[Tensor, " states"]:
    """Energies of all states of a layer that is given `hidden`."""
    if selective_kind(layer) == "mamba":
        return _mamba(layer, hidden).energies()
    return torch.cat([part.energies() for part in _mamba2(layer, hidden)])


def _convolved(layer: Any, x: Tensor) -> Tensor:
    """The causal convolution over time and its activation; shape (tokens, channels)."""
    weight = layer.conv1d.weight
    convolved = F.conv1d(x.mT, weight, layer.conv1d.bias, padding=weight.shape[2] - 1, groups=len(weight))
    kept = (getattr(layer, name, None) for name in ("act", "activation_fn", "activation"))
    activation: Any = next(filter(callable, kept), F.silu)  # a layer without one calls SiLU itself, as the papers say
    found: Tensor = activation(convolved[..., : x.shape[1]]).mT
    return found


def _mamba(layer: Any, hidden: Tensor) -> _Tokens:
    """Mamba: B, C and a low-rank step size are read off the convolved channels."""
    u = _convolved(layer, layer.in_proj(hidden).chunk(2, -1)[0]).flatten(0, 1)
    rank, states = layer.dt_proj.weight.shape[1], layer.A_log.shape[1]
    low, inputs, outputs = layer.x_proj(u).split([rank, states, states], -1)
    return _Tokens(u, F.softplus(layer.dt_proj(low)), inputs, outputs, -torch.exp(layer.A_log.float()))


def _mamba2(layer: Any, hidden: Tensor) -> list[_Tokens]:
    """Mamba-2: heads of several channels share a step size and a rate, groups of heads share B and C."""
    heads, inner, mixed = layer.A_log.shape[0], layer.out_proj.weight.shape[1], layer.conv1d.weight.shape[0]
    _, xbc, low = layer.in_proj(hidden).split([inner, mixed, heads], -1)
    half = (mixed - inner) // 2
    u, inputs, outputs = torch.split(_convolved(layer, xbc).flatten(0, 1), [inner, half, half], -1)
    # The names are those of Transformers, and of the authors' own code.
    limits = getattr(layer, "time_step_limit", getattr(layer, "dt_limit", (0.0, float("inf"))))
    steps = F.softplus(low.flatten(0, 1) + layer.dt_bias).clamp(*limits)
    each, count = inner // heads, getattr(layer, "n_groups", getattr(layer, "ngroups", 1))
    by_token = [values.chunk(count, 1) for values in (u, steps.repeat_interleave(each, 1), inputs, outputs)]
    rates = (-torch.exp(layer.A_log.float())).repeat_interleave(each)[:, None].chunk(count, 0)
    return [_Tokens(*part) for part in zip(*by_token, rates, strict=True)]
