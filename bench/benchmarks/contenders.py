"""A contender: a library asked to halve a model that it has never seen, and the judge of what comes of it.

A contender finds what it can remove, removes half of it, and says how to zero the same entries in an uncut copy,
the masked twin. Everything is measured from the model itself, so the judge needs to know neither library.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD

from setpoint.actuator.verify import randomised_copy
from setpoint.groups.example import inputs_of, tensors_of
from setpoint.groups.untouched import computed
from setpoint_bench.coverage import TOLERANCE, Build, in_float64, output_errors, tied_names

REMOVED_SHARE = 0.05
"""Share of the parameters that must be gone for a model to count as cut."""


@dataclass(frozen=True)
class Outcome:
    """What became of one model; None where it was not got so far.

    Args:
        stage: where it ended: "done", or the demand that was not met (`build`, `discovery`, `cut`, `removed`,
            `training`, `shapes`), or `time`, `died`.
        reason: first line of the error, at most 300 characters.
        passed: the cut returned, removed something, and training forward and backward run with outputs as before.
        seconds: processor time of the discovery, on one thread.
        removed_share: share of the parameters that the cut removed.
        tied: whether tied parameters stayed tied; None for a model without.
        frozen: whether the parameter that was frozen before the cut, and cut, is still frozen.
        optimizer: whether an optimizer made before the cut holds exactly the parameters that are trained after it.
        exact: whether outputs in eval mode and float64 equal the masked twin's.
        error: largest relative difference from them.
        exact_reason: why that could not be measured.
    """

    stage: str = "build"
    reason: str = ""
    passed: bool = False
    seconds: float | None = None
    params: int | None = None
    removed_share: float | None = None
    tied: bool | None = None
    frozen: bool | None = None
    optimizer: bool | None = None
    exact: bool | None = None
    error: float | None = None
    exact_reason: str = ""


class Contender(Protocol):
    """A library at work on one model: made from the model, its example and its output layers (this is discovery)."""

    def to_freeze(self) -> nn.Parameter | None:
        """A parameter that will be cut."""

    def cut(self, optimizer: SGD) -> None:
        """Remove half of what was found."""

    def mask(self, twin: nn.Module) -> None:
        """Zero in an uncut copy what `cut` removed."""


Report = Callable[[dict[str, Any]], None]


def judge(library: Callable[..., Contender], build: Build, report: Report = lambda outcome: None) -> dict[str, Any]:
    """Let a library cut one model and measure what became of it.

    Args:
        library: the contender.
        build: makes the model and its example.
        report: called with the outcome so far, at every stage: what is known if the process is ended.
    """
    now = Outcome()
    try:
        for now in _stages(library, build):
            report(asdict(now))
    except Exception as error:  # noqa: BLE001 - whatever a foreign model does is an outcome
        now = replace(now, reason=_first_line(error))
    return asdict(now)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _stages(library: Callable[..., Contender], build: Build) -> Iterator[Outcome]:
    now = Outcome()
    yield now
    torch.manual_seed(0)
    model, example = build()
    model = randomised_copy(model, ())
    params = sum(p.numel() for p in model.parameters())
    shapes = _trained_shapes(model, example)
    ignored = output_layers(model, example)
    modes = {name: module.training for name, module in model.named_modules()}
    yield (now := replace(now, stage="discovery", params=params))
    start = time.process_time()
    contender = library(model, example, ignored)
    yield (now := replace(now, stage="cut", seconds=time.process_time() - start))
    frozen = contender.to_freeze()
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is frozen]
    if frozen is not None:
        frozen.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ties, twin = tied_names(model), copy.deepcopy(model, computed(model))
    contender.cut(optimizer)
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
    now = replace(now, stage="removed", **_kept(model, optimizer, names, ties))
    now = replace(now, removed_share=1 - sum(p.numel() for p in model.parameters()) / params)
    yield now
    if (now.removed_share or 0) < REMOVED_SHARE:
        raise ValueError(f"{now.removed_share:.2%} of the parameters removed")
    yield (now := replace(now, stage="training"))
    small = copy.deepcopy(model, computed(model))
    got = _trained_shapes(model, example)
    yield (now := replace(now, stage="shapes"))
    if got != shapes:
        raise ValueError(f"outputs of shapes {got} instead of {shapes}")
    yield (now := replace(now, stage="done", passed=True))
    try:
        contender.mask(twin)
        small, example = in_float64(small, example)
        error = max(output_errors(small, twin.double(), example, training=False), default=0.0)
        yield replace(now, exact=error <= TOLERANCE, error=error)
    except Exception as error:  # noqa: BLE001 - a measurement that cannot be made is said so
        yield replace(now, exact_reason=_first_line(error))


def _trained_shapes(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    """Run the model's own forward, and backward on a loss that sees every output; the shapes of the outputs."""
    torch.manual_seed(0)
    args, kwargs = inputs_of(example)
    outputs: list[Tensor] = list(tensors_of(model(*args, **kwargs)))
    losses = [(each * torch.randn_like(each)).mean() for each in outputs if each.requires_grad]
    torch.stack(losses).sum().backward()
    model.zero_grad(set_to_none=True)
    return [tuple(each.shape) for each in outputs]


def _kept(model: nn.Module, optimizer: SGD, frozen: list[str], ties: Mapping[str, int]) -> dict[str, bool | None]:
    """Whether ties, freezing and the optimizer's parameters are as before the cut; None where there was nothing."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    live = {id(p) for p in model.parameters() if p.requires_grad}
    return {
        "tied": tied_names(model) == ties if len(set(ties.values())) < len(ties) else None,
        "frozen": all(name in parameters and not parameters[name].requires_grad for name in frozen) if frozen else None,
        "optimizer": {id(p) for group in optimizer.param_groups for p in group["params"]} == live,
    }


_WIDE = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.Embedding, nn.MultiheadAttention)
"""Layers that set the width of their own output."""


def output_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers whose output reaches the model's output with no other such layer in between: their width must stay."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        made.update({each.grad_fn: module for each in tensors_of(output) if each.grad_fn is not None})

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, _WIDE)]
    args, kwargs = inputs_of(example)
    torch.manual_seed(0)
    reached = [each.grad_fn for each in tensors_of(model(*args, **kwargs)) if each.grad_fn is not None]
    for hook in hooks:
        hook.remove()
    found: dict[nn.Module, None] = {}
    seen: set[Any] = set()
    while reached:
        step = reached.pop()
        if step in made:
            found[made[step]] = None
        elif step not in seen:
            seen.add(step)
            reached += [source for source, _ in step.next_functions if source is not None]
    return list(found)
