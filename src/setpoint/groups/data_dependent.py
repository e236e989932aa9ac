"""Data-dependent paths: a forward that decides by values of tensors, exported on the path that the example takes."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

TORCH_FOLDER = Path(torch.__file__).parent
_PACKAGE = Path(__file__).parents[1]
_STANDARD = Path(sysconfig.get_path("stdlib"))


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
        yield


_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<number>\d+).*\n\s+(?P<text>.*)')


def users_question(graph: fx.Graph) -> tuple[fx.Node, str] | None:
    """The first op of a graph in which the user's own code asks for a value, and its line; None if there is none.

    The path of a library is that of the example. A user can replace an `if` in code of his own, and is asked to.
    """
    for node in graph.nodes:
        if getattr(node.target, "__name__", "").startswith(("item", "_local_scalar_dense")):
            lines = [line for line in _LINE.finditer(node.meta.get("stack_trace") or "") if is_code(line["file"])]
            if lines and not is_library(lines[-1]["file"]):
                file, number, text = lines[-1].group("file", "number", "text")
                return node, f'(at {file}:{number}: "{text}")'
    return None


def is_library(file: str) -> bool:
    """Whether a file is of an installed package, so that it is not the user's to change."""
    path = Path(file)
    return _installed(path) or TORCH_FOLDER in path.parents


def is_code(file: str) -> bool:
    """Whether a file holds code of models: no inner parts of torch, of this package, of Python or of type checks."""
    path = Path(file)
    if TORCH_FOLDER in path.parents:
        return TORCH_FOLDER / "nn" in path.parents and path.name != "module.py"
    if file.startswith("<") or _PACKAGE in path.parents or {"jaxtyping", "beartype"} & set(path.parts):
        return False
    return _STANDARD not in path.parents or _installed(path)


def _installed(path: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(path.parts))
