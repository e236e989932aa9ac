"""Files that runtimes read: a model is written to one, the file is opened, and one forward after the other is timed."""

from __future__ import annotations

import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpoint.errors import BudgetError, ExampleError, ExportError, RuntimeUnavailable, SetpointError
from setpoint.groups.example import Example, inputs_of, mapped, tensors_of, with_tensors, without_cache
from setpoint.groups.untouched import preserved_rng_state
from setpoint.messages import counts
from setpoint.runtimes.runtime import Forward, Runtime

_SAME = (
    "they are compared on the example and on other values of its shapes, and no forward may draw numbers or depend on "
    "values (an `if`, `.item()` or loop is a constant in a file)"
)


class ByTensor(nn.Module):
    """A model on the CPU that takes the tensors of an example one by one, and gives a tuple of its output tensors.

    Files hold no other inputs and outputs. What else is in the example stays as it is.

    Raises:
        ExampleError: the model does not run on the example.
        ExportError: it returns no tensor.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        args, kwargs = inputs_of(without_cache(model, example))
        self.model = model.cpu()
        self.args, self.kwargs = mapped(lambda tensor: tensor.detach().cpu(), (args, kwargs))
        self.eval()
        with torch.no_grad(), preserved_rng_state(model), torch.autocast("cpu", enabled=False):
            try:
                self.inputs = named_tensors(self.args, self.kwargs, model)
                self.compared = [(self.inputs, self(*self.inputs.values()))]
            except Exception as error:  # anything may go wrong in a foreign forward
                raise ExampleError(f"the model does not run on the example: {error}") from error
            # What depends on values is a constant in a file that is traced: the example alone would not show it.
            with suppress(Exception):  # a model may not take other values
                other = {name: _other(tensor) for name, tensor in self.inputs.items()}
                self.compared.append((other, self(*other.values())))
        if not self.compared[0][1]:
            raise ExportError(f"the forward of {type(model).__name__} returns no tensor: return the outputs")
        self.compared = [pair for pair in self.compared if pair is self.compared[0] or _all_finite(pair[1])]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        own = {id(tensor): given for tensor, given in zip(self.inputs.values(), tensors, strict=True)}
        args, kwargs = with_tensors((self.args, self.kwargs), own)
        return tuple(tensors_of(self.model(*args, **kwargs)))


def _other(tensor: Tensor) -> Tensor:
    """Other valid values: integers and booleans in another order, floats also of another sign."""
    rolled = tensor.flatten().roll(1).reshape(tensor.shape)
    return 0.5 - rolled if tensor.is_floating_point() else rolled


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def named_tensors(args: Sequence[Any], kwargs: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Each tensor of an example by its name in the forward, or by its number; one that is given twice once."""
    names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if model is not None else []
    names += [str(number) for number in range(len(names), len(args))]
    named: dict[str, Tensor] = {}
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        tensors = list(tensors_of(value))
        for number, tensor in enumerate(tensors):
            if all(tensor is not other for other in named.values()):
                named[name if len(tensors) == 1 else f"{name}_{number}"] = tensor
    return named


@dataclass(frozen=True)
class Session:
    """A file as a runtime has opened it.

    Args:
        shapes: of the inputs, by name; what is no number fits any size.
        bind: makes a function that runs the file on these inputs, and returns its outputs.
    """

    shapes: Mapping[str, Sequence[Any]]
    bind: Callable[[Mapping[str, Tensor]], Callable[[], Sequence[Any]]]


@runtime_checkable
class FileRuntime(Runtime, Protocol):
    """A runtime that reads a model from a file, whose name ends with `suffix`; by `int8` the file holds integers."""

    suffix: str

    @property
    def int8(self) -> bool: ...

    def write(self, model: ByTensor, file: Path) -> None:
        """Write a model to a file, with the shapes of its example; where it takes several, this is the main one."""

    def open(self, file: Path) -> Session:
        """Open a file that `write` has written."""

    def clock(self, run: Callable[[], Any]) -> float:
        """Seconds of a call: of this thread where all the work is done on it, else those of the wall clock."""


@dataclass(frozen=True)
class Opened:
    """A file that a runtime has opened for an example; a call makes one forward and returns its seconds.

    `difference` is how far its outputs are from PyTorch's at most, over the largest value of that output; 0 where the
    file alone is known.
    """

    runtime: FileRuntime
    run: Callable[[], Sequence[Any]]
    difference: float = 0.0

    def __call__(self) -> float:
        return self.runtime.clock(self.run)

    def outputs(self) -> list[Tensor]:
        return _copied(self.run())

    def too_far(self, what: str, tolerance: float | None = None) -> str:
        """That the outputs differ from PyTorch's by more than a part of their largest value; empty where they do not.

        By default the tolerance is .001, of integers, which are never the same, .1.
        """
        if tolerance is None:
            tolerance = 0.1 if self.runtime.int8 else 1e-3
        if self.difference <= tolerance:
            return ""
        hint = "calibrate on real inputs" if self.runtime.int8 else _SAME
        where = self.runtime.name + " with int8" * self.runtime.int8
        return (
            f"the outputs of {what} in {where} differ from PyTorch's by {self.difference:.2g} of their largest value, "
            f"more than tolerance={tolerance:g}: {hint}"
        )


def check_settings(threads: object, int8: object = False) -> None:
    counts(threads=threads)
    if not isinstance(int8, bool):
        raise BudgetError(f"int8 is True or False, got {int8!r}")


