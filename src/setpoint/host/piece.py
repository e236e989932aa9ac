"""A piece: a parameter that `fully_shard` has spread over ranks, and where FSDP keeps what it knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from setpoint.distributed import is_sharded
from setpoint.errors import LoopError


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter that lies on several ranks."""

    owner: list[Any]  # the list of FSDP's parameters that are communicated together
    place: int  # where it is in that list
    parameter: nn.Parameter  # what model and optimizers hold, a DTensor; it stays the same object for good

    @property
    def fsdp(self) -> Any:
        """What FSDP keeps of it."""
        return self.owner[self.place]

    def show(self, parameter: nn.Parameter) -> None:
        """Let the modules have this in its place."""
        self.fsdp._setattr_on_modules(parameter)


def states_of(model: nn.Module) -> list[Any]:
    """FSDP's state of each module, or list of modules, that `fully_shard` was called on; each once."""
    states = [module._get_fsdp_state() for module in model.modules() if is_sharded(module)]  # type: ignore[operator]
    return list({id(state): state for state in states}.values())


def brackets(model: nn.Module) -> list[tuple[nn.Module, list[tuple[dict[str, Any], str, nn.Parameter]]]]:
    """The modules that FSDP makes whole for their forward pass, with the places of the parameters that are then whole.

    A place is the table of a module's parameters and a key in it; beside it is the sharded parameter that is there
    otherwise.
    """
    found: list[tuple[nn.Module, list[tuple[dict[str, Any], str, nn.Parameter]]]] = []
    for state in states_of(model):
        pieces = [fsdp for group in groups_of(state) for fsdp in group.fsdp_params]
        for module in state._modules:
            inside, places = set(module.modules()), []
            for fsdp in pieces:
                info = fsdp._module_info
                owners = [
                    (info.module, info.param_name),
                    *zip(info.shared_modules, info.shared_param_names, strict=True),
                ]
                places += [(m._parameters, name, fsdp.sharded_param) for m, name in owners if m in inside]
            found.append((module, places))
    return found


def groups_of(state: Any) -> list[Any]:
    """What FSDP communicates together, of one state."""
    several = getattr(state, "_fsdp_param_groups", None)
    return list(several) if several is not None else [each for each in [state._fsdp_param_group] if each]


def pieces_of(model: nn.Module) -> list[Piece]:
    """All pieces of a model, in FSDP's order."""
    return [
        Piece(group.fsdp_params, place, fsdp.sharded_param)
        for state in states_of(model)
        for group in groups_of(state)
        for place, fsdp in enumerate(group.fsdp_params)
    ]


def check_pieces(model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Check that a sharded model can follow a change of sizes.

    Raises:
        LoopError: naming what cannot.
    """
    sharded = {id(each.parameter) for each in pieces}
    stray = [
        name for name, each in model.named_parameters() if id(each) not in sharded and not _unsharded(each, pieces)
    ]
    found = [each.fsdp for each in pieces]
    trouble = {
        f"{stray[0] if stray else ''} outside of it (call fully_shard on the whole model too)": bool(stray),
        "a mesh of several dims": any(each.mesh_info.mesh.ndim > 1 for each in found),
        "several meshes": len({id(each.mesh_info.mesh.get_group()) for each in found if each.mesh_info.mesh.ndim == 1})
        > 1,
        "a shard_placement_fn that does not split the first dim": any(each.fsdp_placement.dim != 0 for each in found),
        "parameters that are DTensors already": any(each.is_dtensor for each in found),
        "an offload_policy": any(each.offload_to_cpu for each in found),
        "parameters without data": any(each.parameter.is_meta for each in pieces),
    }
    names = [name for name, there in trouble.items() if there]
    if names:
        raise LoopError(f"fully_shard with {'; '.join(names)} cannot follow a cut in this version: leave that out")


def _unsharded(parameter: nn.Parameter, pieces: Sequence[Piece]) -> bool:
    """Whether it is the whole form of a piece, which modules have between a forward and a backward pass."""
    return any(getattr(each.fsdp, "_unsharded_param", None) is parameter for each in pieces)
