"""Padding: which positions of a batch are tokens, and which only fill it up, by the attention masks of a forward."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class Padding:
    """Hooks on all modules that take an `attention_mask`, which note it; changes with each forward.

    A mask has a place for each position, or for each pair of query and key. A position that no query attends to is
    padding. Where a module is given None, nothing is padding. What a mask of positions says, one of pairs does not
    change: libraries let rows of padding attend to everything, so that no softmax is empty.
    """

    def __init__(self, model: nn.Module) -> None:
        self.real: Bool[Tensor, "batch positions"] | None = None
        self._handles = []
        for each in model.modules():
            place = _place_of_mask(type(each).forward)
            if place is not None or each is model:  # with each call of the model a new forward begins
                self._handles.append(each.register_forward_pre_hook(_Ear(self, place), with_kwargs=True))
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def note(self, mask: Any) -> None:
        """A module is given this mask."""
        if not isinstance(mask, Tensor):
            self.real = None
        elif mask.dim() == 2 or (mask.dim() == 4 and self.real is None):
            self.real = real_positions(mask)

    def stop(self) -> None:
        """Take the hooks off; may be called again."""
        for handle in self._handles:
            handle.remove()


def real_positions(mask: Tensor) -> Bool[Tensor, "batch positions"]:
    """Positions that are attended to, of a mask of positions (1 for a token) or of queries and keys, kept or added.

    >>> real_positions(torch.tensor([[1, 1, 0]])), real_positions(torch.tensor([[[[0.0, -1e9]]]]))
    (tensor([[ True,  True, False]]), tensor([[ True, False]]))
    """
    if mask.dim() == 2:
        return mask != 0
    attended = mask > _FAR_BELOW if mask.is_floating_point() else mask != 0
    return attended.any(2).any(1)


_FAR_BELOW = -1e3
"""What is added to a score that counts for nothing lies below this, in half precision, too."""


@lru_cache(maxsize=4096)
def _place_of_mask(forward: Callable[..., Any]) -> int | None:
    """Where the forward of a class takes its mask among its arguments, if it does."""
    try:
        names = list(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):  # a forward that is no plain function
        return None
    return names.index("attention_mask") if "attention_mask" in names else None


class _Ear:
    """A hook that does not keep its padding alive, and is deaf in a copy of the model, or in a file."""

    def __init__(self, padding: Padding | None = None, place: int | None = None) -> None:
        self._padding = (lambda: None) if padding is None else weakref.ref(padding)
        self._place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        padding = self._padding()
        if padding is not None and not torch.compiler.is_compiling():
            given = self._place is not None and len(args) > self._place
            padding.note(args[self._place] if given else kwargs.get("attention_mask"))  # type: ignore[index]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
