"""A model that `fully_shard` or tensor parallelism has spread over ranks: whole for a while, then sharded again."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.tensors import map_tensors
from setpoint.distributed import (
    Ranks,
    check_module,
    is_sharded,
    is_sharded_tensor,
    is_spread,
    local,
    plain_kind,
    ranks_of,
    region_on,
    unsharded_tensor,
)
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.host.host import Agreed
from setpoint.host.several_ranks import SeveralRanks

_States = dict[int, dict[str, Any]]  # an optimizer's state of parameters, by their number
_STYLES = "torch.distributed.tensor"  # where the hooks are defined that `parallelize_module` puts on modules


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter that lies on several ranks, as a DTensor that its modules hold themselves."""

    parameter: nn.Parameter  # what model and optimizers hold; it stays the same object for good
    holders: tuple[tuple[nn.Module, str], ...]

    @property
    def split(self) -> dict[int, int]:
        """By dim, over how many ranks it is split so that shards must be even."""
        return _splits(self.parameter)

    @property
    def device(self) -> torch.device:
        """Where it lies while it is whole."""
        return local(self.parameter.detach()).device

    def show(self, parameter: nn.Parameter) -> None:
        """Let the modules have this in its place."""
        for module, name in self.holders:
            module._parameters[name] = parameter

    def sharded(self, plain: nn.Parameter) -> tuple[Any, Any]:
        """The DTensor of a parameter of another shape, and what FSDP would keep of it."""
        kept: Any = self.parameter
        made = sharded_like(plain.detach(), kept.device_mesh, kept.placements)
        return nn.Parameter(made, kept.requires_grad), None

    def keep(self, fsdp: Any) -> None:
        """Let FSDP keep this of it."""


@dataclass(frozen=True, eq=False)
class FSDPPiece(Piece):
    """One that FSDP communicates, of a parameter that was plain or a DTensor before."""

    owner: list[Any]  # the list of FSDP's parameters that are communicated together
    place: int  # where it is in that list

    @property
    def fsdp(self) -> Any:
        return self.owner[self.place]

    @property
    def split(self) -> dict[int, int]:
        return _splits(self.parameter) if self.fsdp.is_dtensor else {}  # FSDP alone pads uneven shards

    @property
    def device(self) -> torch.device:
        found: torch.device = self.fsdp.device
        return found

    def show(self, parameter: nn.Parameter) -> None:
        self.fsdp._setattr_on_modules(parameter)

    def sharded(self, plain: nn.Parameter) -> tuple[Any, Any]:
        """With the settings of the one that it has."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam  # what `fully_shard` itself makes

        old, whole = self.fsdp, plain.detach()
        if old.is_dtensor:  # tensor parallelism's, of which FSDP shards the shards
            before = old._unsharded_dtensor_spec
            whole = sharded_like(whole, before.mesh, before.placements)
        offload = CPUOffloadPolicy(pin_memory=old.pin_memory) if old.offload_to_cpu else OffloadPolicy()
        parameter = nn.Parameter(whole, self.parameter.requires_grad)
        meshes = (old.mesh_info, old.post_forward_mesh_info)
        new = FSDPParam(parameter, old._module_info, *meshes, old.device, None, old.mp_policy, offload)
        self.show(plain)  # FSDP has put the shard there
        new._param_fqn = old._param_fqn
        if hasattr(old, "orig_dtype"):
            new.init_dtype_attrs(old.mp_policy)
        return new.sharded_param, new

    def keep(self, fsdp: Any) -> None:
        self.fsdp._post_load_hook_handle.remove()
        fsdp.sharded_param = self.parameter
        self.owner[self.place] = fsdp


def sharded_like(tensor: Tensor, mesh: Any, placements: Any) -> Any:
    """A tensor that every rank has whole, as the DTensor on a mesh; nothing is sent."""
    from torch.distributed.tensor import DTensor

    shape: dict[str, Any] = {"shape": tensor.shape, "stride": tensor.stride()}
    own = tensor[region_on(tensor.shape, mesh, placements)].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, placements, run_check=False, **shape)


def _splits(parameter: Any) -> dict[int, int]:
    found = dict[int, int]()
    for axis, placed in enumerate(parameter.placements):
        if hasattr(placed, "dim"):
            found[placed.dim] = found.get(placed.dim, 1) * parameter.device_mesh.size(axis)
    return found


def _states_of(model: nn.Module) -> list[Any]:
    """FSDP's state of every module, or list of modules, that `fully_shard` was called on, without repeats."""
    states = [module._get_fsdp_state() for module in model.modules() if is_sharded(module)]  # type: ignore[operator]
    return list({id(state): state for state in states}.values())


