"""Compiled code that follows widths: from the first cut on sizes are symbols, so that code compiles once more only."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor
from setpoint.groups.group import Group

# Settings of Dynamo under which a parameter's size, and a number that a module holds, may be a symbol in code.
_FLAGS = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
    "allow_unspec_int_on_nn_module": True,
}

_changed: dict[str, tuple[Any, Any]] = {}  # settings as they were, and as they were made; any other is the user's own
_holders: set[int] = set()  # the settings are the process's, so they hold until the last loop that needs them


class DynamicWidths:
    """Keeps Dynamo from compiling all code again at every cut; it changes at the first one.

    By default Dynamo takes the sizes of parameters for constants, compiles all code again after each cut, and gives up
    after eight times. Here its settings let sizes be symbols, and the dims of all groups are marked: code compiles once
    more after the first cut, and not after later ones, but for a width of 1 and operations that take a size as a number
    (the groups of a group norm). A setting that the user changes meanwhile stays.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self._groups = tuple(groups)
        self._end: weakref.finalize[..., Any] | None = None

    def follow(self, model: nn.Module) -> None:
        """Mark the widths of all groups; called once some have changed, in a process that has compiled code."""
        from torch._dynamo import config, maybe_mark_dynamic

        if self._end is None:
            # Where a size is a number in code, each group may compile it again.
            limit = config.recompile_limit + len(self._groups)
            for name, value in {**_FLAGS, "recompile_limit": limit}.items():
                now, (before, ours) = getattr(config, name), _changed.get(name, (None, None))
                _changed[name] = before if _holders and now == ours else now, value
                setattr(config, name, value)
            _holders.add(id(self))
            # A loop that is dropped without `stop` gives the settings back, too; at exit nobody needs them.
            self._end = weakref.finalize(self, _release, id(self))
            self._end.atexit = False
        tensors = named_tensors(model)
        for part in (part for group in self._groups for part in group.slices):
            if part.dim is not None and not is_sharded_tensor(tensors[part.tensor]):  # Dynamo cannot mark a DTensor
                maybe_mark_dynamic(tensors[part.tensor], part.dim)

    def stop(self) -> None:
        if self._end is not None:
            self._end()


def _release(holder: int) -> None:
    from torch._dynamo import config

    _holders.discard(holder)
    while _changed and not _holders:
        name, (before, ours) = _changed.popitem()
        if getattr(config, name) == ours:
            setattr(config, name, before)
