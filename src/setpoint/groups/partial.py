"""What cannot be exported: why, by whose line, and the forward in which it is an opaque call.

A forward of a library that decides by values of tensors is exported on the path that the example takes.
"""

import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from setpoint.errors import ExampleError, ExportError
from setpoint.groups.example import Example, inputs_of, mapped, tensors_of
from setpoint.groups.forward import PartialForward, RecordedCall
from setpoint.groups.opaque import AnsweredDraws
from setpoint.groups.untouched import copy_of, preserved_rng_state
from setpoint.groups.walk import module_of, op_name

_TORCH = Path(torch.__file__).parent
_PACKAGE = Path(__file__).parents[1]
_STANDARD = Path(sysconfig.get_path("stdlib"))
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<number>\d+).*(?:\n\s+(?!File ")(?P<text>.*))?')
_DEPENDS_ON_DATA = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
    "UserError",
}
# The ends of what a draw may be: a layer that is skipped with some probability is called at one of them.
_DRAWS = (1.0 - 2.0**-24, 0.0)


class ByDataError(Exception):
    """A module decides by data; which one, and whether its code is a library's."""

    def __init__(self, module: str, library: bool, text: str) -> None:
        super().__init__(text)
        self.module, self.library = module, library


class _DynamicSizeError(ByDataError):
    """A module makes a tensor whose size the data decides (tokens sent to an expert, say)."""


def dynamic_size(model: nn.Module, node: fx.Node) -> ByDataError:
    """The error for a node whose size is no number."""
    module = module_of(node)
    kind = sys.modules.get(type(model.get_submodule(module)).__module__)
    return _DynamicSizeError(
        module,
        _is_library(str(getattr(kind, "__file__", ""))),
        f"{module or 'model'}: {op_name(node.target)} makes a tensor whose size depends on the data, so nothing after "
        "it can be followed: give every expert all tokens and weigh them, or leave it to a batched product over "
        "experts",
    )


def check_asks_nothing(graph: fx.Graph) -> None:
    """Check that only libraries ask for values, or raise ByDataError with the line.

    The path of a library is that of the example. A user can replace an `if` in code of his own, and is asked to.
    """
    for node in graph.nodes:
        if getattr(node.target, "__name__", "").startswith(("item", "_local_scalar_dense")):
            found = _LINE.finditer(node.meta.get("stack_trace") or "")
            lines = [line for line in found if _is_code(line["file"]) or line["file"] in ("<stdin>", "<string>")]
            # Without a line, or with one that was typed in, it may be the user's. What was typed in has no text.
            if not lines or not _is_library(lines[-1]["file"]):
                file, number, text = lines[-1].group("file", "number", "text") if lines else ("a line unknown", "?", "")
                asks = f'it asks for the values of a tensor (at {file}:{number}: "{text or ""}")'
                raise ByDataError(module_of(node), False, asks)


@contextmanager
def following_data() -> Iterator[None]:
    """Inside, tensors without data carry the example's along, by which sizes and branches are decided."""
    import torch._functorch.config as config
    from torch._subclasses import meta_utils

    parts: Any = meta_utils
    before = {name: getattr(parts, name) for name in ("_safe_copy", "_safe_clone")}

    # Torch's own copies carry no data of parameters: an empty tensor is in its place.
    def copied(target: Tensor, source: Tensor | None) -> None:
        if source is not None:
            target.copy_(source.detach())

    parts._safe_copy, parts._safe_clone = copied, lambda source: source.detach().clone()
    try:
        with config.patch(fake_tensor_propagate_real_tensors=True):
            yield
    finally:
        vars(parts).update(before)


class Fault:
    """Why an export has failed: what was raised, and the name of the innermost module that was running."""

    def __init__(self, error: Exception, module: str) -> None:
        self.error, self.module = error, module
        if isinstance(error, ByDataError):
            self.module, self.library, self.by_data, self.text = error.module, error.library, True, str(error)
            return
        line = _innermost(error, _is_code)
        self.library = line is not None and _is_library(line.filename)  # whether the line is not the user's own
        self.by_data = bool({type(link).__name__ for link in _chain(error)} & _DEPENDS_ON_DATA)
        self.text = f"{_first_line(error)}{_user_line(error)}"

    def refusal(self) -> ExportError:
        """The error that says so."""
        text = f"the model's forward cannot be exported: {self.text}; {self._hint()}"
        error = ExportError(self.text if isinstance(self.error, _DynamicSizeError) else text)
        error.__cause__ = self.error
        return error

    def _hint(self) -> str:
        if self.by_data and not self.library:
            return (
                "its control flow depends on the values of a tensor; replace the Python `if` by torch.where, "
                "or compute the condition outside the model"
            )
        # Torch's recurrent networks fail to export by themselves only with packed sequences.
        last = [frame for link in _chain(self.error) for frame in traceback.extract_tb(link.__traceback__)[-4:]]
        if any(frame.filename == str(_TORCH / "nn" / "modules" / "rnn.py") for frame in last):
            return (
                "a packed sequence has sizes that depend on its lengths; give the recurrent network the padded tensor"
            )
        if self.by_data:
            return "the code of a library decides by the values of a tensor there"
        return "torch.export cannot follow it; `torch.export.export(model, example, strict=False)` shows the same error"


def check_runs(model: nn.Module, example: Example) -> None:
    """Distinguish a bad example from a forward that cannot be exported, by running a copy of the model eagerly."""
    args, kwargs = inputs_of(example)
    try:
        with preserved_rng_state(model), torch.no_grad():
            copy_of(model)(*args, **kwargs)
    except Exception as plain:
        tensors = tensors_of([*args, *kwargs.items()])
        inputs = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
        few = "more than 1 value per channel" in str(plain)
        raise ExampleError(
            f"the model does not accept the example ({inputs}): {_first_line(plain)}{_user_line(plain)}"
            + (". Give two rows or more: a batch norm needs them" if few else "")
        ) from plain


def without(
    model: nn.Module, example: Example, forward: PartialForward, fault: Fault, first: ExportError
) -> PartialForward:
    """The forward without this fault: libraries may decide by data, and what else cannot be exported is opaque.

    ExportError where the forward of the model itself decides by data, which the user can change.
    """
    if fault.by_data and fault.library and not forward.by_data:
        return replace(forward, by_data=True, draw=_draw_for(model, example))
    if fault.module in forward.reasons:
        raise first
    if fault.by_data and not (fault.module or fault.library):
        raise fault.refusal()
    module = model.get_submodule(fault.module)
    names = [fault.module]
    if type(module).__module__.partition(".")[0] != "torch":  # others run the same code, but those around it
        named = model.named_modules()
        names += [name for name, part in named if type(part) is type(module) and module not in set(part.modules())]
    why = f"it cannot be exported, so it is not pruned: {fault.text}"
    return _with_opaque(model, example, forward, {**forward.reasons, **dict.fromkeys(names, why)})


def _with_opaque(
    model: nn.Module, example: Example, forward: PartialForward, reasons: Mapping[str, str]
) -> PartialForward:
    """The forward in which these modules are opaque, too: a copy of the model is run on the example once."""
    copied = copy_of(model)
    names = {id(module): name for name, module in copied.named_modules()}
    calls = [] if "" in reasons else [RecordedCall("", *inputs_of(example))]
    results: dict[str, list[Any]] = {name: [] for name in reasons}
    running: list[str] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[id(module)]
        caller = running[-1] if running else None
        if caller in reasons and name not in reasons and all(call.module != name for call in calls):
            calls.append(RecordedCall(name, *mapped(_detached, (args, kwargs))))
        running.append(name)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        # A module that raised, and whose caller caught it, has no call of this hook: its name is still on top.
        while running and running.pop() != names[id(module)]:
            pass
        if (name := names[id(module)]) in reasons:
            results[name].append(mapped(_detached, output))

    for name, module in copied.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ExportError(f"{name!r} is a ScriptModule, which takes no hooks: build it without torch.jit.script")
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    answered = nullcontext() if forward.draw is None else AnsweredDraws(forward.draw)
    with preserved_rng_state(model), torch.enable_grad(), answered:
        args, kwargs = inputs_of(example)
        copied(*args, **kwargs)
    found = {name: tuple(returned) for name, returned in results.items()}
    return replace(forward, calls=tuple(calls), results=found, reasons=dict(reasons))


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _draw_for(model: nn.Module, example: Example) -> float | None:
    """The answer to single random draws with which a copy of the model calls most modules; None where it makes none."""
    counts: dict[float, int] = {}
    for draw in _DRAWS:
        copied = copy_of(model)
        called: set[int] = set()
        for module in copied.modules():
            module.register_forward_pre_hook(lambda module, args, called=called: called.add(id(module)))
        args, kwargs = inputs_of(example)
        with preserved_rng_state(model), torch.no_grad(), AnsweredDraws(draw) as draws:
            copied(*args, **kwargs)
        if not draws.asked:
            return None
        counts[draw] = len(called)
    return max(counts, key=lambda draw: counts[draw])


def _is_library(file: str) -> bool:
    """Whether a file is of an installed package, so that it is not the user's to change."""
    path = Path(file)
    return _TORCH in path.parents or bool({"site-packages", "dist-packages"} & set(path.parts))


def _is_code(file: str) -> bool:
    """Whether a file holds code of models: no inner parts of torch, of this package, of Python or of type checks."""
    path = Path(file)
    if _TORCH in path.parents:
        return _TORCH / "nn" in path.parents and path.name != "module.py"
    if file.startswith("<") or _PACKAGE in path.parents or {"jaxtyping", "beartype"} & set(path.parts):
        return False
    return _STANDARD not in path.parents or _is_library(file)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _user_line(error: BaseException) -> str:
    frame = _innermost(error, lambda file: _is_code(file) and _TORCH not in Path(file).parents)
    return f' (at {frame.filename}:{frame.lineno}: "{frame.line}")' if frame is not None and frame.line else ""


def _innermost(error: BaseException, fits: Callable[[str], bool]) -> traceback.FrameSummary | None:
    frames = (frame for link in _chain(error) for frame in reversed(traceback.extract_tb(link.__traceback__)))
    return next((frame for frame in frames if fits(frame.filename)), None)
