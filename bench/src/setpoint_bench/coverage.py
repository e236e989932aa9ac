"""Coverage: does a model that Setpoint has never seen survive a cut, to the last digit?"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from setpoint.actuator.cut import Keep, plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import take
from setpoint.actuator.verify import randomised_copy
from setpoint.controller.selection import lowest_width
from setpoint.groups.example import inputs_of, tensors_of
from setpoint.groups.group import Group
from setpoint.groups.trace import trace
from setpoint.groups.untouched import computed
from setpoint.report.inspection import share_along

TOLERANCE = 1e-10
"""Largest difference from the masked twin, relative to the largest value of the tensor."""

FURTHER = 1e-6
"""The same after one more training step and further cuts: very narrow batch norms magnify what rounding did by then."""

SEED = 0
"""Of weights, examples, the units that go, and everything that a forward draws."""

Build = Callable[[], tuple[nn.Module, Any]]
"""Makes a model and an example for it."""


@dataclass(frozen=True)
class Verdict:
    """Whether one model passed, and what was found in it.

    Args:
        model: its name.
        passed: whether every demand was met.
        reason: the first demand that was not; empty if all were.
        seconds: duration of the discovery (`trace`), on as many threads as the process has.
        num_groups: groups that may be pruned.
        num_units: units in them.
        params: parameters of the model.
        prunable_params_share: share of the parameters that lie along a unit of these groups.
        prunable_outside_embeddings: the same among parameters that are not tables of an embedding.
        error: largest relative difference from the masked twin.
    """

    model: str
    passed: bool
    reason: str
    seconds: float = math.nan
    num_groups: int = 0
    num_units: int = 0
    params: int = 0
    prunable_params_share: float = 0.0
    prunable_outside_embeddings: float = 0.0
    error: float = math.nan


class _Failed(Exception):
    """A demand that was not met."""


def check(name: str, build: Build) -> Verdict:
    """Find a model's groups, drop half the units of every lossless one, and hold the rest against its masked twin.

    The demands: there are groups; the model's own training forward and backward run after the cut; the optimizer
    holds exactly the live parameters and its next step moves every one of them; tied parameters stay tied, frozen
    ones frozen; train mode and hooks are as before; and in float64, with randomised weights, the outputs,
    the gradients and the weights after a further step equal the masked twin's. So do, to `FURTHER`, the outputs after
    that step and further cuts: in the other of train and eval mode, with the largest group alone at its fewest units,
    and with all of them there.
    """
    facts: dict[str, Any] = {}
    try:
        torch.manual_seed(SEED)
        model, example = build()
        facts["params"] = sum(p.numel() for p in model.parameters())
        start = time.process_time()
        found = trace(model, example)
        facts["seconds"] = time.process_time() - start
        groups = tuple(group for group in found.groups if group.lossless)
        facts["num_groups"], facts["num_units"] = len(groups), sum(group.num_units for group in groups)
        if not groups:
            whole = [f"{group.name}: {group.notes[0]}" for group in found.groups if group.notes]
            whole += [f"{frozen.place}: {frozen.reason}" for frozen in found.frozen]
            raise _Failed("no lossless group; " + "; ".join(whole[:3]))
        facts["prunable_params_share"] = share_along(model, groups)
        facts["prunable_outside_embeddings"] = share_along(model, groups, embeddings=False)
        facts["error"] = _twin_error(model, example, groups, halves(groups))
        if not facts["error"] <= TOLERANCE:
            raise _Failed(f"differs from its masked twin by {facts['error']:.2g}")
    except _Failed as failure:
        return Verdict(name, False, str(failure), **facts)
    except Exception as error:  # noqa: BLE001 - whatever a foreign model does is a failure to report
        lines = str(error).strip().splitlines()
        return Verdict(name, False, f"{type(error).__name__}: {lines[0] if lines else ''}"[:400], **facts)
    return Verdict(name, True, "", **facts)


def halves(groups: tuple[Group, ...]) -> dict[str, np.ndarray]:
    """Half the units of every group, chosen at random, the same at every call."""
    generator = np.random.default_rng(SEED)
    keep = {}
    for group in groups:
        block = group.multiple_of if group.only_blocks else 1
        kept = np.zeros(group.num_units, dtype=bool)
        kept[generator.permutation(group.num_units)[: max(1, group.num_units // 2 // block) * block]] = True
        keep[group.name] = kept
    return keep


def _twin_error(model: nn.Module, example: Any, groups: tuple[Group, ...], keep: Keep) -> float:
    """Largest relative difference between the cut model and its masked twin, over one more training step.

    What further cuts add counts by its share of `FURTHER`.
    """
    small, example = in_float64(randomised_copy(model, groups), example)
    _without_chance(small)
    frozen = _freeze_one(small, groups)
    optimizer = _optimizer(small)
    _step(small, optimizer, example)
    masked, twin_optimizer = copy.deepcopy((small, optimizer), computed(small))
    calls: list[int] = []
    small.register_forward_hook(lambda *_: calls.append(1))
    ties, modes = tied_names(small), {name: module.training for name, module in small.named_modules()}
    cut = shrink(small, optimizer, groups, keep)
    _check_kept(small, optimizer, frozen, ties, modes)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    got = _step(small, optimizer, example)
    if not calls:
        raise _Failed("a forward hook was lost")
    mask(masked, twin_optimizer, groups, keep)
    want = _step(masked, twin_optimizer, example)
    mask(masked, twin_optimizer, groups, keep)
    dims = plan_cut(groups, keep).dims()
    errors = [_difference(a, b, "an output") for a, b in zip(want.outputs, got.outputs, strict=True)]
    for name, gradient in want.gradients.items():
        part = take(gradient, dims.get(name, {}))
        if not part.numel():
            continue
        if name not in got.gradients:
            raise _Failed(f"{name} has no gradient after the cut")
        errors.append(_difference(part, got.gradients[name], f"the gradient of {name}"))
    for name, parameter in masked.named_parameters():
        errors.append(_difference(take(parameter, dims.get(name, {})), small.get_parameter(name), name))
    for name, parameter in small.named_parameters():
        if name in got.gradients and parameter.numel() and torch.equal(parameter, before[name]):
            raise _Failed(f"the optimizer's step did not move {name}")
    further = _further_errors((small, optimizer), (masked, twin_optimizer), groups, cut, keep, example)
    return max([*errors, *(error * TOLERANCE / FURTHER for error in further)])


def _further_errors(
    small: tuple[nn.Module, SGD],
    masked: tuple[nn.Module, SGD],
    groups: tuple[Group, ...],
    live: tuple[Group, ...],
    keep: Keep,
    example: Any,
) -> list[float]:
    """Differences between a cut model and its masked twin in the other mode, and after further cuts of both.

    `small` and `masked` come with their optimizers; `keep` is what they were cut to, in units of `groups`, those of the
    masked one; `live` are those of the small one.
    """
    errors = output_errors(small[0], masked[0], example, not small[0].training)
    for further, mode in _further_cuts(groups, keep):
        now = {name: kept[keep[name]] for name, kept in further.items()}
        live, keep = shrink(*small, live, now), further
        mask(*masked, groups, keep)
        errors += output_errors(small[0], masked[0], example, small[0].training is (mode == "same"))
    return errors


def _further_cuts(groups: tuple[Group, ...], keep: Keep) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """Choices within a choice, and how to compare after each: in the same mode or the other one."""
    largest = max(groups, key=lambda group: group.num_units)
    least = {group.name: _first(keep[group.name], max(1, lowest_width(group))) for group in groups}
    yield {**keep, largest.name: least[largest.name]}, "same"
    yield least, "other"


def _first(kept: np.ndarray, num: int) -> np.ndarray:
    """The first units of a choice, or all of them."""
    chosen = np.zeros_like(kept)
    chosen[np.flatnonzero(kept)[:num]] = True
    return chosen


def output_errors(small: nn.Module, masked: nn.Module, example: Any, training: bool) -> list[float]:
    """Differences of the outputs without gradients, in train or eval mode; the models' modes stay."""
    outputs = []
    for model in (small, masked):
        modes = {module: module.training for module in model.modules()}
        model.train(training)
        with torch.no_grad():
            outputs.append(_outputs(model, example))
        for module, mode in modes.items():
            module.training = mode
    what = f"an output in {'train' if training else 'eval'} mode"
    return [_difference(want, got, what) for got, want in zip(*outputs, strict=True)]


