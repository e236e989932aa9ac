"""A function of the user's own, named on the command line as `module.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setpoint.bench.task import BenchError


def is_own_function(target: str) -> bool:
    """Whether the name is that of a function in a file.

    >>> is_own_function("folder/task.py:make"), is_own_function("cifar10")
    (True, False)
    """
    return ".py:" in target


def own_function(target: str) -> Callable[[], Any]:
    """The function of a Python file; modules beside the file can be imported by it.

    The file is loaded under a name of its own, so that it may be called like any module there is.

    Raises:
        BenchError: there is no such file, or it has no such function.
    """
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise BenchError(f"no file {path}: give an existing Python file as module.py:function")
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    if path.stem in sys.stdlib_module_names:
        importlib.import_module(path.stem)  # before the file's folder hides it
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    function = getattr(module, name, None)
    if not callable(function):
        raise BenchError(f"{path} has no function {name!r}")
    return function  # type: ignore[no-any-return]


@contextmanager
def named_errors(target: str) -> Iterator[None]:
    """Whatever a user's file raises becomes one line: which function, where in the file, and what was said.

    Raises:
        BenchError: in place of anything but itself.
    """
    try:
        yield
    except BenchError:
        raise
    except Exception as error:
        path = Path(target.rpartition(":")[0]).resolve()
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        where = f' at {path.name}:{lines[-1].lineno}: "{lines[-1].line}"' if lines else ""
        if isinstance(error, SyntaxError) and error.lineno is not None:
            where = f" at {Path(error.filename or path).name}:{error.lineno}"
        said = str(error).strip().partition("\n")[0] or "no message"
        raise BenchError(
            f"{target} raised {type(error).__name__}: {said} ({where.strip() or 'outside the file'})"
        ) from error
