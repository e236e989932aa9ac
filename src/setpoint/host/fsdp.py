"""`fully_shard`: a model sharded over ranks in pieces, unsharded for a while, and sharded again at its new shapes."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.tensors import map_tensors
from setpoint.distributed import Ranks, check_module, is_sharded, local, plain_kind, rows, unsharded_tensor
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.host.host import Agreed
from setpoint.host.several_ranks import SeveralRanks

_States = dict[int, dict[str, Any]]  # an optimizer's state of parameters, by their number


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter that lies on several ranks."""

    owner: list[Any]  # the list of FSDP's parameters that are communicated together
    place: int  # where it is in that list
    parameter: nn.Parameter  # what model and optimizers hold, a DTensor; it stays the same object for good

    @property
    def fsdp(self) -> Any:
        return self.owner[self.place]

    def show(self, parameter: nn.Parameter) -> None:
        """Let the modules have this in its place."""
        self.fsdp._setattr_on_modules(parameter)


def _states_of(model: nn.Module) -> list[Any]:
    """FSDP's state of every module, or list of modules, that `fully_shard` was called on, without repeats."""
    states = [module._get_fsdp_state() for module in model.modules() if is_sharded(module)]  # type: ignore[operator]
    return list({id(state): state for state in states}.values())


def _groups_of(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # of newer versions of PyTorch
    return [group for group in (state._fsdp_param_group,) if group] if several is None else list(several)


def _pieces_of(model: nn.Module) -> list[Piece]:
    lists = [group.fsdp_params for state in _states_of(model) for group in _groups_of(state)]
    return [Piece(owner, place, fsdp.sharded_param) for owner in lists for place, fsdp in enumerate(owner)]


def _check_pieces(model: nn.Module, pieces: Sequence[Piece]) -> None:
    known = {id(piece.parameter) for piece in pieces}
    # Between a forward and a backward pass modules have the unsharded form of a piece.
    known |= {id(getattr(piece.fsdp, "_unsharded_param", None)) for piece in pieces}
    stray = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    kept = [piece.fsdp for piece in pieces]
    meshes = [fsdp.mesh_info.mesh for fsdp in kept]
    trouble = {
        f"{stray[0] if stray else ''} outside of it (call fully_shard on the whole model too)": bool(stray),
        "a mesh of several dims": any(mesh.ndim > 1 for mesh in meshes),
        "several meshes": len({id(mesh.get_group()) for mesh in meshes if mesh.ndim == 1}) > 1,
        "a shard_placement_fn that does not split the first dim": any(fsdp.fsdp_placement.dim != 0 for fsdp in kept),
        "parameters that are DTensors already": any(fsdp.is_dtensor for fsdp in kept),
        "an offload_policy": any(fsdp.offload_to_cpu for fsdp in kept),
        "parameters without data": any(piece.parameter.is_meta for piece in pieces),
    }
    if names := [name for name, there in trouble.items() if there]:
        raise LoopError(f"fully_shard with {'; '.join(names)} cannot follow a cut in this version: leave that out")


class FSDP(SeveralRanks):
    """A `Host` of ranks over which `fully_shard` has sharded the model, all over one mesh.

    FSDP's modules, groups, hooks and settings stay the same objects. Only its record of a parameter is made again
    where its shape changes, and the new shard is put into the DTensor that model and optimizers hold.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[Any], *, compiled: bool = False
    ) -> None:
        super().__init__(model, optimizers, copies, compiled=compiled)
        pieces = [piece for module in (model, *self.copies) for piece in _pieces_of(module)]
        _check_pieces(model, pieces)
        self.mesh, self._device = pieces[0].fsdp.mesh_info.mesh, pieces[0].fsdp.device

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.mesh.get_group(), self._device)

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
        plain = [nn.Parameter(_own(piece.parameter), piece.parameter.requires_grad) for piece in pieces]
        sharded = [piece.parameter for piece in pieces]
        states = [_mapped(optimizer, sharded, lambda number, tensor: _own(tensor)) for optimizer in self.optimizers]
        take_effect: Callable[[], None] | None = None

        def reshard() -> None:
            nonlocal take_effect
            made = [_sharded_anew(piece, parameter) for piece, parameter in zip(pieces, plain, strict=True)]
            parts = [
                _mapped(optimizer, plain, lambda number, tensor: _shard(tensor, plain[number], made[number]))
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
        """Put in place what FSDP is to keep of each piece, and states by optimizer and piece; this cannot fail."""
        for piece, fsdp in zip(pieces, made, strict=True):
            parameter: Any = piece.parameter
            new = fsdp.sharded_param
            # The same DTensor at another shape: its own metadata by `data`, then what it is made of.
            parameter.grad = None
            parameter.data = new.detach()
            parameter._local_tensor, parameter._spec = new._local_tensor, new._spec
            piece.fsdp._post_load_hook_handle.remove()
            fsdp.sharded_param = parameter
            piece.owner[piece.place] = fsdp
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
    """Unshard a model that `fully_shard` has sharded: inside the `with` block it is a plain model on each rank.

    Other models stay as they are. All ranks enter and leave together. Changes that are made inside do not last.

    >>> with unsharded(nn.Linear(2, 3)) as plain:
    ...     plain
    Linear(in_features=2, out_features=3, bias=True)
    """
    check_module(model)
    if not any(is_sharded(module) for module in model.modules()):
        yield model
        return
    with FSDP(model, (), ()).unsharded():
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


def _own(tensor: Tensor) -> Tensor:
    unsharded = unsharded_tensor(tensor.detach())
    # On one rank `full_tensor` gives the shard itself, which a plain copy must not share memory with.
    return unsharded.clone() if unsharded.data_ptr() == local(tensor.detach()).data_ptr() else unsharded


def _sharded_anew(piece: Piece, plain: nn.Parameter) -> Any:
    """What FSDP would keep of a parameter of this shape, with the settings of the one that it has."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam  # what `fully_shard` itself makes

    old = piece.fsdp
    offload: Any = None  # none is taken
    parameter = nn.Parameter(plain.detach(), piece.parameter.requires_grad)
    meshes = (old.mesh_info, old.post_forward_mesh_info)
    new = FSDPParam(parameter, old._module_info, *meshes, old.device, None, old.mp_policy, offload)
    piece.show(plain)  # FSDP has put the shard there
    new._param_fqn = old._param_fqn
    if hasattr(old, "orig_dtype"):
        new.init_dtype_attrs(old.mp_policy)
    return new


def _shard(tensor: Tensor, plain: nn.Parameter, fsdp: Any) -> Tensor:
    """This rank's part of a state of the parameter's shape; any other state stays."""
    if tensor.shape != plain.shape:
        return tensor
    from torch.distributed.tensor import DTensor

    like = fsdp.sharded_param
    shape = {"shape": like.shape, "stride": like.stride()}
    own = tensor[rows(like)].clone()
    made: Tensor = DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, **shape)
    return made


def _restore(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    table.clear()
    table.update(before)


def _plain(model: nn.Module, undo: ExitStack) -> None:
    """Take FSDP's hooks, classes and marks off the modules."""
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
        for mark in [mark for mark in marks if mark in module.__dict__]:
            undo.callback(module.__dict__.__setitem__, mark, module.__dict__.pop(mark))
        if is_sharded(module):
            undo.callback(setattr, module, "__class__", type(module))
            module.__class__ = plain_kind(module)
