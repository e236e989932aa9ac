"""Starting: a loop begins at once where there is an example, else at the first step with the inputs of that; it may go
on with the state that came with an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from setpoint.actuator.attached import ATTACHED, RESUMING, note_attached
from setpoint.actuator.in_state_dict import carry_sizes
from setpoint.actuator.model_shapes import apply_sizes, at_dense_shapes, note_cut, was_cut
from setpoint.actuator.shrink import unwrapped
from setpoint.checkpoint.resumable import complete, resumable
from setpoint.errors import CheckpointError, GroupError, LoopError
from setpoint.groups.by_method import called_by, check_method
from setpoint.groups.example import check_example, in_shapes, shapes_of
from setpoint.groups.export import Example, num_samples
from setpoint.groups.one_at_a_time import one_at_a_time
from setpoint.groups.place import implied, is_call, read_size
from setpoint.host.carrying import Carrying, brought, forget
from setpoint.host.first_forward import FirstForward, num_elements
from setpoint.host.host import Host
from setpoint.host.second_step import SecondStep, counts_flops, more_than, without_unused
from setpoint.loop.hooks import StepHooks
from setpoint.loop.loop import Loop
from setpoint.loop.resume import check_loading, check_optimizers
from setpoint.loop.telling import log
from setpoint.messages import counted, warn
from setpoint.progress import progress


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an optimizer step computes on.

    Args:
        example: inputs of the model.
        passes: calls of the model with such inputs in one step.
        samples: independent samples behind one call.
    """

    example: Example
    passes: int = 1
    samples: int = 1

    @classmethod
    def of(cls, example: Example) -> Inputs:
        """Of an example of a whole step."""
        return cls(example, samples=num_samples(example))

    def form(self) -> dict[str, Any]:
        """What batches of one run may differ in, where they are padded to their longest row or the last is short."""
        return {"shapes": shapes_of(self.example), "passes": self.passes, "samples": self.samples}

    def in_form(self, form: Any) -> Inputs:
        """These inputs in the form of those with which a run began, as its state has it.

        Raises:
            CheckpointError: for a damaged form.
        """
        try:
            shapes = [[int(size) for size in shape] for shape in form["shapes"]]
            passes, samples = int(form["passes"]), int(form["samples"])
            if min(passes, samples, *(size for shape in shapes for size in shape)) < 0:
                raise ValueError(form)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"the state of the loop is damaged: its inputs are {form!r}") from error
        if passes != self.passes:
            warn(
                f"this step called the model {counted(self.passes, 'time')}, the first step of the run "
                f"{counted(passes, 'time')}: FLOPs are counted as in the first; where the accumulation was changed, "
                "attach without resume"
            )
        return Inputs(in_shapes(self.example, shapes), passes, samples)


Build = Callable[[Inputs], Mapping[str, Any]]
"""Makes what `Loop.begin` takes, by name."""


