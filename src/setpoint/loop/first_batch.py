"""The first batch: without an `example`, a loop begins with what training gave the model before its first step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.jit import ScriptModule

from setpoint.errors import GroupError, LoopError
from setpoint.groups.example import Example, example_of, holds_nan, mapped, num_samples
from setpoint.host.host import Host
from setpoint.loop.calls import Call, Record
from setpoint.loop.candidates import Inputs
from setpoint.messages import counted, warn

_TARGETS = ("labels", "targets", "target", "y")
_IGNORED = -100  # class index that PyTorch's and transformers' losses leave out


class FirstBatch:
    """Records the inputs and the autocast of the first forward in training, and counts forwards until the first step.

    Where training never calls the model itself but parts of it, `self.decoder(self.encoder(x))` in a `training_step`,
    each outermost part is recorded. `called` is the model in its wrappers. Of up to `patience` steps, those are passed
    over whose calls hold NaN, inputs and outputs.
    """

    def __init__(
        self, host: Host, called: nn.Module, method: str, patience: int, begin: Callable[[Inputs], None]
    ) -> None:
        if any(module._compiled_call_impl is not None for module in host.model.modules()):
            raise LoopError("model.compile() hides the inputs of a forward: give attach an example=(x,)")
        self._model, self._method, self._begin = host.model, method, begin
        self._ranks, self._patience, self._bad = host.ranks, patience, False
        self._calls: dict[str, Call] = {}  # the first of the largest ones of each module, by its name
        self._counts: dict[str, int] = {}  # of calls with as many samples
        self._running: list[str] = []
        self._now: Call | None = None  # the outermost call that is running
        self._autocast: AbstractContextManager[Any] = nullcontext()
        self._until = ExitStack()
        self._passes = 0  # backward passes at the first try to begin
        if method != "forward":
            RecordedMethod(self._record(""), self._until, host.model, method)
            return
        # Hooks inside of compiled code would have it compiled again, so only the outside is looked at.
        modules = (("", called),) if host.compiled else self._model.named_modules()
        for name, module in modules:
            # A loss or a metric has no parameters, and compiled scripts take no hooks.
            if not name or (next(module.parameters(), None) is not None and not isinstance(module, ScriptModule)):
                self._record(name).listen(self._until, module)

    def _record(self, name: str) -> Record:
        return Record(partial(self.forward_begins, name), partial(self.forward_ends, name))

    def forward_begins(self, name: str, module: nn.Module, call: Call) -> None:
        if not name:
            self._running.clear()  # what an interrupt has left there
        trains = torch.is_grad_enabled() and self._model.training
        # An export of the user's own calls the model with tensors that are not real.
        if not trains or redirected(module) or detect_fake_mode(tuple(call)) is not None:
            return
        self._running.append(name)
        # A part that is checkpointed runs again in the backward pass, outside of its model: "" stands for both.
        if len(self._running) > 1 or (name and "" in self._calls):
            return
        device = next((parameter.device.type for parameter in self._model.parameters()), "cpu")
        if not self._calls and torch.is_autocast_enabled(device):
            dtype, cached = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
            self._autocast = torch.autocast(device, dtype=dtype, cache_enabled=cached)
        self._now = mapped(_detached, call)  # a copy: training may change a batch's containers in place

    def forward_ends(self, name: str, output: Any, raised: bool) -> None:
        if not self._running or self._running[-1] != name:
            return
        self._running.pop()
        if self._running or self._now is None:
            return
        call, self._now = self._now, None
        known = self._calls.get(name)
        if raised:  # inputs that the model does not take
            return
        if self._patience and holds_nan(call) and holds_nan(output):  # a model may well take NaN for what is missing
            if not self._bad:
                warn(
                    "a batch holds NaN or infinity, and so does what the model makes of it: training continues, and "
                    f"Setpoint begins at the next good batch, of up to {counted(self._patience, 'step')}. Look for it "
                    "in the data"
                )
            self._bad = True
            return
        if known is None or num_samples(call) > num_samples(known):
            self._calls[name], self._counts[name] = call, 1
        elif num_samples(call) == num_samples(known):
            self._counts[name] += 1

    def begin(self, backward_passes: int) -> bool:
        """Begin the loop, unless a rank has seen bad batches only."""
        names = [name for name in self._counts if name in self._calls]
        waits = bool(self._patience and self._bad and not names)
        if self._ranks.total(torch.tensor([float(waits)], device="cpu")).item():
            self._patience -= 1
            self._calls.clear()
            self._counts.clear()
            return False
        if not names:
            raise LoopError(
                "an optimizer stepped before the model was called in training, so its inputs are not known: give "
                "attach an example=(x,), or call the model that attach was given. After torch.compile that is "
                "the compiled model. A model in eval mode is not training: call model.train()"
            )
        by_parts = "" not in names
        # The model stands for its parts, and a part for those inside of it.
        parts = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        calls = min(self._counts[name] for name in parts) if by_parts else self._counts[""]
        # Where a GradScaler has skipped steps, there are several backward passes, each with its share of the forwards.
        # Rounded, as a look at an output in between is a forward without a share.
        self._passes = self._passes or max(1, backward_passes)  # a try that was interrupted has stopped the counts
        passes = max(1, round(calls / self._passes))
        if by_parts:
            example: Example = ({name: [self._calls[name]] * round(self._counts[name] / calls) for name in parts},)
            samples = num_samples(self._calls[parts[0]].args)
        else:
            example = example_of(self._model, *self._calls[""], self._method)
            samples = _num_targets(example) or num_samples(example)
        self.stop()  # discovery must not find hooks on the model that it copies
        with self._autocast, _calling_parts(self._model) if by_parts else nullcontext():
            self._begin(Inputs(example, passes, passes * samples, recorded=True))
        return True

    def stop(self) -> None:
        self._until.close()


@contextmanager
def _calling_parts(model: nn.Module) -> Iterator[None]:
    """Inside, the model's forward calls the parts that training calls, one after another."""
    before = vars(model).get("forward")
    model.forward = MethodType(_forward_by_parts, model)  # a method: a copy gets one of its own
    try:
        yield
    except GroupError as error:
        raise GroupError(
            f"{error}. Training did not call the model itself, but its parts one by one: if it calls another "
            'method of the model, such as model.loss(x), name it: attach(..., method="loss")'
        ) from error
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _forward_by_parts(self: nn.Module, parts: Mapping[str, list[Call]]) -> list[Any]:
    return [self.get_submodule(name)(*args, **kwargs) for name, calls in parts.items() for args, kwargs in calls]


