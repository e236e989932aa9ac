"""Weight groups: single weights of linear layers and convolutions as units, free or in N:M patterns, and their cost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, final

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.cost.cost import ProductCost, Term
from setpoint.distributed import check_module
from setpoint.errors import GroupError
from setpoint.groups.group import Group, Size, Slice, widths_of
from setpoint.groups.trace import Trace

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose weights can be units

Array = TypeVar("Array", Tensor, np.ndarray)


@final
@dataclass(frozen=True)
class Pattern:
    """N:M: of every `block` (M) neighbours along dim 1, which a product sums over, at least `kept` (N) weights stay.

    Blocks of one weight, of which none need stay, are no pattern: weights go one by one.
    """

    kept: int = 0
    block: int = 1

    @classmethod
    def named(cls, name: str) -> Pattern:
        """The pattern of a name: "unstructured", or "N:M" with 0 < N < M, such as "2:4"; else GroupError."""
        if name == "unstructured":
            return cls()
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", str(name))
        if found is None or int(found[1]) >= int(found[2]):
            raise GroupError(
                f"unknown pattern {name!r}: use 'unstructured', or 'N:M' with 0 < N < M, such as '2:4' "
                "(of every 4 neighbouring inputs 2 weights stay)"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return "unstructured" if self.free else f"{self.kept}:{self.block}"

    @property
    def free(self) -> bool:
        return self.block == 1

    @property
    def stride(self) -> int:
        """Weights that every block loses at a time: as many as lead from dense to the pattern in equal strides."""
        # Equal strides, so that no decision leaves blocks with different numbers of weights.
        return math.gcd(self.block - self.kept, self.block)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[1] % self.block == 0

    def blocks(self, values: Array) -> Array:
        """A view of contiguous values of the weight's shape, in which the weights of a block lie along the last dim."""
        shape = (values.shape[0], values.shape[1] // self.block, self.block, math.prod(values.shape[2:]))
        if isinstance(values, Tensor):
            return values.view(shape).movedim(2, -1)
        return np.moveaxis(values.reshape(shape), 2, -1)


def find_weights(model: nn.Module, pattern: str = "unstructured") -> tuple[Group, ...]:
    """The weights of linear layers and convolutions, each tensor a group whose units are its single weights.

    Left out are tensors that are not trained, are shared with a layer of another kind (a tied embedding), or do not
    divide into the pattern's blocks. Biases, norms and embeddings are never among them.

    Raises:
        GroupError: for a pattern that is neither "unstructured" nor "N:M".

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> [(group.name, group.num_units, group.what) for group in find_weights(net, "2:4")]
    [('2.weight', 576, 'weight')]
    """
    form = Pattern.named(pattern)
    weights = maskable(model)
    return tuple(_group(name, weight, form) for name, weight in weights.items() if form.fits(tuple(weight.shape)))


def maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the trained weights of linear layers and convolutions that no layer of another kind shares."""
    check_module(model)
    kinds = [module for module in model.modules() if not isinstance(module, LAYERS)]
    # A tied embedding looks rows up: a mask for its linear layer would hit those, too.
    others = {id(parameter) for module in kinds for parameter in module.parameters(recurse=False)}
    owned = {id(module.weight) for module in model.modules() if isinstance(module, LAYERS)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in owned and id(parameter) not in others and parameter.requires_grad
    }


def chosen(model: nn.Module, pattern: Pattern, wanted: Sequence[Group] | None) -> tuple[Group, ...]:
    """The wanted ones of `find_weights(model, pattern)`; None asks for all, which must fit the pattern."""
    fitting = find_weights(model, str(pattern))
    if wanted is None:
        misfits = [f"{n} {tuple(w.shape)}" for n, w in maskable(model).items() if not pattern.fits(tuple(w.shape))]
        if misfits:
            raise GroupError(
                f"the pattern {pattern} needs a number of inputs (dim 1) that {pattern.block} divides, which "
                f"{len(misfits)} weights do not have: {', '.join(misfits[:5])}. Leave them dense with "
                f"groups=setpoint.find_weights(model, {str(pattern)!r})"
            )
        return fitting
    # The sizes tell a group of one pattern from one of another.
    known = {(group.name, group.min_units, group.multiple_of) for group in fitting}
    for group in wanted:
        if (group.name, group.min_units, group.multiple_of) not in known:
            raise GroupError(
                f"group {group.name!r} is none of find_weights(model, {str(pattern)!r}): with actuator=Masking(...), "
                "give groups out of that list"
            )
    names = {group.name for group in wanted}
    return tuple(group for group in fitting if group.name in names)


def _group(name: str, weight: nn.Parameter, pattern: Pattern) -> Group:
    size = weight.numel()
    # Half of the memory, for tensors of up to two billion weights.
    index = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)
    least, step = (1, 1) if pattern.free else (size * n // pattern.block for n in (pattern.kept, pattern.stride))
    slices = (Slice(name, None, "consume", index),)
    return Group(name, "weight", size, slices, min_units=least, multiple_of=step, what="weight")


def with_active(group: Group, active: Bool[np.ndarray, " elements"]) -> Group:
    (place,) = group.slices
    index = np.full(active.size, -1, dtype=place.index.dtype)
    count = int(active.sum())
    index[active] = np.arange(count, dtype=index.dtype)
    return replace(group, num_units=count, slices=(replace(place, index=index),))


def active_of(group: Group) -> Bool[np.ndarray, " elements"]:
    (place,) = group.slices
    active: Bool[np.ndarray, " elements"] = place.index >= 0
    return active


def as_mask(group: Group, weight: Tensor) -> Bool[Tensor, "..."]:
    """The active units of a weight group as a mask of the weight's shape, on its device."""
    return torch.from_numpy(active_of(group)).to(weight.device).view(weight.shape)


@dataclass(frozen=True, eq=False)
class WeightFlops:
    """FLOPs of one dense training step, in all (`total`) and by weight tensor."""

    total: float
    step: Mapping[str, float]  # of a weight's products forward and backward
    forward: Mapping[str, float]  # of its forward product; the gradient of the weight costs as much
    sizes: Mapping[str, int]  # its number of elements

    def cost(self) -> ProductCost:
        """Theoretical FLOPs of a step by numbers of active weights: `fixed + sum of step * active / size`.

        All three products of a weight use active weights only, as in "Rigging the Lottery" (ICML 2020), appendix.
        """
        fixed = Term(self.total - sum(self.step.values()), ())
        terms = (Term(flops / self.sizes[name], (_active(name),)) for name, flops in self.step.items())
        return ProductCost("flops", (fixed, *terms))

    def dense_gradients(self, widths: Mapping[str, int]) -> float:
        """FLOPs on top of a step that also computes the gradients of weights that are not active."""
        return sum(flops * (1.0 - widths[name] / self.sizes[name]) for name, flops in self.forward.items())


def weight_flops(model: nn.Module, found: Trace, groups: tuple[Group, ...]) -> WeightFlops:
    """FLOPs of the products with each weight tensor, at dense widths; what else is done with a weight is fixed."""
    sizes, dense = widths_of(groups), widths_of(found.groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owner = {
        name: names.get(id(module.weight))
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LAYERS)
    }
    total, step, forward = 0.0, dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
    for product in found.contractions:
        flops = product.at(dense)
        total += flops * product.times
        if (name := owner.get(product.module)) in sizes:
            forward[name] += flops
            step[name] += flops * product.times
    return WeightFlops(total, step, forward, sizes)


def active_params(model: nn.Module, groups: tuple[Group, ...]) -> ProductCost:
    """Parameters that are not masked, as a function of the numbers of active weights."""
    fixed = sum(parameter.numel() for parameter in model.parameters()) - sum(widths_of(groups).values())
    terms = (Term(1.0, (_active(group.name),)) for group in groups)
    return ProductCost("params", (Term(float(fixed), ()), *terms))


def _active(name: str) -> Size:
    return Size(0, ((name, 1),))
