"""Copies of a model that are cut with it, such as averages: those that the user names by `copies=`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from setpoint.actuator.tensors import named_tensors, shapes_by_name
from setpoint.distributed import is_sharded_tensor, plain_kind
from setpoint.errors import GroupError
from setpoint.groups.untouched import computed, copy_of

LISTED: WeakKeyDictionary[Any, nn.Module] = WeakKeyDictionary()
"""By object with `shadow_params`, the module that holds them, which knows the sizes of a cut."""


def find_copies(model: nn.Module, named: Sequence[Any]) -> list[Callable[[], nn.Module]]:
    """What gives each copy that the user has named as a module, with the tensors that it has at that time.

    Named are modules, in wrappers or not; objects with such a module as `module` or `ema`; or objects with
    `shadow_params` in the order of `model.parameters()`. GroupError for what is none, or shares tensors with the model.
    """
    return [_copy(model, f"copies[{number}]", given) for number, given in enumerate(named)]


def _copy(model: nn.Module, what: str, given: Any) -> Callable[[], nn.Module]:
    kind = type(given).__name__
    held = [given, *(getattr(given, name, None) for name in ("module", "ema"))]
    if isinstance(getattr(given, "shadow_params", None), list):
        module = _listed(given, model, f"{what} ({kind})")
    elif root := next((value for value in held if isinstance(value, nn.Module)), None):
        part = _like(root, model)

        def module() -> nn.Module:
            return part

    else:
        raise GroupError(
            f"{what} must be a torch.nn.Module, or have a list of tensors named shadow_params, got {kind}: keep an "
            "average in torch.optim.swa_utils.AveragedModel or in a deepcopy"
        )
    if module() is not model and any(part is module() for part in model.modules()):
        raise GroupError(
            f"{what} ({kind}) is a part of the model: attach the part that trains, as in "
            "attach(model.encoder, ..., copies=[model.average])"
        )
    own = {key for tensor in named_tensors(model).values() for key in _at(tensor)}
    shared = next((name for name, tensor in named_tensors(module()).items() if own & set(_at(tensor))), "")
    if shared:
        raise GroupError(
            f"{what} ({kind}) shares the tensor {shared!r} with the model: a copy has tensors of its own "
            "(copy.deepcopy makes one), and what shares them is cut anyway"
        )
    return module


def _listed(holder: Any, model: nn.Module, what: str) -> Callable[[], nn.Module]:
    """Of a copy in a list of tensors, as diffusers' `EMAModel` has it: a module that holds these tensors."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    listed = list(holder.shadow_params)
    shapes = [tuple(shadow.shape) if isinstance(shadow, Tensor) else None for shadow in listed]
    matching = [some for some in (parameters, trained) if shapes == [tuple(own.shape) for own in some]]
    if not matching or any(map(is_sharded_tensor, parameters)):
        raise GroupError(
            f"{what} is no copy of the model: its shadow_params must be one plain tensor for each of the model's "
            f"{len(parameters)} parameters, in their order and of their shapes"
        )
    # A deep copy whose memo has the list's tensors in the place of the parameters holds these very objects.
    stand_ins = {id(own): shadow for own, shadow in zip(matching[0], listed, strict=True)}
    twin = copy_of(model, {**computed(model), **stand_ins}, users_hooks=False)
    LISTED[holder] = twin
    tables: list[dict[str, Any]] = [module._parameters for module in twin.modules()]
    owners = [[(table, name) for table in tables for name in table if table[name] is shadow] for shadow in listed]

    def module() -> nn.Module:
        now = holder.shadow_params  # another list after `load_state_dict`
        for number, places in enumerate(owners):
            for table, name in places:  # a tensor that is gone does not fit, as a cut says
                table[name] = now[number] if number < len(now) else torch.empty(0)
        return twin

    return module


def _like(root: nn.Module, model: nn.Module) -> nn.Module:
    """The one module in it that has the class and the shapes of the model; else all of it."""
    if any(map(is_sharded_tensor, model.parameters())):
        return root
    kind, shapes = plain_kind(model), shapes_by_name(model)
    found = [module for module in root.modules() if plain_kind(module) is kind and shapes_by_name(module) == shapes]
    return found[0] if len(found) == 1 else root


def _at(tensor: Tensor) -> Iterator[tuple[str, int]]:
    yield "object", id(tensor)
    # Two tensors may be views of one memory, which a cut would free under the other.
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel():
        yield str(tensor.device), tensor.data_ptr()
