"""Sizes in a state dict: what the state of a cut model says of its shapes, and which models may take others' shapes.

While a loop is at work on a model, nobody else may change its sizes.
"""

from __future__ import annotations

import atexit
import copy
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.model_shapes import ModelShapes, Shapes, by_module
from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError, LoopError, as_written
from setpoint.messages import warn

ATTACHED: WeakSet[nn.Module] = WeakSet()  # models that a loop is at work on; `note_attached` adds one
RESUMING: WeakSet[nn.Module] = WeakSet()  # those whose loop follows what is loaded: it may have other shapes
WITHIN_BUDGET: WeakSet[nn.Module] = WeakSet()  # those whose run has ended within its budget
KEY = "setpoint"  # where in the metadata of a state dict's root the sizes are
FORMAT = 1  # version of their form, described in docs/checkpoint-format.md
PENDING = "_setpoint_pending"  # attribute of a model loaded without some sizes of its code: a hook that finds them


def note_attached(model: nn.Module) -> None:
    """Note that a loop is at work on a model, and warn at the end of the process if it still is."""
    ATTACHED.add(model)
    WITHIN_BUDGET.discard(model)
    atexit.unregister(_warn_of_unfinished)  # once, however many models there are
    atexit.register(_warn_of_unfinished)


def _warn_of_unfinished() -> None:
    # After an exception Python has reported what ended the run.
    if ATTACHED and getattr(sys, "last_value", None) is None:
        warn(
            "the process ends, and a run was not finished: whether it met its budget was not checked. Call "
            "loop.finish() after the last step; it returns the summary"
        )


def check_not_attached(model: nn.Module) -> None:
    """Check that no loop is at work on the model, on a part of it, or on what it is a part of, or raise LoopError."""
    if _attached_with(model):
        raise LoopError("this model has a loop already: call finish() or detach() on that loop first")


def check_loads(model: nn.Module) -> None:
    """Check that no loop is at work on the model which would not follow when a state gives it other shapes."""
    if not _attached_with(model) <= set(RESUMING):
        raise LoopError(
            "this model has a loop already, and the state has other shapes: load the loop's own state first, or attach "
            "with resume=True. In the middle of a run with resume=True load the optimizer's state first: it takes loop "
            "and model back; loop.detach() lets the model be loaded by itself. Nothing was changed"
        )


def _attached_with(model: nn.Module) -> set[nn.Module]:
    parts = set(model.modules())
    return {other for other in ATTACHED if other in parts or model in set(other.modules())}


@dataclass(frozen=True, eq=False)
class StateSizes:
    """The shapes of a cut model, as they stand with its tensors in a state dict."""

    sizes: Mapping[SizePlace, int]  # the integers that cuts have set
    dense: Shapes  # by name of each tensor that was cut, the shape that it had before
    transient: Mapping[str, Tensor]  # by name, non-persistent buffers that were cut: no state dict holds them
    shapes: Shapes  # those that go with the sizes, by name of each tensor in `dense`

    @classmethod
    def of(cls, model: nn.Module) -> StateSizes | None:
        """None for a model that was never cut."""
        known, tensors = ModelShapes.of(model), named_tensors(model)
        if not known.dense:
            return None
        shapes = {name: tuple(tensors[name].shape) for name in known.dense}
        return cls(known.sizes, known.dense, {name: tensors[name].detach() for name in known.buffers}, shapes)

    def plain(self) -> dict[str, Any]:
        """As dicts, lists, strings, integers and tensors, which `torch.load(..., weights_only=True)` reads."""
        dense, shapes = ({name: list(shape) for name, shape in of.items()} for of in (self.dense, self.shapes))
        sizes, transient = by_module(self.sizes), dict(self.transient)
        return {"format": FORMAT, "sizes": sizes, "dense": dense, "transient": transient, "shapes": shapes}

    @classmethod
    def parse(cls, value: Any) -> StateSizes:
        """From `plain`'s form; a CheckpointError for a newer form, or for anything else."""
        with as_written("what the state dict carries of sizes"):
            if (newer := int(value["format"])) <= FORMAT:
                nested = value["sizes"].items()
                sizes = {(str(module), str(at)): int(size) for module, of in nested for at, size in of.items()}
                both = value["dense"], value.get("shapes", {})  # states of 0.2 have no `shapes`
                dense, shapes = ({str(name): tuple(map(int, shape)) for name, shape in of.items()} for of in both)
                values = {str(name): tensor.detach() for name, tensor in value["transient"].items()}
                return cls(sizes, dense, values, shapes)
        raise CheckpointError(
            f"the state dict has sizes of format {newer}, this Setpoint reads up to {FORMAT}: upgrade Setpoint"
        )


class Hooks(OrderedDict[Any, Any]):
    """Hooks of a module, of which Setpoint's go along with `copy.deepcopy`, but into no pickle.

    A pickled model must load where Setpoint is not installed.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return Hooks({key: copy.deepcopy(hook, memo) for key, hook in self.items()})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if key != KEY],)


def carry_sizes(model: nn.Module) -> None:
    """Let a model's state dict carry its sizes once it is cut, and a state of other sizes be refused by name."""
    module = unwrapped(model)
    saving: dict[Any, Any] = module._state_dict_hooks
    loading: dict[Any, Any] = module._load_state_dict_pre_hooks
    if KEY in saving:
        return
    # Under a key of our own in PyTorch's tables: its `register_...` methods give numbers, by which nobody could find
    # Setpoint's hook again in a copy of the model.
    ahead = _WrappedHook(_refuse, module)  # as torch wraps hooks that get their module: a deep copy gets its own
    module._state_dict_hooks = Hooks({**saving, KEY: _put})
    # First, since it must come before hooks that copy values.
    module._load_state_dict_pre_hooks = Hooks({KEY: ahead, **loading})


def _put(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Called by `state_dict`: put the sizes of a cut model beside its version."""
    if (carried := StateSizes.of(module)) is not None:
        metadata[KEY] = carried.plain()  # `torch.save` keeps metadata, and plain readers ignore it


def _refuse(module: nn.Module, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """Called by `load_state_dict`, before PyTorch copies what fits and lists what does not."""
    mine = ModelShapes.of(module).dense
    theirs = any(KEY in entry for entry in (getattr(state, "_metadata", None) or {}).values())
    for name, tensor in named_tensors(module).items():
        saved = state.get(prefix + name)
        # Two models that were never cut and differ are PyTorch's to refuse.
        if isinstance(saved, Tensor) and saved.shape != tensor.shape and (theirs or name in mine):
            check_loads(module)
            cut = ", which Setpoint has cut"
            raise CheckpointError(
                f"size mismatch: {name!r} has shape {tuple(saved.shape)} in the state dict{cut if theirs else ''}, and "
                f"{tuple(tensor.shape)} in the model{cut if mine else ''}: call setpoint.resumable(model) first, and "
                "it takes the sizes of the state; attach(..., resume=True) continues its run"
            )
