"""Resumable: a model whose own `state_dict` and `load_state_dict` carry its sizes, whoever calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from traceback import walk_stack
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.in_state_dict import KEY, PENDING, WITHIN_BUDGET, Hooks, StateSizes, carry_sizes, check_loads
from setpoint.actuator.model_shapes import ModelShapes, Shapes, by_every_name
from setpoint.actuator.tensors import named_tensors, shapes_by_name, take
from setpoint.checkpoint.fit import cut_to, fit, infer_sizes, misfit
from setpoint.checkpoint.model_file import some_of, unwrap_module
from setpoint.distributed import is_sharded, unwrapped
from setpoint.errors import CheckpointError, as_written
from setpoint.groups.example import Example, example_of
from setpoint.groups.sizes_in_code.place import is_call
from setpoint.groups.sizes_in_code.shim import get_call_sizes
from setpoint.groups.untouched import copy_of
from setpoint.messages import warn

_loading: WeakKeyDictionary[nn.Module, tuple[ExitStack, list[str], bool]] = WeakKeyDictionary()
"""By model that is being loaded: what puts it back, the errors so far, and whether the load is strict."""


def resumable(model: nn.Module) -> nn.Module:
    """Make a model's `state_dict` carry its sizes, and its `load_state_dict` cut the model to a state's sizes first.

    Any framework's own checkpoints can then be read back into the dense model as its code builds it, before or after
    `attach`, and into a model that was cut otherwise. The sizes stand in the state dict's metadata, which `torch.save`
    keeps and plain readers ignore. Where a format drops it (safetensors), the shapes say how narrow each layer is; the
    first forward finds sizes in the model's code, and refuses shapes to which no cut leads. A state of the model's own
    shapes loads as ever. One that differs in what no cut changes, such as the number of classes or of input columns, is
    PyTorch's size mismatch.

    Returns:
        The model itself. A second call changes nothing.

    >>> import copy
    >>> model = resumable(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
    >>> small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model.load_state_dict(small.state_dict())
    <All keys matched successfully>
    >>> model[0]
    Linear(in_features=2, out_features=3, bias=True)
    """
    module = unwrap_module("resumable", model)
    if not is_resumable(module):
        carry_sizes(module)
        ahead: dict[Any, Any] = module._load_state_dict_pre_hooks
        behind: dict[Any, Any] = module._load_state_dict_post_hooks
        ahead[KEY] = _WrappedHook(_fit_to, module)  # in the place of the one that refuses other sizes
        module._load_state_dict_post_hooks = Hooks({**behind, KEY: _after_load})
    return model


def is_resumable(model: nn.Module) -> bool:
    """Whether a model's own `load_state_dict` cuts it first."""
    return KEY in unwrapped(model)._load_state_dict_post_hooks


def may_be_cut(model: nn.Module, state: object) -> bool:
    """Whether a state without sizes may be of a model that was cut out of this one: narrower, as cuts are."""
    if not isinstance(state, Mapping):
        return False
    dense = shapes_by_name(model)
    saved = {name: tuple(state[name].shape) for name in dense if isinstance(state.get(name), Tensor)}
    narrower = any(shape < dense[name] for name, shape in saved.items())
    return narrower and misfit(model, dense, {**dense, **saved}) is None


def shrink_to(model: nn.Module, state: Mapping[str, Any], example: Example | None = None) -> nn.Module:
    """Cut a model to the shapes of a state dict, whose values are to be loaded next.

    Sizes are those that the state dict of a cut model carries. Without them they follow from the shapes: sizes of
    PyTorch's own layers by themselves, sizes in a model's own code (a number of heads) by an example, which any model
    with classes of its own needs. Tensors keep their identity; their values mean nothing until those of the state are
    loaded.

    Args:
        model: as its code builds it, or cut before.
        state: of a model of the same code; names may have the prefix `module.` or `_orig_mod.` of a wrapper.
        example: inputs of the model, as for `attach`.

    Returns:
        The model itself.

    Raises:
        CheckpointError: when the state is of another model, or an example is needed; the model is then as before.

    >>> small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).state_dict()
    >>> model = shrink_to(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), small)
    >>> model.load_state_dict(small)
    <All keys matched successfully>
    """
    module = unwrap_module("shrink_to", model)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"shrink_to takes a state dict, got {type(state).__name__}")
    names = named_tensors(module)
    prefix = next((prefix for prefix in ("", *_WRAPPERS) if any(f"{prefix}{name}" in state for name in names)), None)
    if prefix is None:
        raise CheckpointError(
            f"the state dict has none of the model's tensors: its names are {some_of(map(str, state))}, the model's "
            f"{some_of(names)}: give the part that is the model's, without a prefix of its names"
        )
    wanted = _Wanted.of(module, state, prefix)
    if wanted is None:
        return model
    if wanted.carried is None and example is not None:
        wanted = wanted.completed(module, example)
    if wanted.misfit is not None:
        raise CheckpointError(wanted.misfit)
    if wanted.unsure:
        unsure = some_of(name or "the model" for name in wanted.unsure)
        raise CheckpointError(
            f"the shapes of the state dict do not tell which sizes {unsure} writes in its code: give an example, "
            "shrink_to(model, state, example=(x,)), or a state dict with its metadata, as torch.save keeps it"
        )
    wanted.fit(module)
    return model


