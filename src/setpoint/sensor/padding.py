"""Padding: which positions of a batch are tokens, and which only fill it up, by the attention masks of a forward."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Positions:
    """Flat positions that are no padding, of so many.

    Args:
        total: positions of the batch.
        index: of those that are real.
    """

    total: int
    index: Int[Tensor, " real"]


class Padding:
    """Hooks on all modules that take an `attention_mask`, which note it; changes with each forward.

    A mask has a place for each position (2 dims), or for each pair of query and key (4 dims); others change nothing. A
    position that no query attends to is padding. Where a module is given None, nothing is padding. What a mask of
    positions says, one of pairs does not change: libraries let rows of padding attend to everything, so that no softmax
    is empty. A mask for keys of another sequence, as in cross attention, does not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.real: Bool[Tensor, "batch positions"] | None = None
        self._positions: Positions | None = None
        self._handles = []
        for each in model.modules():
            takes = _takes(getattr(type(each), "forward", None))
            if (takes or each is model) and not isinstance(each, torch.jit.ScriptModule):
                ear = _Ear(self, takes, begins=each is model)
                self._handles.append(each.register_forward_pre_hook(ear, with_kwargs=True))
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    @property
    def positions(self) -> Positions | None:
        """The real positions of this forward; None where nothing is padding. Synchronises, once for each mask."""
        if self._positions is None and self.real is not None:
            self._positions = Positions(self.real.numel(), self.real.flatten().nonzero().flatten())
        return self._positions

    def begin(self) -> None:
        """The model is called: nothing is known of this forward yet."""
        self.real = self._positions = None

    def note(self, mask: Any) -> None:
        """A module is given this mask."""
        if mask is None:
            self.begin()
        elif isinstance(mask, Tensor) and (mask.dim() == 2 or (mask.dim() == 4 and self.real is None)):
            self.real, self._positions = real_positions(mask), None

    def stop(self) -> None:
        """Take the hooks off, and forget; may be called again."""
        for handle in self._handles:
            handle.remove()
        self.begin()


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
def _takes(forward: Callable[..., Any] | None) -> tuple[str, ...]:
    """The arguments of a class's forward, without `self`, if a mask is among them."""
    try:
        names = tuple(inspect.signature(forward).parameters)[1:]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a forward that is no plain function
        return ()
    return names if "attention_mask" in names else ()


class _Ear:
    """A hook that does not keep its padding alive, and is deaf in a copy of the model, or in a file."""

    def __init__(self, padding: Padding | None = None, names: tuple[str, ...] = (), *, begins: bool = False) -> None:
        self._padding = (lambda: None) if padding is None else weakref.ref(padding)
        self._names, self._begins = names, begins

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        padding = self._padding()
        if padding is None or torch.compiler.is_compiling():
            return
        if self._begins:
            padding.begin()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        other = given.get("key_value_states") is not None or (
            given.get("encoder_hidden_states") is not None and "encoder_attention_mask" not in self._names
        )
        if self._names and not other:
            padding.note(given.get("attention_mask"))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