def redirected(module: nn.Module) -> bool:
    """Whether Lightning sends its `training_step` through this forward, as it does under a wrapper such as DDP."""
    forward = vars(module).get("forward")
    package = str(getattr(forward, "__module__", "")).split(".")[0]
    return package in ("lightning", "pytorch_lightning") and not isinstance(forward, MethodType)


def _num_targets(example: Example) -> int | None:
    """Targets of one pass where the inputs hold one for each token; None where they do not say."""
    for name in _TARGETS if isinstance(example, Mapping) else ():
        labels = example.get(name)
        if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
            return max(1, int((labels != _IGNORED).sum()))
    return None


def _detached(tensor: Tensor) -> Tensor:
    # Not the graph behind it, which would keep the first step's activations alive.
    return tensor.detach().requires_grad_(tensor.requires_grad)


class RecordedMethod:
    """Replaces a model's method while its first calls are recorded; on a copy it is the plain method."""

    def __init__(self, record: Record, until: ExitStack, model: nn.Module, method: str) -> None:
        self._record, self._model, self._method = record, model, method
        self._own = vars(model).get(method)  # such as a compiled one
        vars(model)[method] = self
        until.callback(self._stop)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raised, output = True, None
        self._record.ahead(self._model, args, kwargs)
        try:
            output = (self._own or getattr(type(self._model), self._method).__get__(self._model))(*args, **kwargs)
            raised = False  # it may well return None
            return output
        finally:
            self._record.ended(output, raised=raised)

    def _stop(self) -> None:
        above = vars(self._model)[self._method]
        if above is not self:  # another one records the method, too
            while above._own is not self:
                above = above._own
            above._own = self._own
        elif self._own:
            vars(self._model)[self._method] = self._own
        else:
            del vars(self._model)[self._method]