def loaded(runtime: FileRuntime, model: nn.Module, example: Example) -> Forward:
    """The forward of a model in a runtime, by a file that is gone afterwards."""
    by_tensor = ByTensor(model, example)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{runtime.suffix}"
        written(runtime.write, by_tensor, file, runtime.name)
        return opened(runtime, file, by_tensor.inputs, by_tensor.compared)


def written(write: Callable[[ByTensor, Path], None], model: ByTensor, file: Path, to: str) -> None:
    """Write a model to a file, without a word of the exporter."""
    try:
        # Under autocast the file would hold the casts of training: a runtime has a precision of its own.
        with preserved_rng_state(model), silent(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            write(model, file)
    except SetpointError:
        raise
    except Exception as error:  # exporters raise anything
        raise ExportError(
            f"{type(model.model).__name__} cannot be exported to {to}: {_reason(error)}; "
            "change what the message names, or choose another runtime"
        ) from error


def opened(
    runtime: FileRuntime,
    file: Path,
    inputs: Mapping[str, Tensor],
    compared: Sequence[tuple[Mapping[str, Tensor], Sequence[Tensor]]] = (),
) -> Opened:
    """Open a file for these inputs; it has run once. Its outputs are compared with those wanted on several inputs.

    Integers are compared on the first ones alone, on which they are calibrated.
    """
    try:
        with silent():
            session = runtime.open(file)
        run = session.bind(_fitting(inputs, session.shapes, file.name))
        run()
        difference = 0.0
        for given, want in compared[: 1 if runtime.int8 else None]:
            got = _copied(session.bind(_fitting(given, session.shapes, file.name))())
            difference = max(difference, _difference(got, want))
    except SetpointError:
        raise
    except Exception as error:  # runtimes raise anything
        hint = "replace the operation that the message names"
        if any(tensor.dtype == torch.bfloat16 for _, wanted in compared for tensor in wanted):
            hint = "give a model in float32, which autocast trains in bfloat16 all the same"
        raise RuntimeUnavailable(
            f"{runtime.name} cannot run {file.name}: {_reason(error)}; {hint}, or choose another runtime"
        ) from error
    return Opened(runtime, run, difference)


def _copied(outputs: Sequence[Any]) -> list[Tensor]:
    # Copies: a runtime may write the next outputs to the same place.
    return [torch.as_tensor(output).clone() for output in outputs]


def _difference(got: list[Tensor], want: Sequence[Tensor]) -> float:
    if [one.shape for one in got] != [other.shape for other in want]:
        return float("inf")
    return max(_relative(one.double(), other.double()) for one, other in zip(got, want, strict=True))


def _relative(got: Tensor, want: Tensor) -> float:
    same = (got == want) | (got.isnan() & want.isnan())  # a masked score may be infinite in both
    largest = want[want.isfinite()].abs().max() if want.isfinite().any() else 0
    return float(torch.where(same, 0, got - want).abs().max() / max(float(largest), 1e-12)) if want.numel() else 0.0


def _fitting(inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[Any]], file: str) -> dict[str, Tensor]:
    """The inputs by the names that the file has for them: by name where it knows the names, else in order."""
    if not shapes.keys() <= inputs.keys():
        if len(shapes) != len(inputs):
            raise ExampleError(
                f"{file} takes {len(shapes)} inputs ({', '.join(shapes)}), but the example has {len(inputs)}: "
                "give an example as the model was exported with"
            )
        inputs = dict(zip(shapes, inputs.values(), strict=True))
    for name, shape in shapes.items():
        given = list(inputs[name].shape)
        fits = len(given) == len(shape) and all(
            size == want for size, want in zip(given, shape, strict=True) if isinstance(want, int)
        )
        if not fits:
            raise ExampleError(
                f"{file} takes {name} of shape {list(shape)}, but the example has {given}: "
                "give an example of that shape, or export the model again with this one"
            )
    return {name: inputs[name].contiguous() for name in shapes}


class Traceable(TorchFunctionMode):
    """Differences and running sums of booleans by operations that tracing writes: masks of transformers have them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.diff, Tensor.diff):
            func = _diff
        elif func in (torch.cumsum, Tensor.cumsum) and args and args[0].dtype == torch.bool:
            args = (args[0].long(), *args[1:])
        return func(*args, **(kwargs or {}))


def _diff(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    found = torch.cat([part for part in (prepend, input, append) if part is not None], dim)
    for _ in range(n):
        later, earlier = (found.narrow(dim, first, found.shape[dim] - 1) for first in (1, 0))
        found = later ^ earlier if found.dtype == torch.bool else later - earlier
    return found


@contextmanager
def needs(runtime: str, packages: str) -> Iterator[None]:
    """Inside, optional packages are imported; one that is missing is named together with its `pip install`."""
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error)
        raise RuntimeUnavailable(
            f"{runtime} needs {missing}, which cannot be imported: pip install {packages}"
        ) from error


@contextmanager
def silent() -> Iterator[None]:
    """Inside, exporters print, log and warn of nothing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """The line of a foreign error that says what was wrong: of the innermost one, and no place in foreign code."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip("- ")]
    naming = [line for line in lines if "No conversion rule" in line]  # OpenVINO's, which names the operations
    others = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return next(iter([*naming, *others, *lines]), type(error).__name__)
