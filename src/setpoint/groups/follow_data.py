"""Following data: a forward whose path depends on values of tensors is exported on the path that the example takes."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TORCH = Path(torch.__file__).parent
PACKAGE = Path(__file__).parents[1]
"""The folder of this package."""
_STANDARD = Path(sysconfig.get_path("stdlib"))

DRAWS = (1.0 - 2.0**-24, 0.0)
"""The ends of what a single random draw may be: whatever is skipped with some probability is not at one of them."""

_SINGLE = {torch.rand}


class Draws(TorchFunctionMode):
    """Answers draws of a single random number, which may decide whether a layer is skipped."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer, self.asked = answer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _SINGLE or result.numel() != 1:
            return result
        self.asked = True
        return torch.full_like(result, self.answer)


class AskedForDataError(RuntimeError):
    """The user's own code decides by the values of a tensor."""


class _OwnCodeDoesNotAsk(TorchFunctionMode):
    """Refuses the values of a tensor to the user's own code, which can be changed; that of libraries gets them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING and not is_library(_asking_file()):
            raise AskedForDataError("it asks for the values of a tensor")
        return func(*args, **(kwargs or {}))


_ASKING = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist}


def _asking_file() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not is_code(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename if frame is not None else str(_TORCH)


@contextmanager
def following_data() -> Iterator[None]:
    """Inside, tensors without data carry the example's along, by which sizes and branches are decided."""
    import torch._functorch.config as config
    from torch._subclasses import meta_utils

    parts: Any = meta_utils
    before = parts._safe_copy, parts._safe_clone

    # Torch's own copies carry no data of parameters: an empty tensor is in its place.
    def copied(target: Tensor, source: Tensor | None) -> None:
        if source is not None:
            target.copy_(source.detach())

    parts._safe_copy, parts._safe_clone = copied, lambda source: source.detach().clone()
    with ExitStack() as stack:
        stack.callback(vars(parts).update, _safe_copy=before[0], _safe_clone=before[1])
        stack.enter_context(config.patch(fake_tensor_propagate_real_tensors=True))
        stack.enter_context(_OwnCodeDoesNotAsk())
        yield


# PyTorch has no public name for these; 2.10 has the first two. Later releases have the others, and warn of the first.
_VALUES = ("var_to_val", "unbacked_var_to_val", "backed_var_to_val", "real_tensor_prop_unbacked_vals")


def known(value: Any) -> Any:
    """A number of a graph, by the example's data where that decides on it."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    node: Any = value.node
    held = [vars(node.shape_env).get(name, {}) for name in _VALUES]
    answer = node.expr.xreplace({symbol: number for each in held for symbol, number in each.items()})
    if getattr(answer, "free_symbols", None):
        return value
    return node.pytype(answer)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of a tensor of a graph, by the example's data where that decides on it."""
    return torch.Size([int(known(size)) for size in tensor.shape])


def is_library(file: str) -> bool:
    """Whether a file is of an installed package, so that it is not the user's to change."""
    path = Path(file)
    return _installed(path) or _TORCH in path.parents


def is_code(file: str) -> bool:
    """Whether a file holds code of models: no inner parts of torch, of this package, of Python or of type checks."""
    path = Path(file)
    if _TORCH in path.parents:
        return _TORCH / "nn" in path.parents and path.name != "module.py"
    if file.startswith("<") or PACKAGE in path.parents or {"jaxtyping", "beartype"} & set(path.parts):
        return False
    return _STANDARD not in path.parents or _installed(path)


def _installed(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts))
