"""A kept tape: the recorded step of a model, kept so that the step of an equal model need not be recorded again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from setpoint.cache import keep, recall
from setpoint.errors import CostError
from setpoint.groups.encoded import decode_size, encode_groups, encode_size
from setpoint.groups.fingerprint import digest
from setpoint.groups.group import Group, Size
from setpoint.groups.users_hooks import is_setpoints
from setpoint.resources.tape import Operand, Operation, Storage, Tape

_OPTIMIZERS = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax),
    *(torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop),
)
"""Optimizers whose operations follow from shapes and switches. Those of RAdam, ASGD or Muon follow counters, too."""


def kept_tape(key: str, make: Callable[[], Tape]) -> Tape:
    """The tape that was kept under a key, or a new one, which is kept. The key "" keeps nothing."""
    try:
        facts = recall(key)
        if facts is not None:
            return _decoded(facts)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError):
        pass  # another version wrote it, or an operation is not registered here
    tape = make()
    facts = _encoded(tape) if key else None
    if facts is not None:
        keep(key, facts)
    return tape


def tape_key(
    model: nn.Module, optimizers: Sequence[Optimizer], groups: tuple[Group, ...], fingerprint: str, what: str
) -> str:
    """The key of the step of a model with this fingerprint.

    It is "" where there is no fingerprint, and where an optimizer may do more than shapes and switches say: one of
    another kind, with a hook, or with parameters or settings that are not known here.
    """
    hooks: Any = sys.modules[Optimizer.__module__]
    if not fingerprint or hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks:
        return ""
    facts: list[Any] = [what, encode_groups(groups), sorted({str(each.device) for each in model.parameters()})]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        facts += [_described(each, names) for each in optimizers]
    except CostError:
        return ""
    return digest(fingerprint, json.dumps(facts))


def _described(optimizer: Optimizer, names: Mapping[int, str]) -> list[Any]:
    """What of an optimizer decides on operations.

    Raises:
        CostError: for anything that is not known here.
    """

    def name_of(parameter: Any) -> str:
        if id(parameter) not in names:
            raise CostError("a parameter is not the model's")
        return names[id(parameter)]

    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
    if type(optimizer) not in _OPTIMIZERS or not all(map(is_setpoints, hooks)):  # a loop that waits has some
        raise CostError("another kind of optimizer")
    groups = [
        [
            list(map(name_of, group["params"])),
            [[str(at), _switch(value)] for at, value in group.items() if at != "params"],
        ]
        for group in optimizer.param_groups
    ]
    states = sorted(
        [name_of(parameter), [[str(at), _switch(value)] for at, value in state.items()]]
        for parameter, state in optimizer.state.items()
    )
    return [type(optimizer).__qualname__, groups, states]


def _switch(value: Any) -> Any:
    """The part of a setting that decides on operations: whether a float is 0; a tensor's shape, dtype and device.

    Raises:
        CostError: for a setting of another kind.
    """
    if isinstance(value, torch.Tensor):
        return [list(value.shape), str(value.dtype), str(value.device)]
    if isinstance(value, (list, tuple)):
        return [_switch(each) for each in value]
    if isinstance(value, float):
        return f"float {value != 0}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise CostError(f"a setting is a {type(value).__name__}")


class _Pool:
    """Different things in order, and the place of each: a step says the same shapes over and over."""

    def __init__(self) -> None:
        self.facts: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, facts: Any) -> int:
        """The place of this thing."""
        found = self._places.setdefault(json.dumps(facts), len(self.facts))
        if found == len(self.facts):
            self.facts.append(facts)
        return found


_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
"""Arguments that are kept as their names."""


def _encoded(tape: Tape) -> dict[str, Any] | None:
    """The tape in JSON's own kinds; None where an operation has an argument of another kind."""
    operands, specs, targets = _Pool(), _Pool(), _Pool()

    @cache
    def operand(each: Operand) -> int:
        shape = list(map(encode_size, each.shape))
        return operands.place([shape, list(each.order), list(each.expanded), _name(each.dtype)])

    @cache
    def spec(each: pytree.TreeSpec) -> int:
        return specs.place(pytree.treespec_dumps(each))

    def leaf(each: Any) -> Any:
        if isinstance(each, Operand):
            return ["operand", operand(each)]
        if isinstance(each, Size):
            return ["size", encode_size(each)]
        for kind, of in _NAMED.items():
            if isinstance(each, of):
                return [kind, _name(each)]
        if each is None or isinstance(each, (bool, int, float, str)):
            return each
        raise CostError(f"{each!r} is not kept")

    try:
        operations = [
            [
                targets.place(str(each.target)),
                list(map(leaf, each.leaves)),
                spec(each.spec),
                list(map(operand, each.outputs)),
            ]
            for each in tape.operations
        ]
    except (CostError, NotImplementedError):
        return None
    return {
        "operations": operations,
        "operands": operands.facts,
        "specs": specs.facts,
        "targets": targets.facts,
        "storages": [[each.itemsize, list(map(encode_size, each.sizes))] for each in tape.storages],
        "events": [[number, made] for number, made in tape.events],
    }


def _decoded(facts: Any) -> Tape:
    operands = [
        Operand(tuple(map(decode_size, shape)), tuple(order), tuple(expanded), _named("dtype", kind))
        for shape, order, expanded, kind in facts["operands"]
    ]
    specs = [pytree.treespec_loads(each) for each in facts["specs"]]
    targets = [_target(each) for each in facts["targets"]]

    def leaf(each: Any) -> Any:
        if not isinstance(each, list):
            return each
        kind, value = each
        if kind == "operand":
            return operands[value]
        return decode_size(value) if kind == "size" else _named(kind, value)

    operations = tuple(
        Operation(targets[target], tuple(map(leaf, leaves)), specs[spec], tuple(operands[each] for each in outputs))
        for target, leaves, spec, outputs in facts["operations"]
    )
    storages = tuple(Storage(int(size), tuple(map(decode_size, sizes))) for size, sizes in facts["storages"])
    events = tuple((int(number), bool(made)) for number, made in facts["events"])
    if not all(0 <= number < len(storages) for number, _ in events):
        raise ValueError("an event is of no storage")
    return Tape(operations, storages, events)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _named(kind: str, name: str) -> Any:
    found = torch.device(name) if kind == "device" else getattr(torch, name)
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return found


def _target(name: str) -> Any:
    """The operation of a name such as "aten.mm.default"."""
    space, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"{name!r} is no operation")
    return found
