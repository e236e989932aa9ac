"""FLOPs of one training step by weight tensor, so that a masked weight can be counted as if it cost nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from setpoint_bench.counter import step_flops

MASKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class WeightFlops:
    """What the products with each weight tensor cost in one training step, and the whole step.

    Args:
        total: FLOPs of the dense step, by the independent counter.
        step: by weight, FLOPs of its products, forward and backward.
        forward: by weight, FLOPs of the forward product; the weight's own gradient costs as much.
        sizes: by weight, its number of elements.
    """

    total: float
    step: Mapping[str, float]
    forward: Mapping[str, float]
    sizes: Mapping[str, int]

    def per_weight(self) -> dict[str, float]:
        """FLOPs of a step that one active weight of each tensor causes."""
        return {name: self.step[name] / self.sizes[name] for name in self.step}

    def fixed(self) -> float:
        """FLOPs of a step that no mask saves: attention's own products, and tensors that are never masked."""
        return self.total - sum(self.step.values())

    def at(self, counts: Mapping[str, int]) -> float:
        """FLOPs of a step with so many active weights: `fixed + sum over tensors of step * density`.

        The convention of the sparse-training literature (Evci et al., ICML 2020, appendix): forward, gradient of
        the input and gradient of the weights all use active weights only.
        """
        return self.fixed() + sum(self.step[name] * counts[name] / self.sizes[name] for name in self.step)

    def dense_gradients(self, counts: Mapping[str, int]) -> float:
        """FLOPs on top of `at` of a step that computes the gradients of all weights."""
        return sum(self.forward[name] * (1.0 - counts[name] / self.sizes[name]) for name in self.step)


def maskable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions that are trained and not shared with a layer of another kind."""
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, MASKABLE)
        for parameter in module.parameters(recurse=False)
    }
    owners = {f"{name}.weight".lstrip(".") for name, module in model.named_modules() if isinstance(module, MASKABLE)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in owners and parameter.requires_grad and id(parameter) not in others
    }


def weight_flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> WeightFlops:
    """Count a training step of the model on a copy without data, weight tensor by weight tensor.

    >>> import torch
    >>> flops = weight_flops(nn.Linear(3, 5), (torch.zeros(7, 3),))
    >>> flops.total, flops.at({"weight": 15}), flops.at({"weight": 3})  # no gradient of the input is needed
    (420, 420.0, 84.0)
    """
    weights = {id(parameter): name for name, parameter in maskable_weights(model).items()}
    names = {
        module: weights[id(layer.weight)]
        for module, layer in model.named_modules()
        if isinstance(layer, MASKABLE) and id(layer.weight) in weights
    }
    forward, step = dict.fromkeys(names.values(), 0.0), dict.fromkeys(names.values(), 0.0)
    for module, (flops, passes) in _forward(model, inputs, tuple(names)).items():
        forward[names[module]] += flops
        step[names[module]] += flops * passes
    sizes = {name: parameter.numel() for name, parameter in maskable_weights(model).items()}
    return WeightFlops(step_flops(model, inputs), step, forward, sizes)


def _forward(model: nn.Module, inputs: tuple[Tensor, ...], modules: tuple[str, ...]) -> dict[str, tuple[float, int]]:
    """By module, FLOPs of its forward pass, and how many such products a training step has."""
    twin = copy.deepcopy(model).to("meta").train()
    passes: dict[str, int] = {}

    def note(module: str, given: Tensor) -> None:
        passes[module] = 3 if given.requires_grad else 2

    handles = [
        twin.get_submodule(module).register_forward_pre_hook(lambda _, args, module=module: note(module, args[0]))
        for module in modules
    ]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        twin(*(value.to("meta") for value in inputs))
    for handle in handles:
        handle.remove()
    counts, root = counter.get_flop_counts(), type(twin).__name__
    found = {}
    for module in passes:
        by_op = counts.get(f"{root}.{module}" if module else root, {})
        found[module] = (float(sum(by_op.values())), passes[module])
    return found
