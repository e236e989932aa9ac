"""Opaque calls: modules whose forward cannot be followed return what they returned at the example, and are frozen."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import ExportError
from setpoint.groups.example import Example, computed, inputs_of, mapped, tensors_of, with_tensors
from setpoint.groups.follow_data import DRAWS, Draws
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.walk import Value, Walk, rule

CALL = "setpoint::opaque_call"
"""The op that stands in a graph for each tensor that an opaque call returns."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A call of a module, with inputs."""

    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Staging:
    """What of a model is followed: by default one call of the whole, on the example.

    Args:
        scenes: calls that are followed: the model's, and those that opaque modules make of their parts.
        results: by name of an opaque module, what its calls return.
        reasons: by name of an opaque module, why it is not followed.
        draw: what a single random number is answered with, since it may decide whether a layer is skipped.
        by_data: whether values of tensors may decide on the path, as they do at the example.
    """

    scenes: tuple[Scene, ...]
    results: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    draw: float | None = None
    by_data: bool = False

    @classmethod
    def whole(cls, example: Example) -> Staging:
        """The whole model."""
        return cls((Scene("", *inputs_of(example)),))

    @property
    def tensors(self) -> list[Tensor]:
        """All inputs of the scenes, and what opaque calls return."""
        return list({id(tensor): tensor for tensor in tensors_of([self._objects])}.values())

    @property
    def _objects(self) -> Any:
        return [(scene.args, dict(scene.kwargs)) for scene in self.scenes], dict(self.results)

    def with_tensors(self, tensors: Mapping[int, Any]) -> Staging:
        """The same with other tensors, by id of these."""
        inputs, results = with_tensors(self._objects, tensors)
        scenes = tuple(Scene(each.module, *given) for each, given in zip(self.scenes, inputs, strict=True))
        return replace(self, scenes=scenes, results=results)

    def play(self, model: nn.Module) -> Iterator[Tensor]:
        """Tensors that the scenes return, of a model whose opaque calls return their results."""
        with nullcontext() if self.draw is None else Draws(self.draw):
            for name in self.results:
                module = model.get_submodule(name)
                read = self._read(model, name)
                if name:
                    module.__dict__["forward"] = _Recorded(name, read, self.results[name])
                if read:  # said once more, for modules that no scene calls
                    _call()(read, torch.zeros((), device=read[0].device), name)
            for scene in self.scenes:
                yield from tensors_of(model.get_submodule(scene.module)(*scene.args, **scene.kwargs))

    def _read(self, model: nn.Module, name: str) -> list[Tensor]:
        """Parameters of an opaque module, but for those of scenes inside it."""
        inside = f"{name}." if name else ""
        others = [each.module for each in self.scenes if each.module.startswith(inside) and each.module != name]
        followed = {id(p) for each in others for p in model.get_submodule(each).parameters()}
        return [each for each in model.get_submodule(name).parameters() if id(each) not in followed]


class _Recorded:
    """A forward that returns what was recorded, one call after the other, and the last from then on."""

    def __init__(self, name: str, read: Sequence[Tensor], results: Sequence[Any]) -> None:
        self.name, self.read, self.results, self.number = name, read, results, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What this call returned."""
        result = self.results[min(self.number, len(self.results) - 1)]
        self.number += 1
        reads = [*self.read, *tensors_of([args, kwargs])]
        return mapped(lambda tensor: _call()(reads, tensor, self.name), result)


@cache
def _call() -> Any:
    @torch.library.custom_op(CALL, mutates_args=(), schema="(Tensor[] reads, Tensor result, str name) -> Tensor")
    def call(reads: list[Tensor], result: Tensor, name: str) -> Tensor:
        return result.clone()

    call.register_fake(lambda reads, result, name: torch.empty_like(result))
    return call


@rule(CALL)
def _opaque_call(walk: Walk, out: Value, reads: Sequence[Value], result: Value, name: str) -> Value:
    """Whatever goes in is frozen, and what comes out is data."""
    for read in reads:
        for labels in read.labels:
            walk.atoms.freeze(labels, name or "model", walk.opaque_calls[name])
    return Value(out.shape, (None,) * out.ndim, zero=False)


def recorded(model: nn.Module, example: Example, staging: Staging, reasons: Mapping[str, str]) -> Staging:
    """The staging in which these modules are opaque, too: a copy of the model is run on the example once."""
    twin = copy.deepcopy(model, computed(model))
    names = {id(module): name for name, module in twin.named_modules()}
    scenes = [] if "" in reasons else [Scene("", *inputs_of(example))]
    results: dict[str, list[Any]] = {name: [] for name in reasons}
    running: list[str] = []
    draw = staging.draw

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[id(module)]
        caller = running[-1] if running else None
        if caller in reasons and name not in reasons and all(each.module != name for each in scenes):
            scenes.append(Scene(name, *mapped(_apart, (args, kwargs))))
        running.append(name)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        while running and running.pop() != names[id(module)]:
            pass  # one that raised, and was caught
        if (name := names[id(module)]) in reasons:
            results[name].append(mapped(_apart, output))

    for name, module in twin.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ExportError(f"{name!r} is a ScriptModule, which takes no hooks: build it without torch.jit.script")
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    with preserved_rng_state(model), torch.enable_grad(), nullcontext() if draw is None else Draws(draw):
        args, kwargs = inputs_of(example)
        twin(*args, **kwargs)
    found = {name: tuple(each) for name, each in results.items()}
    return replace(staging, scenes=tuple(scenes), results=found, reasons=dict(reasons))


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


_CALLING = ("_wrapped_call_impl", "_call_impl")


def running_at(model: nn.Module, error: BaseException) -> str | None:
    """Name of the innermost module of the model whose call raised this, None where its traceback shows none."""
    names = {id(module): name for name, module in model.named_modules()}
    link: BaseException | None = error
    while link is not None:
        calls = [
            f.f_locals.get("self") for f, _ in traceback.walk_tb(link.__traceback__) if f.f_code.co_name in _CALLING
        ]
        found: list[str] = [names[id(each)] for each in calls if id(each) in names]
        if found:
            return found[-1]
        link = link.__cause__ or link.__context__
    return None


def alike(model: nn.Module, name: str) -> list[str]:
    """The module, and all others that run the same code, where that is not torch's own or around it."""
    kind = type(model.get_submodule(name))
    if kind.__module__.partition(".")[0] == "torch":
        return [name]
    around = {id(module) for module in model.modules() if model.get_submodule(name) in set(module.modules())}
    others = [other for other, module in model.named_modules() if type(module) is kind and id(module) not in around]
    return [name, *others]


def draw_for(model: nn.Module, example: Example) -> float | None:
    """The answer to single random draws with which a copy of the model calls most modules; None where it makes none."""
    counts: dict[float, int] = {}
    for draw in DRAWS:
        twin = copy.deepcopy(model, computed(model))
        called: set[int] = set()
        for module in twin.modules():
            module.register_forward_pre_hook(lambda module, args, called=called: called.add(id(module)))
        args, kwargs = inputs_of(example)
        with preserved_rng_state(model), torch.no_grad(), Draws(draw) as draws:
            twin(*args, **kwargs)
        if not draws.asked:
            return None
        counts[draw] = len(called)
    return max(counts, key=lambda draw: counts[draw])