_WRAPPERS = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")


def _fit_to(module: nn.Module, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """Called by `load_state_dict` before any value is copied; the last argument lists the errors so far."""
    _loading.pop(module, None)
    wanted = _Wanted.of(module, state, prefix)
    if wanted is None:
        return
    before = {tensor: tensor.shape for tensor in named_tensors(module).values()}
    undo = ExitStack()
    if wanted.misfit is None:
        undo = wanted.fit(module)
        _warn_of_wider(module, before)
        (_await_forward if wanted.narrow and wanted.carried is None else _await_nothing)(module, undo)
    else:  # and PyTorch lists the mismatches
        others[-1].append(wanted.misfit)
    for tensor in [tensor for tensor, shape in before.items() if tensor.shape == shape]:
        undo.callback(tensor.copy_, tensor.detach().clone())
    # PyTorch tells its hooks always that the load is strict. Whether it is decides if missing names are an error, and
    # stands in the frame of `load_state_dict` only. A framework that loads by itself has none.
    for frame, _ in walk_stack(None):
        if (frame.f_code.co_name, frame.f_code.co_filename) == ("load_state_dict", nn.modules.module.__file__):
            _loading[module] = undo, others[-1], bool(frame.f_locals["strict"])
            return


def _warn_of_wider(module: nn.Module, before: Mapping[Tensor, torch.Size]) -> None:
    """Warn where a state makes a model wider whose run has ended within its budget."""
    had, has = sum(map(math.prod, before.values())), sum(tensor.numel() for tensor in before)
    if module in WITHIN_BUDGET and has > had:
        warn(
            f"the state makes the model wider again, {has:,} numbers in place of {had:,}, after its run met the "
            "budget: it was saved before the last cut. Keep the best state of those for which loop.budget_met is True "
            "(in a Trainer: SetpointCallback(..., best_within_budget=True))"
        )


def _after_load(module: nn.Module, keys: Any) -> None:
    """Called by `load_state_dict` before it raises what it has found: the model is then as wide as it was before."""
    undo, errors, strict = _loading.pop(module, (None, (), False))
    if undo is not None and (errors or (strict and (keys.missing_keys or keys.unexpected_keys))):
        with torch.no_grad():
            undo.close()


def _carried(module: nn.Module, state: Mapping[str, Any], prefix: str) -> StateSizes | None:
    """The sizes that a state carries for a module: its own, else those of all its submodules."""
    metadata = getattr(state, "_metadata", None) or {}
    with as_written("the metadata of the state dict"):
        found = {path: entry[KEY] for path, entry in metadata.items() if KEY in entry}
    if prefix[:-1] in found:
        return StateSizes.parse(found[prefix[:-1]])
    parts = {path: found[prefix + path] for path, _ in module.named_modules() if prefix + path in found}
    if parts:
        return _joined({path: StateSizes.parse(part) for path, part in parts.items()})
    # Where a wrapper's name was taken off the keys, neither is there, and the only sizes of the state are meant.
    return StateSizes.parse(*found.values()) if len(found) == 1 else None


def _joined(parts: Mapping[str, StateSizes]) -> StateSizes:
    """Of a module, by what its submodules at these paths carry."""

    def named(field: str) -> dict[str, Any]:
        return {f"{path}.{name}": value for path, part in parts.items() for name, value in getattr(part, field).items()}

    sizes = {
        (f"{path}.{at}".rstrip("."), place): n for path, part in parts.items() for (at, place), n in part.sizes.items()
    }
    return StateSizes(sizes, named("dense"), named("transient"), named("shapes"))


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The shapes and sizes that a model is to have for a state."""

    narrow: Shapes  # of each tensor that is narrower than when the model was built
    sizes: Mapping[SizePlace, int]
    transient: Mapping[str, Tensor]  # values of buffers that no state dict holds
    carried: StateSizes | None = None  # None where the sizes were inferred from shapes
    unsure: tuple[str, ...] = ()  # modules of which some sizes are not known
    misfit: str | None = None  # why no cut can have led to these shapes

    @classmethod
    def of(cls, module: nn.Module, state: Mapping[str, Any], prefix: str) -> _Wanted | None:
        """For a state; None if the model has its shapes already."""
        carried = _carried(module, state, prefix)
        tensors, known = named_tensors(module), ModelShapes.of(module)
        dense = known.full(module)
        now = shapes_by_name(module)
        saved = {name: state.get(prefix + name) for name in tensors}
        # What is not there, as in a load that is not strict, stays as it is.
        present = {name: tuple(value.shape) for name, value in saved.items() if isinstance(value, Tensor)}
        shapes = now | by_every_name(present, tensors)
        if carried is not None:
            if unknown := carried.transient.keys() - tensors.keys():
                raise CheckpointError(
                    f"the state dict is of another model, or this one has yet to make its buffer {min(unknown)!r}: "
                    "call the model once, then load"
                )
            shapes |= {name: tuple(value.shape) for name, value in carried.transient.items()}
        if shapes == now and (carried is None or carried.sizes == known.sizes):
            return None
        if any(map(is_sharded, module.modules())):
            raise CheckpointError(
                "a sharded model cannot be cut to a state: load it before fully_shard, or inside `with "
                "setpoint.unsharded(model):`"
            )
        narrow = {name: shape for name, shape in shapes.items() if shape != dense[name]}
        if carried is None:
            if lost := [name for name in known.buffers if now[name] != dense[name]]:
                raise CheckpointError(
                    f"the buffer {lost[0]!r} was cut, and is in no state dict: build the model again, and load it there"
                )
            sizes, unsure = infer_sizes(module, narrow)
            return cls(narrow, sizes, {}, unsure=unsure, misfit=misfit(module, dense, shapes))
        return cls(narrow, carried.sizes, carried.transient, carried, misfit=_contradiction(carried, shapes, module))

    def completed(self, module: nn.Module, example: Example) -> _Wanted:
        """With all sizes, by the groups of the dense model."""
        tensors = named_tensors(module)
        cut = cut_to(module, self.narrow, example)
        values = {}
        for name, dims in cut.dims().items():
            if name in self.narrow:
                continue
            # Which units a state has kept is not known. It does not matter where a buffer is the same for all of them.
            for dim in dims:
                if not torch.equal(tensors[name], tensors[name].narrow(dim, 0, 1).expand_as(tensors[name])):
                    raise CheckpointError(
                        f"the buffer {name!r} was cut, and is in no state dict: give one with its metadata, as "
                        "torch.save keeps it"
                    )
            values[name] = take(tensors[name], dims)
        narrow = {**self.narrow, **{name: tuple(value.shape) for name, value in values.items()}}
        sizes = {place: int(kept.sum()) for place, kept in cut.sizes.items() if not kept.all() or is_call(place[1])}
        return _Wanted(narrow, sizes, values)

    def fit(self, module: nn.Module) -> ExitStack:
        """Give the model these shapes and sizes; what is returned puts everything back when it is closed."""
        check_loads(module)
        tensors = named_tensors(module)
        values = {name: value.to(tensors[name].dtype) for name, value in self.transient.items()}
        return fit(module, self.narrow, self.sizes, values, None if self.carried is None else self.carried.dense)


def _contradiction(carried: StateSizes, shapes: Shapes, module: nn.Module) -> str | None:
    """What is wrong with a state that has not all tensors that its cut changed, as they were with these sizes."""
    sizes, _ = infer_sizes(module, {name: shape for name, shape in shapes.items() if name in carried.dense})
    wrong = [f"{at}.{place}" for (at, place), size in sizes.items() if carried.sizes.get((at, place), size) != size]
    wrong += [name for name, shape in carried.shapes.items() if shapes.get(name, shape) != shape]
    said = "the sizes that the state dict carries are not those of its tensors"
    return f"{said}: {some_of(wrong)}: load the state_dict() of the cut model as it is" if wrong else None


def _ahead_of_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # In a compiled model all of tracing and cutting would be compiled, too.
    left_out: Any = torch.compiler.disable(complete)  # type: ignore[no-untyped-call]
    left_out(module, example_of(module, args, kwargs))


def _await_forward(module: nn.Module, undo: ExitStack) -> None:
    """Complete what is loaded at the next forward."""
    if PENDING in module.__dict__:
        return

    @wraps(type(module).forward)
    def late(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs) if get_call_sizes(self) else type(self).forward(self, *args, **kwargs)

    # Torch looks the forward up before it calls hooks. A method, since Accelerate binds what it wraps to each copy.
    forward = MethodType(late, module)
    module.__dict__.setdefault("forward", forward)
    handle = module.register_forward_pre_hook(_ahead_of_first, with_kwargs=True, prepend=True)
    module.__dict__[PENDING] = handle, forward
    undo.callback(_await_nothing, module, ExitStack())


def _await_nothing(module: nn.Module, undo: ExitStack) -> None:
    handle, forward = module.__dict__.pop(PENDING, (None, None))
    if handle is not None:
        handle.remove()
        if module.__dict__.get("forward") == forward:
            del module.__dict__["forward"]
        undo.callback(_await_forward, module, ExitStack())


def complete(module: nn.Module, example: Example) -> None:
    """Find out the sizes that a load has left open, by inputs of the module, and whether a cut leads to its shapes."""
    dense = ModelShapes.of(module).full(module)
    now = shapes_by_name(module)
    wanted = _Wanted({name: shape for name, shape in now.items() if shape != dense[name]}, {}, {})
    # On a copy, since a tensor that has had another shape in between loses what waits for its gradient: a wrapper would
    # average it over the ranks no more.
    twin = copy_of(module, users_hooks=False)
    wanted.completed(twin, example).fit(module)
    _await_nothing(module, ExitStack())  # only now: what was refused stays so