class Starting:
    """Begins a loop, which changes by that, and stands by for states of a loop that optimizers load.

    Args:
        loop: not begun yet.
        host: holds the model.
        called: the model in its wrappers.
        build: makes the parts of the loop.
        resume: whether states of model and optimizer carry the loop's.
        method: of the model, which the training loop calls.
    """

    def __init__(
        self, loop: Loop, host: Host, called: nn.Module, build: Build, *, resume: bool, method: str = "forward"
    ) -> None:
        check_method(host.model, method)
        self._loop, self._host, self._build, self._resume = loop, host, build, resume
        self._first: FirstForward | None = None
        self._second: SecondStep | None = None
        self._carrying: Carrying | None = None
        self._hooks: StepHooks | None = None
        self._called, self._method = called, method
        self._wrapped: list[torch.Size] | None = None
        self._form: dict[str, Any] = {}
        self._handle: RemovableHandle | None = None
        loop.wait(self)
        if host.ranks.own == 0:
            loop.on_step(partial(log, loop.metrics))

    def at_once(self, example: Example) -> None:
        """Begin with an example, and with the state that has come with the optimizer, if there is one."""
        check_example(example)
        complete(self._host.model, example)
        self._begin(Inputs.of(example))
        self._carry()
        if counts_flops(self._loop.spending):
            notes = partial(FirstForward, self._host.model, self._host.model, self._method)
            self._watch(notes, partial(more_than, num_elements(example)))

    def _watch(self, notes: Callable[[], FirstForward], compare: Callable[[FirstForward], str]) -> None:
        """Look at the second step, too, but for compiled code, which hooks would have compiled again."""
        if not self._host.compiled:
            self._second = SecondStep(notes, compare)
            self._second.listen(self._loop.on_step)
        elif self._first is not None:
            self._first.stop()

    def at_first_step(self) -> None:
        """Begin when the first optimizer is about to step, with what the model was called with until then."""
        host = self._host
        if any(each._compiled_call_impl is not None for each in host.model.modules()):
            raise LoopError("model.compile() hides the inputs of a forward: give attach an example=(x,)")
        self._carry()
        self._first = FirstForward(self._called if host.compiled else host.model, host.model, self._method)
        self._hooks = StepHooks(host.optimizers, self._before, lambda: None)
        note_attached(host.model)
        RESUMING.add(host.model)  # until the loop begins
        if self._resume and host.wrapper and self._called is not host.model:
            self._wrapped = None if was_cut(host.model) else _shapes(host.model)
            self._handle = self._called.register_forward_pre_hook(self._rewrap)

    def _carry(self) -> None:
        """Let states carry sizes, and take those of states or name them: only where nothing has been refused."""
        for each in (self._host.model, *self._host.copies):
            resumable(each) if self._resume else carry_sizes(each)

    def stop(self) -> None:
        """Leave model and optimizers alone; may be called again."""
        for each in (self._first, self._second, self._carrying):
            if each is not None:
                each.stop()
        if self._hooks is not None:
            self._hooks.remove()
        self._unwatch()
        for models in (ATTACHED, RESUMING):
            models.discard(self._host.model)

    def _rewrap(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Called before each forward: a state that was loaded may have cut the model in a wrapper that was there."""
        shapes = _shapes(self._host.model)
        if shapes != self._wrapped:
            with self._host.resizable("the load of a state", ()):
                self._wrapped = shapes

    def _before(self, grad_scale: Tensor | None) -> None:
        first, hooks = self._first, self._hooks
        assert first is not None and hooks is not None, "the hooks are there from at_first_step on"
        ATTACHED.discard(self._host.model)
        first.step_begins()
        try:
            example = first.example()
        except BaseException:
            self.stop()
            raise
        passes = max(1, first.passes)
        inputs = Inputs(example, passes, passes * (first.samples() or num_samples(example)))
        unused, called = first.num_unused, first.called  # an error below would forget it
        if not unused:  # with hooks no equal model would be known
            first.unhook()
        with first.autocast(), first.calling():
            try:
                self._begin(inputs, hooks)
            except GroupError as error:
                if called:
                    raise
                raise GroupError(
                    f"{error}. Training did not call the model itself, but its parts one by one: if it calls another "
                    'method of the model, such as model.loss(x), name it: attach(..., method="loss")'
                ) from error
        self._unwatch()
        if unused:
            self._watch(first.again, partial(without_unused, unused))
        else:
            first.stop()
        hooks.begin(grad_scale)

    def _unwatch(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    @one_at_a_time
    def _begin(self, inputs: Inputs, hooks: StepHooks | None = None) -> None:
        (RESUMING.add if self._resume else RESUMING.discard)(self._host.model)
        try:
            self._begin_with(inputs, hooks)
        except BaseException:  # nothing stays behind, and what the optimizer has loaded is there for another try
            self._loop.detach()
            raise
        if self._resume:
            first = self._host.optimizers[0]
            forget(first)
            self._carrying = Carrying(first, self._carried, self._take)

    def _begin_with(self, inputs: Inputs, hooks: StepHooks | None) -> None:
        host = self._host
        state = brought(host.optimizers[0]) if self._resume else None
        if self._resume and state is None and was_cut(host.model):
            raise CheckpointError(
                "the model was cut, but no state of a loop has come with its optimizer: load the optimizer's state as "
                "it was saved with resume=True, too, or attach without resume to begin a run with the model as it is "
                "(in a callback: SetpointCallback(..., resume=False))"
            )
        if hooks is not None and isinstance(state, Mapping) and "inputs" in state:
            inputs = inputs.in_form(state["inputs"])  # of the batch with which the run once began
        self._form = inputs.form()
        if state is None:
            self._loop.begin(**self._built(inputs), hooks=hooks)
            check_optimizers(host, self._loop.groups)
            return
        with self._dense():
            self._loop.begin(**self._built(inputs), hooks=hooks)
            self._loop.load_state_dict(state)
        self._settle()

    def _built(self, inputs: Inputs) -> Mapping[str, Any]:
        with progress("attach"), called_by(self._host.model, self._method):
            return self._build(inputs)

    def _carried(self) -> dict[str, Any]:
        """The loop's state; frameworks keep the random generators themselves, and put them back when it suits them."""
        return {**self._loop.state_dict(), "rng_state": None, "inputs": self._form}

    def _take(self, state: Any, rest: Mapping[str, Any]) -> None:
        """Called before an optimizer loads a state that holds a loop's: both are taken, or none."""
        host, loop = self._host, self._loop
        with loop.restored_on_error("loading the state of the optimizer"):
            with self._dense():
                loop.load_state_dict(state)
            self._settle()
            check_loading(host, loop.groups, host.optimizers[0], rest)

    def _settle(self) -> None:
        """Write the numbers that only a loop's groups know, such as those of a config: no shape tells them."""
        wanted = {
            (size.module, size.place): size.index.size
            for group in self._loop.groups
            for size in group.sizes
            if not is_call(size.place)
        }
        host, tensors = self._host, [part.tensor for group in self._loop.groups for part in group.slices]
        with ExitStack() as undo:
            for module in (host.model, *unwrapped(tensors, host.model, host.copies)):
                stale = {at: n for at, n in wanted.items() if read_size(module.get_submodule(at[0]), at[1]) != n}
                stale |= {at: n for at, n in wanted.items() if implied(at[1]) is not None}
                note_cut(module, {}, stale, undo)
                apply_sizes(module, stale, undo)
            undo.pop_all()

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """Inside, what was cut to a state already has the shapes that a fresh loop expects."""
        host = self._host
        cut = [each for each in (host.model, *host.copies) if was_cut(each)]
        with ExitStack() as stack:
            for each in cut:
                stack.enter_context(at_dense_shapes(each, host.optimizers if each is host.model else ()))
            yield
        if cut:  # the wrapper's hooks are on what the tensors were inside
            with host.resizable("the load of a state", ()):
                pass


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]
