"""Carried sizes: what a state dict says of a cut model's shapes, by which a dense one is made to fit before a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.actuator.cut import SizePlace
from setpoint.actuator.lineage import adopt, note_cut, shapes_before, sizes_before, sizes_now
from setpoint.actuator.shrink import named_tensors
from setpoint.actuator.sizes import apply_sizes, check_sizes, record_buffers, record_dense, recorded_buffers
from setpoint.actuator.swap import swap
from setpoint.actuator.take import in_format
from setpoint.errors import CheckpointError, GroupError

KEY = "setpoint"
"""Where in the metadata of a state dict's root the sizes are."""
FORMAT = 1
"""Version of their form, described in docs/checkpoint-format.md."""


@dataclass(frozen=True, eq=False)
class Carried:
    """The shapes of a cut model beside its tensors.

    Args:
        sizes: by module name and place, the integer that cuts have set there.
        dense: by name of each tensor that was cut, the shape that it had before.
        transient: by name, the non-persistent buffers that were cut: no state dict holds them.
    """

    sizes: Mapping[SizePlace, int]
    dense: Mapping[str, tuple[int, ...]]
    transient: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Carried | None:
        """Of a model; None for one that was never cut."""
        dense = shapes_before(model)
        if not dense:
            return None
        tensors = named_tensors(model)
        return cls(sizes_now(model), dense, {name: tensors[name].detach() for name in recorded_buffers(model)})

    def plain(self) -> dict[str, Any]:
        """As dicts, lists, strings, integers and tensors, which `torch.load(..., weights_only=True)` reads."""
        sizes: dict[str, dict[str, int]] = {}
        for (module, place), size in self.sizes.items():
            sizes.setdefault(module, {})[place] = size
        dense = {name: list(shape) for name, shape in self.dense.items()}
        return {"format": FORMAT, "sizes": sizes, "dense": dense, "transient": dict(self.transient)}

    @classmethod
    def parse(cls, value: Any) -> Carried:
        """From `plain`'s form.

        Raises:
            CheckpointError: for a newer form, or for anything else.
        """
        try:
            if int(value["format"]) > FORMAT:
                raise CheckpointError(
                    f"the state dict has sizes of format {value['format']}, this Setpoint reads up to {FORMAT}: "
                    "upgrade Setpoint"
                )
            places = {
                (_text(module), _text(place)): _length(size)
                for module, sizes in value["sizes"].items()
                for place, size in sizes.items()
            }
            dense = {_text(name): tuple(map(_length, shape)) for name, shape in value["dense"].items()}
            transient = {_text(name): _tensor(tensor) for name, tensor in value["transient"].items()}
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the sizes that the state dict carries are damaged: {error!r}") from error
        return cls(places, dense, transient)

    def under(self, path: str) -> Carried:
        """The same for a module that has this one as its submodule `path`."""
        return Carried(
            {(f"{path}.{module}".rstrip("."), place): size for (module, place), size in self.sizes.items()},
            {f"{path}.{name}": shape for name, shape in self.dense.items()},
            {f"{path}.{name}": tensor for name, tensor in self.transient.items()},
        )

    @classmethod
    def union(cls, parts: Sequence[Carried]) -> Carried:
        """Of several submodules."""
        return cls(
            {at: size for part in parts for at, size in part.sizes.items()},
            {name: shape for part in parts for name, shape in part.dense.items()},
            {name: tensor for part in parts for name, tensor in part.transient.items()},
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no length")
    return value


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} is no tensor")
    return value


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer as the model's code built it, by name."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()} | shapes_before(model)


@torch.no_grad()
def fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[SizePlace, int]) -> ExitStack:
    """Give a model other shapes, of which the values are to be loaded next; all or nothing.

    Tensors keep their identity, device, dtype and memory format. What is not named gets its dense shape and size.

    Args:
        shapes: by name of each tensor that is narrower than when the model was built.
        sizes: by module and place, the integers that go with them.

    Returns:
        What puts everything back when it is closed.

    Raises:
        CheckpointError: for what this model does not have, or is wider than this model was when it was built.
    """
    tensors, dense = named_tensors(model), dense_shapes(model)
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"the state dict is of another model: this one has no {name!r}")
        if len(shape) != len(dense[name]) or any(new > old for new, old in zip(shape, dense[name], strict=True)):
            raise CheckpointError(
                f"the state dict is of another model: {name!r} has shape {shape} there and {dense[name]} in the dense "
                "model, which can only become narrower"
            )
    try:
        check_sizes(model, sizes)
    except GroupError as error:
        raise CheckpointError(f"the state dict is of another model: {error}") from error
    with ExitStack() as undo:
        after = {name: shapes.get(name, dense[name]) for name in shapes_before(model).keys() | shapes.keys()}
        adopt(model, undo)
        record_dense(model, {name: dense[name] for name in shapes}, undo)
        every = {**sizes_before(model), **sizes}
        note_cut(model, {name: dense[name] for name in shapes}, after, every, undo)
        for name in sorted(after.keys() & tensors.keys()):
            tensor, shape = tensors[name], after[name]
            if tuple(tensor.shape) != shape:
                swap(tensor, in_format(tensor.new_zeros(shape), tensor), undo)
        apply_sizes(model, every, undo)
        torch.clear_autocast_cache()
        return undo.pop_all()


@torch.no_grad()
def fill(model: nn.Module, transient: Mapping[str, Tensor], undo: ExitStack) -> None:
    """Give non-persistent buffers, which are in no state dict, the values that came beside it."""
    tensors = named_tensors(model)
    for name, value in transient.items():
        undo.callback(tensors[name].copy_, tensors[name].clone())
        tensors[name].copy_(value)
    record_buffers(model, transient, undo)
