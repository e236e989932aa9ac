"""A kept tape: the recorded step of a model, kept so that the step of an equal model need not be recorded again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from setpoint.resources.tape import Operand, Operation, Storage, Tape


def kept_tape(key: str, make: Callable[[], Tape]) -> Tape:
    """The tape that was kept under a key, or a new one, which is kept; with the key "" nothing is."""
    try:
        facts = recall(key)
        if facts is not None:
            return _decoded(facts)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError):
        pass  # of another version, or with an operation that is not registered here
    tape = make()
    facts = _encoded(tape) if key else None
    if facts is not None:
        keep(key, facts)
    return tape


def tape_key(
    model: nn.Module, optimizers: Sequence[Optimizer], groups: tuple[Group, ...], fingerprint: str, what: str
) -> str:
    """The key of the step of a model with this fingerprint; "" where it has none, or an optimizer is not PyTorch's own.

    A learning rate, or any other number that is not zero, may change without another key: the operations stay.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    facts: list[Any] = [what, encode_groups(groups), sorted({str(each.device) for each in model.parameters()})]
    for each in optimizers:
        hooked = each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks
        if type(each).__module__.partition(".")[0] != "torch" or hooked:
            return ""
        facts.append(type(each).__qualname__)
        for group in each.param_groups:
            switches = {name: _switch(value) for name, value in group.items() if name != "params"}
            facts.append([[names.get(id(parameter), "") for parameter in group["params"]], switches])
        states = {names.get(id(parameter), ""): state for parameter, state in each.state.items()}
        facts.append({name: {at: _switch(value) for at, value in states[name].items()} for name in sorted(states)})
    return digest(fingerprint, json.dumps(facts, sort_keys=True))


def _switch(value: Any) -> Any:
    """What of a setting decides on operations: of a number whether it is 0, of a tensor its shape and type."""
    if isinstance(value, torch.Tensor):
        return [list(value.shape), str(value.dtype), str(value.device)]
    if isinstance(value, (list, tuple)):
        return [_switch(each) for each in value]
    return bool(value) if isinstance(value, (int, float)) else repr(value)


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

    def operand(each: Operand) -> int:
        shape = list(map(encode_size, each.shape))
        return operands.place([shape, list(each.order), list(each.expanded), _name(each.dtype)])

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
                specs.place(pytree.treespec_dumps(each.spec)),
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
    return Tape(operations, storages, tuple((int(number), bool(made)) for number, made in facts["events"]))


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
