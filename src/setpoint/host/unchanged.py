"""Unchanged: whether model and copies are still the ones that were attached, but for what the loop has cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor
from setpoint.errors import LoopError, RankError
from setpoint.groups.group import Group


class Unchanged:
    """A model and its copies as they were when they were attached; as a context manager it explains what is raised.

    Args:
        groups: says how wide the groups are by now.
    """

    def __init__(self, model: nn.Module, copies: Sequence[object], groups: Callable[[], tuple[Group, ...]]) -> None:
        self._model, self._groups, self._before = model, groups, named_tensors(model)
        self._ties, fits = _ties(self._before), _wide(groups())
        self._copies = {n: each for n, each in enumerate(copies) if not _misfit(_of_copy(each), fits)}

    def check(self) -> None:
        """Check that tensors that may be cut are the same, with the same ties and the size that they were cut to.

        Of copies, and of weights sharded over ranks, names and sizes are looked at. LoopError says what has changed.
        """
        if what := self._change():
            raise LoopError(
                f"{what} since attach. Nothing was cut now; loop.detach() lets training go on as it is, and attach "
                "prunes the model as it will be then"
            )

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, (LoopError, RankError)):
            try:
                self.check()
            except LoopError as explained:
                raise explained from error

    def _change(self) -> str:
        """What has changed, as the beginning of a sentence; "" if nothing has."""
        now = named_tensors(self._model)
        wide = _wide(self._groups())
        if found := _misfit(now, wide):
            name, misfit = found
            owner = name.rpartition(".")[0]
            instead = [repr(each) for each in now.keys() - self._before.keys() if each.startswith(f"{owner}.")]
            beside = f", but {', '.join(sorted(instead)[:3])}" if instead else ""
            return f"the model was changed: {misfit}{beside}"
        ties = _ties(now)
        for name in dict.fromkeys(name for name, _ in wide):
            before, tensor = self._before[name], now[name]
            if isinstance(before, nn.Parameter) and tensor is not before and not is_sharded_tensor(before):
                return f"the model was changed: {name!r} is another tensor"
            if other := next(iter(sorted(ties[name] ^ self._ties[name])), ""):
                are = "were tied" if other in ties[name] else "are tied no longer"
                return f"the model was changed: {name!r} and {other!r} {are}"
        for number, each in self._copies.items():
            if found := _misfit(_of_copy(each), wide):
                return f"copies[{number}] ({type(each).__name__}) was changed: {found[1]}"
        return ""


def _wide(groups: Sequence[Group]) -> dict[tuple[str, int | None], int]:
    """By tensor and dim, how long it is where units lie in it."""
    return {(each.tensor, each.dim): len(each.index) for group in groups for each in group.slices}


def _of_copy(copy: object) -> dict[str, Tensor]:
    """Its tensors by the model's names."""
    tensors = named_tensors(copy) if isinstance(copy, nn.Module) else {}
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _misfit(tensors: Mapping[str, Tensor], wide: Mapping[tuple[str, int | None], int]) -> tuple[str, str] | None:
    """The first tensor that is not there or of another size, and what is wrong with it."""
    for (name, dim), length in wide.items():
        if name not in tensors:
            return name, f"it has no tensor {name!r} any more"
        shape = tuple(tensors[name].shape)
        if dim is not None and (dim >= len(shape) or shape[dim] != length):
            return name, f"{name!r} has shape {shape}, where dim {dim} should have {length} entries"
    return None


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """By name, all names of tensors that begin at the same place in memory."""
    same: dict[Any, set[str]] = {}
    keys = {name: _place(each) for name, each in tensors.items()}
    for name, key in keys.items():
        same.setdefault(key, set()).add(name)
    return {name: same[key] for name, key in keys.items()}


def _place(tensor: Tensor) -> Any:
    """Where it begins, or the object itself where there is no such place."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return (tensor.device, tensor.data_ptr()) if plain and tensor.numel() else id(tensor)
