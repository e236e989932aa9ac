"""Calls: what training calls a model with, as hooks see it; those of the first steps are compared with the example."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from setpoint.groups.example import Example, num_samples, tensors_of
from setpoint.host.host import anything_compiled
from setpoint.loop.candidates import Inputs
from setpoint.loop.hooks import StepHooks
from setpoint.messages import warn


class Call(NamedTuple):
    """Inputs of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Record:
    """Tells of calls of a module as they begin and end; on a copy of it, and after unpickling, of none."""

    def __init__(self, begins: Callable[..., None] | None = None, ends: Callable[..., None] | None = None) -> None:
        self._begins, self._ends = begins, ends

    def listen(self, until: ExitStack, module: nn.Module) -> None:
        until.callback(module.register_forward_pre_hook(self.ahead, with_kwargs=True).remove)
        until.callback(module.register_forward_hook(self._behind, always_call=True).remove)

    def ahead(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Dynamo's own flag: that of the exporter is set for all threads.
        if self._begins is not None and not torch.compiler.is_dynamo_compiling():
            self._begins(module, Call(args, dict(kwargs)))

    def _behind(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.ended(output, raised=output is None)  # None is what PyTorch gives after an exception

    def ended(self, output: Any, *, raised: bool) -> None:
        if self._ends is not None and not torch.compiler.is_dynamo_compiling():
            self._ends(output, raised)

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, ()


class FirstSteps:
    """Warns where training does not do in a step what the example says, and changes until it knows.

    It counts what the second step gives the model. Where that is at least twice the example, in rows and in elements,
    the third is counted too, and the fourth where the third is less: the second largest is taken. `outside` says that
    hooks stay outside of compiled code.
    """

    def __init__(
        self,
        model: nn.Module,
        listen: Callable[..., object],
        inputs: Inputs,
        hooks: StepHooks,
        outside: bool,
        method: str,
    ) -> None:
        self._model, self._listen, self._hooks, self._outside, self._method = model, listen, hooks, outside, method
        self._recorded = inputs.recorded  # of a first batch: calls are compared with it, and no whole steps
        self._known = (1 if inputs.recorded else inputs.passes) * _size(inputs.example)
        self._given = np.zeros((2, 2))  # in eval mode, and in training mode
        self._steps = self._calls = self._depth = 0
        self._times, self._until, self._then = list[float](), ExitStack(), hooks.before
        hooks.before = self._before_step

    def stop(self) -> None:
        self._until.close()

    def _begins(self, module: nn.Module, call: Call) -> None:
        self._calls += torch.is_grad_enabled()
        again = torch._C._current_graph_task_id() != -1  # within a backward pass: a checkpoint computes it again
        if torch.is_grad_enabled() and not (self._depth or again):  # not inside of another
            size, given = _size(call), self._given[int(self._model.training)]
            given[:] = np.maximum(given, size) if self._recorded else given + size
        self._depth += 1

    def _ends(self, output: Any, raised: bool) -> None:
        self._depth -= 1

    def _before_step(self, grad_scale: Tensor | None) -> None:
        if self._known_after(self._hooks.unseen.passes):
            self._hooks.before = self._then
        self._then(grad_scale)

    def _known_after(self, passes: int) -> bool:
        """After so many backward passes with gradients apart, as a GradScaler skips steps; whether all is known."""
        self._steps += 1
        if self._steps == 1:
            compiled = any(module._compiled_call_impl for module in self._model.modules())
            # A method that is exchanged, unlike a hook, has code around it compiled again, whatever that is.
            hidden = not self._outside and (compiled or (self._method != "forward" and anything_compiled()))
            if not hidden:  # not before: code compiled with hooks in it is compiled again without them
                self._listen(Record(self._begins, self._ends), self._until)
            return hidden
        # In the mode that the step is made in: an evaluation between steps is no part of one.
        count = 1 if self._recorded else max(1, passes)
        self._times.append(min(self._given[int(self._model.training)] / self._known / count))
        self._given[:] = 0
        times = sorted([0.0, *self._times])[-2]  # once, a graph may be as large, and a last batch be short
        if self._times[0] >= 2 > times and self._steps < 4:
            return False
        self.stop()
        # Compiled code runs no hooks, and a gradient that was set by hand needs no forward.
        if self._calls or (passes and (self._outside or not anything_compiled())):
            _warn_of_others(self._calls, times, self._recorded)
        return True


def _warn_of_others(calls: int, times: float, recorded: bool) -> None:
    """Warn where a step did not call the model, or gave it at least twice what the example has."""
    if recorded:  # calls of parts, or of one model in several ways, are counted as they were recorded
        if times >= 2:
            warn(
                f"a batch has {times:.3g} times what the first one had, for which FLOPs are counted: a step and the "
                f"run take about {times:.3g} times what is reported. Begin with a batch as later ones are, or give "
                "attach an example=(x,)"
            )
        return
    if not calls:
        warn(
            "training made a step without a call of model(x), which is what was traced: layers that only the traced "
            "forward uses look useless, or stay while the others are cut. If training calls another method, name it: "
            'attach(..., method="loss"). If it calls parts of the model, leave example out; a call of model.forward(x) '
            "itself is not seen, and does no harm"
        )
    elif times >= 2:
        warn(
            f"a step gives the model {times:.3g} times what the example has, by a larger batch or by several calls, as "
            "where gradients accumulate: FLOPs are counted for the example, so a step and the run take about "
            f"{times:.3g} times what is reported. Leave example out, and all calls of the first step are counted"
        )


def _size(example: Example) -> Float64[np.ndarray, "2"]:
    """Rows and elements: lengths of texts vary, and the first input may have other rows than the example's first."""
    return np.array([num_samples(example), max(1, sum(tensor.numel() for tensor in tensors_of(example)))], np.float64)