def _groups_of(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # of newer versions of PyTorch
    return [group for group in (state._fsdp_param_group,) if group] if several is None else list(several)


def _pieces_of(model: nn.Module) -> list[Piece]:
    lists = [group.fsdp_params for state in _states_of(model) for group in _groups_of(state)]
    if lists:
        return [FSDPPiece(fsdp.sharded_param, (), each, place) for each in lists for place, fsdp in enumerate(each)]
    holders = dict[nn.Parameter, list[tuple[nn.Module, str]]]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded_tensor(parameter):
                holders.setdefault(parameter, []).append((module, name))
    return [Piece(parameter, tuple(places)) for parameter, places in holders.items()]


def _check_pieces(model: nn.Module, pieces: Sequence[Piece]) -> None:
    kept = [piece.fsdp for piece in pieces if isinstance(piece, FSDPPiece)]
    known = {id(piece.parameter) for piece in pieces}
    # Between a forward and a backward pass modules have the unsharded form of a piece.
    known |= {id(getattr(fsdp, "_unsharded_param", None)) for fsdp in kept}
    stray = [name for name, parameter in model.named_parameters() if kept and id(parameter) not in known]
    parallel = [fsdp._unsharded_dtensor_spec for fsdp in kept if fsdp.is_dtensor]
    parallel += [piece.parameter for piece in pieces if not isinstance(piece, FSDPPiece)]
    trouble = {
        f"{stray[0] if stray else ''} outside of it (call fully_shard on the whole model too)": bool(stray),
        "several meshes": len({fsdp.mesh_info.mesh for fsdp in kept}) > 1,
        "a shard_placement_fn that does not split the first dim": any(fsdp.fsdp_placement.dim != 0 for fsdp in kept),
        "dp_mesh_dims": any(getattr(fsdp.mesh_info, "is_spmd_mesh", False) for fsdp in kept),
        "parameters without data": any(piece.parameter.is_meta for piece in pieces),
    }
    if names := [name for name, there in trouble.items() if there]:
        raise LoopError(f"fully_shard with {'; '.join(names)} cannot follow a cut in this version: leave that out")
    meshes = {getattr(each, "mesh", None) or each.device_mesh for each in parallel}
    if len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
        raise LoopError(
            "DTensors over several meshes, or one of several dims, cannot follow a cut in this version: call "
            "parallelize_module with one mesh of one dim, such as mesh['tp'], and fully_shard with another"
        )
    if any(placed.is_partial() for each in parallel for placed in each.placements):
        raise LoopError("a parameter is a DTensor with Partial() placement, a sum that is not added up: give it shards")


class Sharded(SeveralRanks):
    """A `Host` of ranks over which `fully_shard`, tensor parallelism, or both have spread the model.

    FSDP's modules, groups, hooks and settings stay the same objects. Only its record of a parameter is made again
    where its shape changes, and the new shard is put into the DTensor that model and optimizers hold. Units go in
    blocks that leave even shards to tensor parallelism.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[Any], *, compiled: bool = False
    ) -> None:
        super().__init__(model, optimizers, copies, compiled=compiled)
        pieces = [piece for module in (model, *self.copies) for piece in _pieces_of(module)]
        _check_pieces(model, pieces)
        over = {piece.fsdp.mesh_info.mesh.size() for piece in pieces if isinstance(piece, FSDPPiece)}
        ranks = ranks_of(piece.parameter for piece in pieces)
        self._ranks = replace(ranks, alike=ranks.count // max(over, default=1))
        self.mesh = ranks.group
        splits = {id(piece.parameter): piece.split for piece in pieces}
        named = model.named_parameters(remove_duplicate=False)
        self._splits = {name: splits[id(p)] for name, p in named if splits.get(id(p))}

    @property
    def ranks(self) -> Ranks:
        return self._ranks

    def even(self, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """The groups in blocks that leave even shards; LoopError for a width that the mesh does not divide."""

        def in_blocks(group: Group) -> Group:
            block = math.lcm(*(self._splits.get(place.tensor, {}).get(place.dim or 0, 1) for place in group.slices))
            if group.num_units % block:
                raise LoopError(
                    f"the {group.num_units} units of group {group.name!r} are split over {block} ranks, which makes "
                    "uneven shards: use a mesh that divides the width, or leave the group out (groups=...)"
                )
            size = math.lcm(group.multiple_of, block)
            size = size if group.num_units % size == 0 else block
            least = -(-group.min_units // size) * size
            return group if block == 1 else replace(group, multiple_of=size, only_blocks=True, min_units=least)

        return tuple(map(in_blocks, groups))

    @property
    def single_process(self) -> bool:
        return False  # not even a single rank has plain tensors

    def before_step(self, *, first: bool) -> None:
        """Let the modules have their own shards, as after a backward pass, also where a forward pass came last."""
        _reshard(self.model)
        self._warn_of_unfrozen()

    def _open(self, groups: tuple[Group, ...], agree: Agreed) -> AbstractContextManager[Agreed]:
        return self._gathered({part.tensor for group in groups for part in group.slices}, agree)

    @contextmanager
    def _gathered(self, names: Collection[str] | None, agreed: Agreed) -> Iterator[Agreed]:
        """Inside, these parameters (None: all) and their optimizer state are unsharded, plain and free to change shape.

        Every rank has all of them for as long as that. At the end modules and optimizers hold the same sharded objects
        again, with the contents that they had when what is yielded was last called without an error; if it never was,
        everything is as before, to the last bit.
        """
        pieces = self._pieces(names)
        plain = [nn.Parameter(_own(p.parameter, p.device), p.parameter.requires_grad) for p in pieces]
        sharded = [piece.parameter for piece in pieces]
        states = [
            _mapped(optimizer, sharded, lambda number, tensor: _own(tensor, pieces[number].device))
            for optimizer in self.optimizers
        ]
        take_effect: Callable[[], None] | None = None

        def reshard() -> None:
            nonlocal take_effect
            made = [_sharded_anew(piece, parameter) for piece, parameter in zip(pieces, plain, strict=True)]
            parts = [
                _mapped(optimizer, plain, lambda number, tensor: _shard(tensor, plain[number], made[number][0]))
                for optimizer in self.optimizers
            ]
            agreed()
            take_effect = partial(self._take_effect, pieces, made, parts)

        try:
            with ExitStack() as undo:
                self._show(pieces, plain, states, undo)
                yield reshard
        finally:
            # Only here: the modules have their sharded parameters back, which `take_effect` gives new contents.
            if take_effect is not None:
                take_effect()

    def _show(
        self, pieces: Sequence[Piece], plain: Sequence[nn.Parameter], states: Sequence[_States], undo: ExitStack
    ) -> None:
        """Let model, copies and optimizers have these parameters, and their states, until `undo` is closed."""
        instead = {id(piece.parameter): parameter for piece, parameter in zip(pieces, plain, strict=True)}
        for piece, parameter in zip(pieces, plain, strict=True):
            undo.callback(piece.show, piece.parameter)
            piece.show(parameter)
        for optimizer, by_piece in zip(self.optimizers, states, strict=True):
            undo.callback(_restore, optimizer.state, dict(optimizer.state))
            for number, state in by_piece.items():
                del optimizer.state[pieces[number].parameter]
                optimizer.state[plain[number]] = state
            for settings in optimizer.param_groups:
                undo.callback(settings.__setitem__, "params", settings["params"])
                settings["params"] = [instead.get(id(parameter), parameter) for parameter in settings["params"]]

    def _take_effect(self, pieces: Sequence[Piece], made: Sequence[Any], states: Sequence[_States]) -> None:
        """Put in place what each piece is to hold, and states by optimizer and piece; this cannot fail."""
        from torch.distributed.tensor import DTensor

        for piece, (new, fsdp) in zip(pieces, made, strict=True):
            parameter: Any = piece.parameter
            # The same DTensor at another shape: its own metadata by `data`, then what it is made of.
            parameter.grad = None
            # Only another dtype resets what accumulates its gradient, which an old loss keeps alive at the old shape.
            other = torch.float16 if new.dtype != torch.float16 else torch.float32
            parameter.data = DTensor.from_local(torch.empty(0, dtype=other), new.device_mesh, run_check=False)
            parameter.data = new.detach()
            parameter._local_tensor, parameter._spec = new._local_tensor, new._spec
            piece.keep(fsdp)
            piece.show(parameter)
        for optimizer, by_piece in zip(self.optimizers, states, strict=True):
            for number, state in by_piece.items():
                optimizer.state[pieces[number].parameter] = state

    def _pieces(self, names: Collection[str] | None) -> list[Piece]:
        pieces = []
        for module in (self.model, *self.copies):
            _reshard(module)
            parameters = dict(module.named_parameters(remove_duplicate=False))
            # A copy may hold the model as its `module`.
            asked = parameters if names is None else [prefix + name for name in names for prefix in ("", "module.")]
            wanted = {id(parameters[name]) for name in asked if name in parameters}
            pieces += [piece for piece in _pieces_of(module) if id(piece.parameter) in wanted]
        return pieces

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Inside, model and copies are plain modules that know nothing of FSDP, and can be run, copied and exported."""
        with self._gathered(None, lambda: None), ExitStack() as undo:
            for module in (self.model, *self.copies):
                _plain(module, undo)
            yield


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Unshard a model: inside the `with` block one that lies in shards on several ranks is a plain model on each.

    Shards are made by `fully_shard`, or by tensor parallelism; other models stay as they are. All ranks enter and leave
    together. Changes that are made inside do not last.

    >>> with unsharded(nn.Linear(2, 3)) as plain:
    ...     plain
    Linear(in_features=2, out_features=3, bias=True)
    """
    check_module(model)
    if not is_spread(model):
        yield model
        return
    with Sharded(model, (), ()).unsharded():
        yield model


def _mapped(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], function: Callable[[int, Tensor], Tensor]
) -> _States:
    """By number, the state that an optimizer has for a parameter, with each tensor in it replaced."""
    return {
        n: {key: map_tensors(value, lambda t, _, n=n: function(n, t), key) for key, value in optimizer.state[p].items()}  # type: ignore[misc]
        for n, p in enumerate(parameters)
        if p in optimizer.state
    }


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    held = tensor.detach()
    # Offloaded shards lie in host memory, and a GPU's ranks send only what is on the GPU.
    unsharded = unsharded_tensor(held.to(device) if is_sharded_tensor(held) else held)
    # On one rank `full_tensor` gives the shard itself, which a plain copy must not share memory with.
    return unsharded.clone() if unsharded.data_ptr() == local(held).data_ptr() else unsharded


def _sharded_anew(piece: Piece, plain: nn.Parameter) -> tuple[Any, Any]:
    return piece.sharded(plain)


def _shard(tensor: Tensor, plain: nn.Parameter, like: Any) -> Tensor:
    """This rank's part of a state of the parameter's shape; any other state stays."""
    if tensor.shape != plain.shape:
        return tensor
    made: Tensor = sharded_like(tensor, like.device_mesh, like.placements).to(local(like.detach()).device)
    return made


def _restore(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    table.clear()
    table.update(before)


def _plain(model: nn.Module, undo: ExitStack) -> None:
    """Take the hooks of FSDP and of tensor parallelism, and FSDP's classes and marks, off the modules."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    for state in _states_of(model):
        handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
        for group in _groups_of(state):
            handles += [fsdp._post_load_hook_handle for fsdp in group.fsdp_params]
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
        for handle in handles:
            for single in getattr(handle, "handles", (handle,)):
                hooks = single.hooks_dict_ref()
                undo.callback(_restore, hooks, dict(hooks))
                hooks.pop(single.id, None)
    marks = (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params")
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(str(getattr(hook, "__module__", "")).startswith(_STYLES) for hook in hooks.values()):
                undo.callback(_restore, hooks, dict(hooks))
                kept = {n: h for n, h in hooks.items() if not str(getattr(h, "__module__", "")).startswith(_STYLES)}
                _restore(hooks, kept)
        for mark in [mark for mark in marks if mark in module.__dict__]:
            undo.callback(module.__dict__.__setitem__, mark, module.__dict__.pop(mark))
        if is_sharded(module):
            undo.callback(setattr, module, "__class__", type(module))
            module.__class__ = plain_kind(module)
