"""Recompiling: what compiled code does when widths change, kept to once for each group, and counted."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from setpoint.actuator.shrink import named_tensors
from setpoint.distributed import is_sharded_tensor
from setpoint.groups.group import Group

Recompiled = Callable[[float, int], None]

_FLAGS = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
    "allow_unspec_int_on_nn_module": True,
}
"""Settings of Dynamo under which a parameter's size, and a number that a module holds, may be a symbol in code."""

_changed: dict[str, tuple[Any, Any]] = {}  # settings as they were, and as they were made; any other is the user's own
_holders: set[int] = set()


class Recompiling:
    """Counts what Dynamo compiles again in a run, and keeps it from doing so at every cut.

    By default Dynamo takes the sizes of parameters for constants, compiles all code again after each cut, and gives up
    after eight times. At the first cut in a process in which anything was compiled, its settings are changed to let
    sizes be symbols, and the dims of all groups are marked: code compiles once more after the first cut, and not after
    later ones, but for a width of 1 and operations that take a size as a number (the groups of a group norm). The
    settings hold until the last loop that needs them ends or is dropped; one that the user changes meanwhile stays.

    What is compiled again after the first cut is taken for the cut's doing, as it cannot be distinguished from what a
    batch of another size would have made necessary. `recompiled` gets the seconds of each, and 1 if it counts, or 0; it
    must not hold what holds this object.
    """

    def __init__(self, recompiled: Recompiled, groups: Iterable[Group]) -> None:
        self._recompiled, self._groups = recompiled, tuple(groups)
        self._end: weakref.finalize[..., Any] | None = None

    def follow(self, model: nn.Module) -> None:
        """Have compiled code follow the widths of all groups; called once some have changed, or are about to."""
        from torch._dynamo import maybe_mark_dynamic
        from torch._dynamo.utils import counters

        if self._end is None:
            self._end = weakref.finalize(self, _stop, *_counting(self._recompiled), id(self))
            self._end.atexit = False
        if not counters["stats"]["unique_graphs"]:
            return
        _hold(id(self), len(self._groups))
        tensors: dict[str, Tensor] = named_tensors(model)
        for part in (part for group in self._groups for part in group.slices):
            tensor = tensors[part.tensor]
            if part.dim is not None and not is_sharded_tensor(tensor):
                maybe_mark_dynamic(tensor, part.dim)

    def stop(self) -> None:
        """Count no longer, and give Dynamo its settings back; may be called again."""
        if self._end is not None:
            self._end()


def _counting(recompiled: Recompiled) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """What Dynamo calls when it begins and ends to compile, from now on."""
    from torch._dynamo.callback import callback_handler

    began: list[float] = []

    def begin(_: Any) -> None:
        began[:] = [time.perf_counter()]

    def end(what: Any) -> None:
        number = re.search(r"\d+/(\d+)", str(what.compile_id))  # of the piece of code, and how often it was compiled
        if began and number is not None and int(number[1]) > 0:
            first = what.callback_trigger.name == "DYNAMO"  # the backward pass may be compiled by itself later
            recompiled(time.perf_counter() - began[0], 1 if first else 0)
        began.clear()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    return begin, end


def _stop(begin: Callable[[Any], None], end: Callable[[Any], None], holder: int) -> None:
    from torch._dynamo.callback import callback_handler

    with suppress(ValueError):  # `torch._dynamo.reset()` has forgotten them
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)
    _release(holder)


def _hold(holder: int, num_groups: int) -> None:
    from torch._dynamo import config

    if holder in _holders:
        return
    # Where a size is a number in code, each group may compile it again.
    for name, value in {**_FLAGS, "recompile_limit": config.recompile_limit + num_groups}.items():
        now, (before, ours) = getattr(config, name), _changed.get(name, (None, None))
        _changed[name] = before if _holders and now == ours else now, value
        setattr(config, name, value)
    _holders.add(holder)


def _release(holder: int) -> None:
    from torch._dynamo import config

    _holders.discard(holder)
    while _changed and not _holders:
        name, (before, ours) = _changed.popitem()
        if getattr(config, name) == ours:
            setattr(config, name, before)
