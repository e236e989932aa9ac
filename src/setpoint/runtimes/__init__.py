"""Runtimes: where a model is served, and how many seconds it takes there. A budget of milliseconds names one.

Each of them is a small value: `OnnxRuntime(threads=1)`. A function `(model, example) -> seconds` is a runtime, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from setpoint.errors import BudgetError
from setpoint.messages import did_you_mean
from setpoint.runtimes.runtime import Called, Compiled, Eager, Forward, Runtime

if TYPE_CHECKING:
    from setpoint.runtimes.command import Command
    from setpoint.runtimes.executorch import ExecuTorch
    from setpoint.runtimes.exported import Exported, export, open_file
    from setpoint.runtimes.onnx import OnnxRuntime
    from setpoint.runtimes.openvino import OpenVINO

NAMES = {
    "eager": "Eager",
    "compiled": "Compiled",
    "onnxruntime": "OnnxRuntime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}
"""The runtimes that a budget can name, such as "8 ms onnxruntime", and their classes."""

_LEAVES = {
    "Command": "setpoint.runtimes.command",
    "ExecuTorch": "setpoint.runtimes.executorch",
    "Exported": "setpoint.runtimes.exported",
    "OnnxRuntime": "setpoint.runtimes.onnx",
    "OpenVINO": "setpoint.runtimes.openvino",
    "export": "setpoint.runtimes.exported",
    "open_file": "setpoint.runtimes.exported",
}
"""Classes and functions that are imported when somebody asks for them."""


def __getattr__(name: str) -> Any:
    if name in _LEAVES:
        return getattr(import_module(_LEAVES[name]), name)
    raise AttributeError(f"module 'setpoint.runtimes' has no attribute {name!r}")


def named(name: str) -> Runtime:
    """The runtime of that name, on one thread.

    Raises:
        BudgetError: there is none; the message lists those there are.

    >>> named("eager")
    Eager()
    """
    if name not in NAMES:
        raise BudgetError(f"unknown runtime {name!r}: {did_you_mean(name, NAMES)}use one of {', '.join(NAMES)}")
    made: Runtime = (globals().get(NAMES[name]) or __getattr__(NAMES[name]))()
    return made


def as_runtime(value: Any) -> Runtime:
    """A runtime from what a user gives: a runtime, its name, or a function `(model, example) -> seconds`.

    Raises:
        BudgetError: it is none of these.
    """
    if isinstance(value, str):
        return named(value)
    if isinstance(value, type):
        raise BudgetError(f"runtime={value.__name__} is a class: give an object, {value.__name__}(...)")
    if isinstance(value, Runtime):
        return value
    if callable(value):
        return Called(value)
    raise BudgetError(
        f"a runtime is one of setpoint.runtimes, its name, or a function (model, example) -> seconds; got {value!r}"
    )


__all__ = [
    "NAMES", "Called", "Command", "Compiled", "Eager", "ExecuTorch", "Exported", "Forward", "OnnxRuntime", "OpenVINO",
    "Runtime", "as_runtime", "export", "named", "open_file",
]  # fmt: skip