def _difference(want: Tensor, got: Tensor, what: str) -> float:
    if want.shape != got.shape:
        raise _Failed(f"{what} has shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    if not want.numel():
        return 0.0
    if not bool(torch.isfinite(want).all()):
        raise _Failed(f"{what} is not finite")
    want, got = want.detach(), got.detach()
    return float((want - got).abs().max() / max(float(want.abs().max()), 1e-3))


@dataclass(frozen=True, eq=False)
class _Step:
    outputs: list[Tensor]
    gradients: Mapping[str, Tensor]


def _step(model: nn.Module, optimizer: SGD, example: Any) -> _Step:
    """One training step on a loss that sees every output, from fixed random numbers."""
    outputs = _outputs(model, example)
    generator = torch.Generator().manual_seed(SEED)
    parts = [(each * torch.randn(each.shape, generator=generator)).mean() for each in outputs if each.requires_grad]
    optimizer.zero_grad()
    torch.autograd.backward(torch.stack([part.double() for part in parts]).sum())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return _Step([each.detach().clone() for each in outputs], gradients)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(SEED)
    args, kwargs = inputs_of(example)
    with Float64Throughout():
        return [each for each in tensors_of(model(*args, **kwargs)) if each.is_floating_point()]


class Float64Throughout(TorchFunctionMode):
    """Casts to float32 that a forward writes out (in a norm, a softmax) go to float64 instead.

    They round at 6e-8, and a sum in them over fewer units rounds otherwise: that would hide whether a cut is exact.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The same call with float64 for float32."""

        def wide(leaf: Any) -> Any:
            return torch.float64 if leaf is torch.float32 else leaf

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


def _optimizer(model: nn.Module) -> SGD:
    """Decay moves every weight, whatever its gradient; and steps stay in proportion to gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return SGD(trained, lr=1e-2, momentum=0.9, weight_decay=1e-2)


def _freeze_one(model: nn.Module, groups: tuple[Group, ...]) -> str:
    """Freeze one weight that will be cut; its name."""
    name = groups[-1].slices[0].tensor
    tensor = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if tensor is not None and sum(p.requires_grad for p in model.parameters()) > 1:
        tensor.requires_grad_(False)
    return name


def tied_names(model: nn.Module) -> dict[str, int]:
    """By name, which tensor stands there: the position of its first name."""
    first: dict[int, int] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(p), position) for position, (name, p) in enumerate(names)}


def _check_kept(
    model: nn.Module, optimizer: SGD, frozen: str, ties: Mapping[str, int], modes: Mapping[str, bool]
) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    live = {id(p) for p in model.parameters() if p.requires_grad}
    if held != live:
        raise _Failed("the optimizer does not hold exactly the live parameters")
    if tied_names(model) != ties:
        raise _Failed("tied parameters came apart")
    tensor = dict(model.named_parameters(remove_duplicate=False)).get(frozen)
    if tensor is not None and tensor.requires_grad and len(live) > 1:
        raise _Failed(f"{frozen} was frozen and is trained now")
    if {name: module.training for name, module in model.named_modules()} != modes:
        raise _Failed("train or eval mode changed")


def in_float64(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    def wide(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return model.double(), tree_map(wide, example)


def _without_chance(model: nn.Module) -> None:
    """No dropout of any kind: every probability that a module keeps under a name for it is 0."""
    for module in model.modules():
        kind = type(module).__name__
        for attribute, value in vars(module).items():
            named = "drop" in attribute or (attribute == "p" and ("Drop" in kind or "StochasticDepth" in kind))
            if named and type(value) is float:
                setattr(module, attribute, 0.0)
