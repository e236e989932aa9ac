"""A function of the user's own, named on the command line as `module.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from setpoint.errors import UsageError
from setpoint.messages import did_you_mean


def is_own_function(target: str) -> bool:
    """Whether the name is that of a function in a file.

    >>> is_own_function("folder/task.py:make"), is_own_function("cifar10")
    (True, False)
    """
    return ".py:" in target


def own_function(target: str) -> Callable[[], Any]:
    """The function without arguments of a Python file, which may import modules beside it.

    Raises:
        UsageError: there is no such file, or it has no such function.
    """
    path, name = check_own_function(target)
    module = _module(path.resolve(), path.read_bytes())
    function = getattr(module, name, None)
    if not callable(function):
        raise _absent(path, name, [each for each, value in vars(module).items() if inspect.isfunction(value)])
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UsageError(f"{target} must take nothing, since it is called with nothing: {error}") from None
    return function  # type: ignore[no-any-return]


def check_own_function(target: str) -> tuple[Path, str]:
    """The file and the name of a function; the file is read, and not run.

    Raises:
        UsageError: there is no such file, or the name stands nowhere in it.
    """
    if not is_own_function(target):
        raise UsageError(f"{target!r} names no function: give a function of a Python file as module.py:function")
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"no file {path}: give an existing Python file as module.py:function")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not re.search(rf"\b{re.escape(name)}\b|\bimport \*", text):
        raise _absent(path, name, re.findall(r"^(?:async )?def (\w+)", text, re.MULTILINE))
    return path, name


def _absent(path: Path, name: str, own: list[str]) -> UsageError:
    if "@" in name:
        return UsageError(f"{path} has no function {name!r}: only methods of Setpoint's own have settings by name")
    listed = f"it has {', '.join(own)}" if own else "it has no functions"
    return UsageError(f"{path} has no function {name!r}: {did_you_mean(name, own)}{listed}")


@cache
def _module(path: Path, source: bytes) -> ModuleType:
    """A file's module, loaded once for each text of it.

    Its module name is unique, so that the file may have the name of any other module, or of another file.
    """
    name = f"own_{path.stem}"
    while (other := sys.modules.get(name)) is not None and Path(other.__file__ or "") != path:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    if path.stem in sys.stdlib_module_names:
        importlib.import_module(path.stem)  # before the file's folder hides it
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def named_errors(target: str) -> Iterator[None]:
    """Turn any exception of a user's file into one line: function, place in the file, and message.

    Raises:
        UsageError: in place of anything but itself.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        path = Path(target.rpartition(":")[0]).resolve()
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f' at {path.name}:{lines[-1].lineno}: "{lines[-1].line}"' if lines else ""
        if isinstance(error, SyntaxError) and error.lineno is not None:
            where = f" at {Path(error.filename or path).name}:{error.lineno}"
        said = str(error).strip().partition("\n")[0] or "no message"
        raise UsageError(
            f"{target} raised {type(error).__name__}: {said} ({where.strip() or 'outside the file'})"
        ) from error
