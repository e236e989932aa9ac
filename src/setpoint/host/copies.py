"""Copies: what is cut as the model is: named by the user, or averaged copies that hang on known classes."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import Any, final
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor, local, plain_kind
from setpoint.errors import GroupError
from setpoint.groups.model_copy import computed, copy_of
from setpoint.messages import warn

HOLDERS = {
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "ModelEMA": "ema",
}
"""By name of a class, the attribute that holds an averaged copy: torch (so does Lightning), timm, ultralytics."""
_LIKE, _EQUAL = 0.2, 1e-5
"""Least cosine similarity of a model and its average, and the most by which two that are alike differ."""

_made: WeakKeyDictionary[nn.Module, weakref.ref[nn.Module] | None] = WeakKeyDictionary()  # holder: what it averages
_looked: list[bool] = []
_at_work: WeakSet[Copies] = WeakSet()


@dataclass(frozen=True, eq=False)
class Inside:
    """A copy that is a module, inside a holder or by itself."""

    holder: Any
    part: nn.Module

    def module(self) -> nn.Module:
        """The module."""
        return self.part


@dataclass(frozen=True, eq=False)
class Listed:
    """A copy in a list of tensors, as diffusers' `EMAModel` has it: seen through a module that holds these tensors."""

    holder: Any
    part: nn.Module
    owners: Sequence[Sequence[tuple[dict[str, Any], str]]]  # of each tensor of the list, places in the twin

    @classmethod
    def of(cls, holder: Any, model: nn.Module, what: str) -> Listed:
        """The copy in a list; GroupError where it is none of this model."""
        every = list(model.parameters())
        trained = [each for each in every if each.requires_grad]
        listed = list(holder.shadow_params)
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else None for each in listed]
        matching = [some for some in (every, trained) if shapes == [tuple(each.shape) for each in some]]
        if not matching or any(map(is_sharded_tensor, every)):
            raise GroupError(
                f"{what} ({type(holder).__name__}) is no copy of the model: its shadow_params must be one plain tensor "
                f"for each of the model's {len(every)} parameters, in their order and of their shapes"
            )
        stand_ins = {id(own): shadow for own, shadow in zip(matching[0], listed, strict=True)}
        twin = copy_of(model, {**computed(model), **stand_ins}, users_hooks=False)
        tables = [module._parameters for module in twin.modules()]
        places = {id(shadow): [(t, name) for t in tables for name in t if t[name] is shadow] for shadow in listed}
        return cls(holder, twin, [places[id(shadow)] for shadow in listed])

    def module(self) -> nn.Module:
        """A module with the tensors that are in the list now."""
        listed = self.holder.shadow_params  # another list after `load_state_dict`
        for number, owners in enumerate(self.owners):
            for table, name in owners:  # a tensor that is gone does not fit, as a cut says
                table[name] = listed[number] if number < len(listed) else torch.empty(0)
        return self.part


