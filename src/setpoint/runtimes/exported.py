"""Export: a model as the file of a runtime, whose outputs are compared with those of PyTorch."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from setpoint.distributed import unwrapped
from setpoint.errors import ExportError
from setpoint.groups.example import Example, check_python, inputs_of
from setpoint.groups.untouched import copy_of, one_at_a_time
from setpoint.messages import did_you_mean, warn
from setpoint.runtimes import as_runtime
from setpoint.runtimes.files import ByTensor, FileRuntime, Opened, named_tensors, opened, written

_FORMATS = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far its outputs are from PyTorch's.

    Args:
        path: of the file.
        difference: the largest one between an output of the file and PyTorch's, over the largest value of that output.
        forward: the file, opened in its runtime: each call makes one forward and returns its seconds.
    """

    path: Path
    difference: float
    forward: Opened


@one_at_a_time
def export(
    model: nn.Module,
    example: Example,
    path: str | os.PathLike[str],
    to: str | FileRuntime = "onnx",
    *,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as a file of a runtime: in eval mode, without its hooks, with the shapes of the example.

    The file is opened in the runtime, and its outputs on the example are compared with PyTorch's. It takes the place of
    an older one only where they agree. Integers are never the same: a difference above the tolerance is warned of, and
    one above 1 is an error. The model stays as it is.

    Args:
        model: to export.
        example: a tuple of positional inputs or a mapping of keyword inputs, as they will be served.
        path: of the file. OpenVINO writes the weights into the same folder, in a file that ends with `.bin`.
        to: "onnx", "openvino" or "executorch", or the runtime itself, such as `OnnxRuntime(int8=True)`.
        tolerance: of the difference, as a part of the largest value of an output; by default 0.001, of integers 0.1.

    Raises:
        ExampleError: the model does not run on the example.
        ExportError: the model cannot be exported, the outputs differ, or the file cannot be written.
        RuntimeUnavailable: a package is missing, or the runtime cannot run the model.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     exported = export(nn.Linear(2, 3), (torch.ones(1, 2),), f"{folder}/small.onnx")
    >>> exported.difference < 1e-3
    True
    """
    path, runtime = Path(path), reader_of(Path(path), to)
    model = unwrapped(model)
    check_python(model)
    by_tensor = ByTensor(copy_of(model, users_hooks=False), example)
    try:
        # In the same folder, so that a rename puts the file into its place at once.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            file = Path(folder) / path.name
            written(runtime.write, by_tensor, file, runtime.name)
            forward = opened(runtime, file, by_tensor.inputs, by_tensor.compared)
            text = forward.too_far(path.name, tolerance)
            # Integers that are as far away as zeros would be are of no use.
            if text and not (runtime.int8 and forward.difference <= max(tolerance or 0.0, 1.0)):
                raise ExportError(f"{text}; nothing is written")
            for each in sorted(Path(folder).iterdir(), key=lambda each: each == file):  # the main one last
                os.replace(each, path.parent / each.name)
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error}") from error
    if text:
        warn(f"{text}, the rows of the example")
    return Exported(path, forward.difference, forward)


def name_in(to: str) -> str:
    """The name of the runtime that reads a format, such as "onnxruntime" for "onnx"."""
    if to not in _FORMATS:
        raise ExportError(f"unknown format {to!r}: {did_you_mean(to, _FORMATS)}use one of {', '.join(_FORMATS)}")
    return _FORMATS[to]


def reader_of(path: Path, to: str | FileRuntime) -> FileRuntime:
    """The runtime that reads an export to this path; ExportError where there is none, or the path does not fit."""
    runtime = as_runtime(name_in(to) if isinstance(to, str) else to)
    if not isinstance(runtime, FileRuntime):
        raise ExportError(f"{runtime.name} reads no files: export to onnx, openvino or executorch")
    if path.suffix != runtime.suffix:
        raise ExportError(
            f"a file of {runtime.name} ends with {runtime.suffix}: name it {str(path.with_suffix(runtime.suffix))!r}"
        )
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}: make it first")
    return runtime


def open_file(path: str | os.PathLike[str], example: Example, runtime: str | FileRuntime = "onnxruntime") -> Opened:
    """Open a file that was exported, so that each call makes one forward on the example and returns its seconds.

    Raises:
        ExampleError: the example is of other shapes than those of the file.
        RuntimeUnavailable: a package is missing, or the runtime cannot run the file.
    """
    opens = as_runtime(runtime)
    if not isinstance(opens, FileRuntime):
        raise ExportError(f"{opens.name} reads no files: name onnxruntime, openvino or executorch")
    args, kwargs = inputs_of(example)
    return opened(opens, Path(path), named_tensors(args, kwargs))
