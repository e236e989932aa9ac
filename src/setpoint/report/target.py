"""A target: the model that a command names as `module.py:function`, and an example."""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.errors import UsageError
from setpoint.groups.example import Example
from setpoint.messages import a_type, counted, did_you_mean


def load_target(target: str, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, Example]:
    """The model and example that `module.py:function` returns: a tuple or a dict of inputs, or noise of this shape."""
    check_shape(shape)
    made = call_own(target)
    if isinstance(made, tuple) and len(made) != 2:
        raise UsageError(
            f"{target} returned {counted(len(made), 'thing')}: return a model and its inputs, as `model, (x,)`"
        )
    if isinstance(made, tuple) and shape is not None:
        raise UsageError(f"{target} returns inputs of its own: leave out --input {','.join(map(str, shape))}")
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} returned {a_type(model)}: return a torch.nn.Module, or one and its inputs")
    if example is None and shape is None:
        raise UsageError(
            f"{target} returned a model without inputs: return `model, (x,)`, or `model, {{'x': x}}` for keyword "
            "inputs; or say the shape of its one input of floats, for images --input 2,3,224,224"
        )
    example = noise(shape) if shape is not None else example
    return model, (example,) if isinstance(example, Tensor) else example


def check_shape(shape: tuple[int, ...] | None) -> None:
    """Refuse the shape of an example that has no numbers."""
    if shape is not None and min(shape) < 1:
        raise UsageError(f"sizes of an example are at least 1, got {','.join(map(str, shape))}")


def noise(shape: tuple[int, ...]) -> Tensor:
    """An example input of noise: BatchNorm cannot normalise zeros."""
    return torch.randn(shape, generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")


def is_own_function(target: str) -> bool:
    """Whether the name is that of a function in a file, such as "folder/task.py:make"."""
    return ".py:" in target


def names_a_file(target: str) -> bool:
    """Whether the name is that of a file or of a function in one, or was meant to be."""
    return is_own_function(target) or target.endswith(".py") or Path(target).is_file() or bool(_file_meant(target))


def _file_meant(target: str) -> str:
    """What to write for `module:function`, where there is such a file; empty for anything else."""
    file, colon, function = target.partition(":")
    found = [f"{name}.py" for name in (file, file.replace(".", "/")) if colon and Path(f"{name}.py").is_file()]
    return f"{target!r} names no file: did you mean {found[0]}:{function}?" if found else ""


def call_own(target: str) -> Any:
    """What a function without arguments of a Python file returns; which may import from its folder."""
    path, name = check_own_function(target)
    with _named_errors(target, path.resolve()):
        module = _module(path.resolve(), path.read_bytes())
    function = getattr(module, name, None)
    if isinstance(function, nn.Module):  # it could be called, with nothing, and would raise something unhelpful
        raise UsageError(
            f"{target} is {a_type(function)} itself: name a function without arguments that returns {name}"
        )
    if not callable(function):
        raise _absent(path, name, [name for name, value in vars(module).items() if inspect.isfunction(value)])
    with _named_errors(target, path.resolve()):
        return function()


def check_own_function(target: str) -> tuple[Path, str]:
    """The file and the name of a function that stands in it; the file is read, and not run."""
    if not is_own_function(target):
        raise UsageError(
            _file_meant(target)
            or f"{target!r} names no function: give a function of a Python file, as module.py:function"
        )
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"no file {path}: give an existing Python file as module.py:function")
    text = path.read_text(encoding="utf-8", errors="replace")
    # Before the file is run, which may take minutes: a name that is not in it is misspelt.
    if not re.search(rf"\b{re.escape(name)}\b|\bimport \*", text):
        raise _absent(path, name, re.findall(r"^(?:async )?def (\w+)", text, re.MULTILINE))
    return path, name


def _absent(path: Path, name: str, own: list[str]) -> UsageError:
    listed = f"it has {', '.join(own)}" if own else "it has no functions"
    return UsageError(f"{path} has no function {name!r}: {did_you_mean(name, own)}{listed}")


# Once for each text: a user who edits the file in a notebook gets the new one.
@cache
def _module(path: Path, source: bytes) -> ModuleType:
    root = next(folder for folder in path.parents if not (folder / "__init__.py").is_file())
    # In its package, if it has one: `from .layers import Block`. Two files may have one name: the second one's module
    # has another.
    name = ".".join((*path.parent.relative_to(root).parts, f"own_{path.stem}"))
    while name in sys.modules and sys.modules[name].__file__ != str(path):
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    # As `python file.py` and `python -m` have them, and for good: functions and forwards may import neighbours late.
    for folder in (Path.cwd(), root, path.parent):
        if str(folder) not in sys.path[:3]:
            sys.path.insert(0, str(folder))
    spec.loader.exec_module(module)
    return module


@contextmanager
def _named_errors(target: str, path: Path) -> Iterator[None]:
    """Turn any exception of a user's file into a UsageError of one line: function, place in the file, and message."""
    try:
        yield
    except Exception as error:
        # The user looks for a line of that file, and not for one of torch.
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f'at {path.name}:{lines[-1].lineno}: "{lines[-1].line}"' if lines else "outside the file"
        if isinstance(error, SyntaxError) and error.lineno is not None:
            where = f"at {Path(error.filename or path).name}:{error.lineno}"
        message = str(error).strip().partition("\n")[0] or "no message"
        raise UsageError(f"{target} raised {type(error).__name__}: {message} ({where})") from error