@final
class Copies:
    """The copies of a model: those that the user has named, and averaged ones that are found.

    A copy is found at attach, or when it is made later on, if it is held by a class of `HOLDERS`, has the model's class
    and shapes, and was made of this model. Where that was not seen (of what is no module, or was made before Setpoint
    was imported), it must be like this model, and like no other one of the process as much. One that is no module, and
    is made after attach, is not found.

    Args:
        model: without wrappers.
        named: modules, in wrappers or not, or objects with `shadow_params` in the order of `model.parameters()`.

    Raises:
        GroupError: for one that is neither, or shares tensors with the model.
    """

    def __init__(self, model: nn.Module, named: Sequence[Any] = ()) -> None:
        self._model, self.named = model, tuple(named)
        self._sharded = any(map(is_sharded_tensor, model.parameters()))
        self.parts = list[Inside | Listed]()
        for number, each in enumerate(self.named):
            if all(each is not part.holder for part in self.parts):
                self.parts.append(self._named(number, each))

    @property
    def holders(self) -> list[Any]:
        """What a user may know the copies by."""
        return [each for part in self.parts for each in (part.holder, part.part)]

    def begin(self) -> None:
        """Follow averaged copies that are there, and from now on those that are made."""
        _at_work.add(self)
        self.take_in([(holder, root) for holder in _holders() if (root := _root(holder)) is not None])

    def stop(self) -> None:
        """Follow no more; may be called again."""
        _at_work.discard(self)

    def _named(self, number: int, given: Any) -> Inside | Listed:
        what = f"copies[{number}]"
        if isinstance(getattr(given, "shadow_params", None), list):
            part: Inside | Listed = Listed.of(given, self._model, what)
        elif isinstance(given, nn.Module):
            inside = None if self._sharded else _inside(given, self._model)
            part = Inside(given, given if inside is None else inside)
        else:
            raise GroupError(
                f"{what} must be a torch.nn.Module, or have a list of tensors named shadow_params, got "
                f"{type(given).__name__}: keep an average in torch.optim.swa_utils.AveragedModel or in a deepcopy"
            )
        shared = _shared(part.module(), self._model)
        if shared:
            raise GroupError(
                f"{what} ({type(given).__name__}) shares the tensor {shared!r} with the model: a copy has tensors of "
                "its own (copy.deepcopy makes one), and what shares them is cut anyway"
            )
        return part

    def take_in(self, holders: Sequence[tuple[Any, nn.Module]]) -> None:
        """Follow those copies, each given with its holder, that are of this model."""
        taken = {id(part.part) for each in _at_work for part in each.parts} | set(map(id, self.named))
        found = [(holder, part, _source(holder)) for holder, root in holders if (part := _inside(root, self._model))]
        found = [each for each in found if not {id(each[0]), id(each[1])} & taken and not _shared(each[1], self._model)]
        unseen = [] if self._sharded else [part for _, part, source in found if source is None]
        others = _Others.of(self._model, unseen) if unseen else None
        for holder, part, source in found:
            if source is not None and self._model not in source.modules():
                continue
            if self._sharded and (source is None or any(map(is_sharded_tensor, part.parameters()))):
                _leave(holder, "is sharded, or was not seen to be of this sharded one")
            elif others is None or source is not None or others.ours(holder, part):
                self.parts.append(Inside(holder, part))


def several(named: Any) -> tuple[Any, ...]:
    """What was given for copies, as a tuple; None for none; GroupError for what is no sequence."""
    if named is None:
        return ()
    one = isinstance(named, nn.Module) and not isinstance(named, nn.ModuleList)
    if one or hasattr(named, "shadow_params") or not isinstance(named, Iterable):
        raise GroupError(
            f"copies must be a sequence of modules or of objects with shadow_params, got {type(named).__name__}: "
            "write copies=(it,)"
        )
    return tuple(named)


@dataclass(frozen=True, eq=False)
class _Others:
    """The model, and what else of its class and shapes is alive and no average."""

    model: nn.Module
    idle: Sequence[nn.Module]
    trained: Sequence[nn.Module]  # by any optimizer

    @classmethod
    def of(cls, model: nn.Module, copies: Sequence[nn.Module]) -> _Others:
        kind, averages, optimizers = plain_kind(model), _kinds((object, nn.Module), HOLDERS), _kinds((Optimizer,))
        wanted = averages | optimizers | {kind}

        def alive() -> tuple[list[Any], list[nn.Module]]:
            some = [each for each in gc.get_objects() if type(each) in wanted]
            roots = [root for each in some if type(each) in averages and (root := _root(each)) is not None]
            known = {id(inner) for root in (model, *copies, *roots) for inner in root.modules()}
            known |= {id(part.part) for each in _at_work for part in each.parts}
            modules = [each for each in some if type(each) is kind and id(each) not in known]
            return some, [each for each in modules if _shapes(each) == _shapes(model)]

        some, rivals = alive()
        if rivals and gc.collect():  # what nobody has any more is none
            some, rivals = alive()
        groups = [settings for each in some if type(each) in optimizers for settings in each.param_groups]
        held = {id(parameter) for settings in groups for parameter in settings["params"]}
        trained = [each for each in rivals if any(id(p) in held for p in each.parameters())]
        return cls(model, [each for each in rivals if all(each is not other for other in trained)], trained)

    def ours(self, holder: Any, part: nn.Module) -> bool:
        """Whether a copy is the model's; where that cannot be told, it is said."""
        own = likeness(part, self.model)
        if own <= _LIKE:
            return False
        idle, trained = ([likeness(part, each) - own for each in some] for some in (self.idle, self.trained))
        if any(each > _EQUAL for each in trained):
            return False
        if any(each > _EQUAL for each in idle) or any(each >= -_EQUAL for each in trained):
            _leave(holder, "is as much like another model of this process")
            return False
        return True


