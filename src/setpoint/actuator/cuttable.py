"""Cuttable: whether a model's tensors are those of the groups, and of a kind that can change its shape in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from setpoint.actuator.cut import Cut
from setpoint.errors import GroupError


def check_lengths(cut: Cut, tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that every tensor of the cut exists and has the length of its index tables.

    Raises:
        GroupError: naming the first that does not.
    """
    lengths: list[tuple[str, int | None, int]] = [(name, dim, kept.size) for (name, dim), kept in cut.entries.items()]
    lengths += [(name, None, kept.size) for name, kept in cut.elements.items()]
    for name, dim, length in lengths:
        if name not in tensors:
            raise GroupError(f"{what} has no tensor {name!r}: use the groups of this very model, or copies= of it")
        shape = tuple(tensors[name].shape)
        found = tensors[name].numel() if dim is None else shape[dim] if dim < len(shape) else None
        if found != length:
            where = name if dim is None else f"dim {dim} of {name}"
            raise GroupError(
                f"{where} should have {length} entries, but in {what} the tensor's shape is {shape}: use the groups "
                "of this very model, as the last cut returned them; one of copies= must be cut together with it only"
            )


def check_cuttable(changing: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that each tensor in `changing` is of a kind that can change its shape in place.

    `tensors` holds all tensors of the model by every name, so that shared memory is seen.

    Raises:
        GroupError: for a quantized, sparse, uninitialized or subclassed tensor (DTensor
            among them), one that a slice names twice by two names, or one tied through shared memory.
    """
    at: dict[tuple[torch.device, int], set[int]] = {}
    for tensor in tensors.values():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel():
            at.setdefault((tensor.device, tensor.data_ptr()), set()).add(id(tensor))
    seen: dict[int, str] = {}
    for name, tensor in changing.items():
        fake = isinstance(tensor, FakeTensor)  # it has a shape and no memory, which a cut can change all the same
        if (
            not (fake or type(tensor) in (Tensor, nn.Parameter))
            or tensor.is_quantized
            or tensor.layout != torch.strided
        ):
            kind = type(tensor).__name__
            raise GroupError(f"{name!r} is a {kind} of layout {tensor.layout}, which cannot be cut: freeze its groups")
        if id(tensor) in seen:
            raise GroupError(f"{name!r} and {seen[id(tensor)]!r} are one tensor: name it in slices by one name only")
        seen[id(tensor)] = name
        without_memory = fake or tensor.device.type == "meta"
        sharing = set() if without_memory else at.get((tensor.device, tensor.data_ptr()), set())
        if len(sharing) > 1:
            raise GroupError(
                f"{name!r} shares its memory with another tensor of the model: tie them by using one "
                "Parameter object in both places"
            )
