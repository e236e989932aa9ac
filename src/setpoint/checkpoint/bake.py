"""Bake: a cut model whose pickle loads where Setpoint is not installed."""

import copy
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from setpoint.actuator.in_state_dict import KEY, PENDING
from setpoint.actuator.model_shapes import RECORD
from setpoint.checkpoint.model_file import unwrap_module
from setpoint.errors import CheckpointError
from setpoint.groups.sizes_in_code import shim

_DOC = '"""Forwards of a pruned model whose code writes sizes of its own: it belongs to the model\'s pickle."""'
_HEAD = f'''{_DOC}

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class PathError(RuntimeError):
    """A forward that makes other calls than when the model was pruned."""


'''
_HOOKS = ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def bake(model: nn.Module, file: str | os.PathLike[str] = "setpoint_baked.py") -> nn.Module:
    """A copy of a cut model that does not need Setpoint, for `torch.save(model)` and other pickles.

    Sizes in attributes stay as they are. Where a model's own code writes sizes that a cut has made wrong, a small class
    corrects its forward; `bake` writes that class as a plain Python file, which the pickle imports by its name in place
    of Setpoint. A model without such code needs no file, and none is written.

    Args:
        model: cut; it stays as it is.
        file: where to write the class: importable by the name of the file wherever the pickle is loaded.

    Raises:
        CheckpointError: for a file whose name is none of a module, or that of another module or file.

    >>> bake(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    path = Path(file)
    if not (path.suffix == ".py" and path.stem.isidentifier()):
        raise CheckpointError(f"{str(path)!r} is no file that Python can import: name it such as 'small_model.py'")
    _check_free(path)
    baked: nn.Module = copy.deepcopy(unwrap_module("bake", model))
    written: ModuleType | None = None
    for module in baked.modules():
        # A pickle keeps `__dict__`: what Setpoint noted there would be of no use without it.
        for record in (RECORD, PENDING):
            module.__dict__.pop(record, None)
        for hooks in _HOOKS:
            getattr(module, hooks).pop(KEY, None)
        forward = module.__dict__.get("forward")
        if isinstance(forward, (shim.SizedForward, shim.HeadsForward)):
            # Pickle stores a class by its module's name, so the written class stands in place of Setpoint's here, too.
            written = written or _written(path)
            module.__dict__["forward"] = getattr(written, type(forward).__name__)(module, dict(forward.sizes))
    return baked


def _check_free(path: Path) -> None:
    """Check that neither a file nor a module of this name is there, unless `bake` wrote it."""
    known = sys.modules.get(path.stem)
    spec = importlib.util.find_spec(path.stem) if known is None else None
    foreign = known is not None and getattr(known, "__doc__", None) != _DOC.strip('"')
    taken = "a module that is imported now" if foreign else ""
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != path.resolve():
        taken = f"a module that Python finds: {spec.origin}"
    elif path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_DOC):
        taken = "a file that bake did not write"
    if taken:
        raise CheckpointError(f"{str(path)!r} has the name of {taken}. Give bake another one, such as 'small_model.py'")


def _written(path: Path) -> ModuleType:
    source = inspect.getsource(shim)
    text = _HEAD + source[source.index("_PIECES = ") :]  # without the imports, some of which are Setpoint's
    known = sys.modules.get(path.stem)
    same = known is not None and Path(str(known.__file__)).is_file() and inspect.getsource(known) == text
    path.write_text(text, encoding="utf-8")
    if known is not None and same:  # a model that was baked before can be pickled still
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickle looks classes up there
    spec.loader.exec_module(module)
    return module