def _leave(holder: Any, why: str) -> None:
    what = f"{type(holder).__name__} holds a copy of the model's shapes that {why}"
    warn(f"{what}: it is not cut along. If it is an average of this model, give it to attach: copies=(it,)")


def likeness(one: nn.Module, other: nn.Module) -> float:
    """The cosine similarity of two modules of the same shapes, over all parameters of two or more dims, if any."""
    theirs = dict(other.named_parameters())
    pairs = [(p, theirs[name]) for name, p in one.named_parameters() if p.is_floating_point() and not p.is_meta]
    pairs = [pair for pair in pairs if pair[0].dim() > 1] or pairs
    flat = [[local(each.detach()).reshape(-1).float() for each in pair] for pair in pairs]
    sums = torch.zeros(3, dtype=torch.float64)
    for mine, its in flat:
        its = its.to(mine.device)
        sums += torch.stack([mine @ its, mine @ mine, its @ its]).double().cpu()
    dot, *squares = sums.tolist()
    return float(dot / (squares[0] * squares[1]) ** 0.5) if all(squares) else 0.0


def _inside(root: nn.Module, model: nn.Module) -> nn.Module | None:
    """The one module in it that has the class and the shapes of the model."""
    kind = plain_kind(model)
    found = [each for each in root.modules() if plain_kind(each) is kind and _shapes(each) == _shapes(model)]
    return found[0] if len(found) == 1 else None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}


def _shared(part: nn.Module, model: nn.Module) -> str:
    """A tensor that two modules share, by its name in the first."""
    own = {key for tensor in named_tensors(model).values() for key in _at(tensor)}
    return next((name for name, tensor in named_tensors(part).items() if own & set(_at(tensor))), "")


def _at(tensor: Tensor) -> Iterator[tuple[str, int]]:
    yield "object", id(tensor)
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel():
        yield str(tensor.device), tensor.data_ptr()


def _root(holder: Any) -> nn.Module | None:
    """What an object of a known class holds."""
    name = next((HOLDERS[kind.__name__] for kind in type(holder).__mro__ if kind.__name__ in HOLDERS), "")
    root = getattr(holder, name, None) if name else None
    return root if isinstance(root, nn.Module) else None


def _holders() -> list[Any]:
    """Objects of known classes. All objects of the process are looked through once, and again for those no modules."""
    kinds = _kinds((object, nn.Module), HOLDERS)
    plain = [each for each in kinds if not issubclass(each, nn.Module)]
    if _looked and not plain:
        return list(_made)
    _looked.append(True)
    found = [each for each in gc.get_referrers(*kinds) if type(each) in kinds]  # an object refers to its class
    for each in found:
        if isinstance(each, nn.Module):
            _made.setdefault(each, None)
    return found


def _kinds(bases: tuple[type, ...], names: Iterable[str] = ()) -> set[type]:
    """All classes that inherit from these bases; with names, from a direct child of theirs of such a name."""
    children: Iterable[type] = chain.from_iterable(map(type.__subclasses__, bases))
    left = [each for each in children if not names or each.__name__ in names]
    kinds = set(() if names else bases)
    while left:
        kinds.add(kind := left.pop())
        left += type.__subclasses__(kind)
    return kinds


def _registered(module: nn.Module, name: str, part: nn.Module | None) -> None:
    """Note of a holder what it averages, and have the loops that are at work follow it."""
    if name not in ("module", "ema") or not isinstance(part, nn.Module):
        return
    if any(HOLDERS.get(kind.__name__) == name for kind in type(module).__mro__):
        _made[module] = _averaged(module, part)
        for each in list(_at_work):
            each.take_in([(module, part)])


def _averaged(holder: nn.Module, part: nn.Module) -> weakref.ref[nn.Module] | None:
    """The model that a holder was given, as its constructor, which is running, has it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_locals.get("self") is not holder:
        frame = frame.f_back
    while frame is not None and frame.f_locals.get("self") is holder:  # `__setattr__`, and who calls it
        model = frame.f_locals.get("model")
        if isinstance(model, nn.Module) and model is not part:
            return weakref.ref(model)
        frame = frame.f_back
    return None


def _source(holder: Any) -> nn.Module | None:
    """What a holder averages, if that was seen and is still there."""
    seen = _made.get(holder) if isinstance(holder, nn.Module) else None
    return seen() if seen else None


register_module_module_registration_hook(_registered)
