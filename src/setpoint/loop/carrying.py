"""Carrying: a loop's state inside its optimizer's own state dict, so that any framework saves and loads it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.in_state_dict import RESUMING
from setpoint.actuator.model_shapes import ModelShapes, apply_sizes, note_cut, was_cut
from setpoint.actuator.optimizer_check import check_state
from setpoint.actuator.shrink import unwrapped
from setpoint.actuator.tensors import shapes_by_name
from setpoint.checkpoint.fit import at_dense_shapes, fit
from setpoint.checkpoint.plain import from_tensors, to_tensors
from setpoint.errors import CheckpointError, as_written
from setpoint.groups.example import Example, shapes_of, tensors_of, with_tensors
from setpoint.groups.group import Group
from setpoint.groups.sizes_in_code.place import implied, is_call, read_size
from setpoint.host.host import Host
from setpoint.ledger import Ledger
from setpoint.loop.candidates import Inputs
from setpoint.loop.control import Parts
from setpoint.loop.loop import Loop
from setpoint.loop.resume import AGAIN, load_state, sealed
from setpoint.messages import counted, warn

KEY = "setpoint"  # entry of the first parameter group: PyTorch keeps such entries in its optimizers' states


def brought(optimizer: Optimizer) -> Any | None:
    """The loop's state that an optimizer has loaded with its own; None if there is none."""
    data = optimizer.param_groups[0].get(KEY)
    return None if data is None else _unpacked(data)


def _unpacked(data: Any) -> Any:
    with as_written("the loop's state in the optimizer's state dict"):
        return from_tensors(load(data.cpu().numpy().tobytes()))


def _read(host: Host, number: int, settings: Any) -> Any | None:
    """What the first parameter group of an optimizer's state has of ours; it must be of the optimizer in this place."""
    if not isinstance(settings, dict) or KEY not in settings:
        return None
    state, own = _unpacked(settings[KEY]), [number, type(host.optimizers[number]).__name__]
    if (saved := state.get("owner", own)) != own:
        raise CheckpointError(
            f"the state is of optimizers[{saved[0]}] ({saved[1]}), and optimizers[{number}] ({own[1]}) is to load it: "
            "build them as for that run, and let each load its own state"
        )
    return state


def begin_resumable(loop: Loop, inputs: Inputs, parts: Callable[[Inputs], Parts]) -> None:
    """Begin with the state that the first optimizer has brought, if there is one, and let it carry states from now."""
    host = loop.host
    found = [_read(host, n, optimizer.param_groups[0]) for n, optimizer in enumerate(host.optimizers)]
    state, steps = found[0], [None if own is None else own["now"]["step"] for own in found]
    if state is not None:
        inputs = _in_form(inputs, state["inputs"]) if "inputs" in state else inputs
        if inputs.recorded and not all(mask.all() for mask in state["actuator"].get("masks", {}).values()):
            raise CheckpointError(
                "single weights are masked in the state, and the gradients of this step are not: give attach an "
                "example=(x,), with which masks are there before the first backward pass"
            )
    if inputs.recorded or (state is None and was_cut(host.model)):
        _check_halves(host, steps, state)  # all has been loaded by now
    before = shapes_by_name(host.model)
    with ExitStack() as undo:
        for optimizer in host.optimizers:
            first = optimizer.param_groups[0]
            if KEY in first:
                undo.callback(first.__setitem__, KEY, first.pop(KEY))
        with _dense_shapes(host):  # the state may have cut the model already
            loop.begin(parts(inputs))
            # What batches of one run may differ in, where they are padded to their longest row or the last is short.
            form = {"shapes": shapes_of(inputs.example), "passes": inputs.passes, "samples": inputs.samples}
            carrying = Carrying(loop, form)
            loop.at_detach(carrying.stop)
            if state is not None:
                loop.load_state_dict(state)
        if state is not None:
            _settle(host, loop.groups)
        undo.pop_all()  # it was taken over
    if not inputs.recorded:
        carrying.expect(steps, state, cut=before != shapes_by_name(host.model))


class Carrying:
    """Puts a loop's state, and the form of its first inputs, into what its first optimizer saves, and takes it back.

    The states of other optimizers carry the step. An older state takes a run back; the model's is loaded after it.
    """

    def __init__(self, loop: Loop, form: Mapping[str, Any]) -> None:
        self._loop, self._form, self._begun = loop, form, (loop.control.actuator, loop.control.revocable)
        self._steps: list[int | None] = []  # of the states that the optimizers have loaded since the last step
        self._state: Any = None  # the loop's among them
        self._cut: Mapping[str, list[int]] = {}  # marks of weights that the loop has cut to it, and nobody loaded
        self._watching = False
        self._handles: list[Any] = []
        for number, optimizer in enumerate(loop.host.optimizers):
            self._handles += [
                optimizer.register_state_dict_post_hook(partial(self._put, number)),
                # Ahead of all others: the model must have the state's shapes when they look at it.
                optimizer.register_load_state_dict_pre_hook(partial(self._take, number), prepend=True),
            ]
        # After a step a model of other shapes would not fit its optimizer, whose state has to take both back.
        loop.on_step(lambda event: RESUMING.discard(loop.host.model))

    def _put(self, number: int, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        state: dict[str, Any] = {"now": {"step": self._loop.step}}
        if number == 0:
            # Frameworks keep the random generators themselves, and restore them when it suits them.
            state = {**self._loop.state_dict(), "rng_state": None, "inputs": self._form}
            state["weights"] = _marks(self._loop.host)
        state = sealed({**state, "owner": [number, type(optimizer).__name__]})
        # One tensor of bytes: optimizers copy unknown entries of a parameter group, and every format keeps tensors.
        saved["param_groups"][0][KEY] = torch.frombuffer(bytearray(save(to_tensors(state))), dtype=torch.uint8)

    def _take(self, number: int, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        first, *others = saved["param_groups"] or [{}]
        loop, host = self._loop, self._loop.host
        state = _read(host, number, first)
        if state is None:
            return None
        remaining = {**saved, "param_groups": [{name: value for name, value in first.items() if name != KEY}, *others]}
        steps = self._steps or [None] * len(host.optimizers)
        steps[number] = state["now"]["step"]
        if number > 0:
            self.expect(steps, self._state, cut=bool(self._cut))
            return remaining
        before = shapes_by_name(host.model)
        with loop.restored_on_error("loading the state of the optimizer", self):  # both states are taken, or none
            if loop.step and host.mesh is None:
                self._go_back(state)
            else:
                with _dense_shapes(host):
                    loop.load_state_dict(state)
            _settle(host, loop.groups)
            check_state(optimizer, host.model, loop.groups, remaining)
        self.expect(steps, state, cut=before != shapes_by_name(host.model))
        return remaining

    def _go_back(self, state: Any) -> None:
        """Take over a state in the middle of a run, after what differs from a fresh loop."""
        control, host = self._loop.control, self._loop.host
        if _misfit(host, state):  # values of another width are of no use: those of the state are loaded next
            for module in (host.model, *host.copies):
                if lost := ModelShapes.of(module).buffers:
                    raise CheckpointError(f"the buffer {lost[0]!r} was cut, and is in no state dict: {AGAIN}")
                fit(module, {}, {}, {})
            for optimizer in host.optimizers:
                optimizer.state.clear()
        control.actuator, control.revocable = self._begun
        control.ledger = Ledger(control.ledger.header)
        for watch in (*vars(control.spending.account.watch).values(), control.spending.account.running):
            watch.seconds = 0.0  # those of the state are added
        control.sensor.release(control.sensor_state)
        with _dense_shapes(host):
            load_state(control, state)

    def expect(self, steps: list[int | None], state: Any, *, cut: bool) -> None:
        """Have the next step check that all halves were loaded; `cut` if it was the loop that has cut the model."""
        self._steps, self._state, self._cut = steps, state, _marks(self._loop.host) if cut else {}
        if not self._watching:
            # Not earlier: a loop that begins in a step would change the table of hooks that PyTorch is going through.
            for optimizer in self._loop.host.optimizers:
                self._handles.append(handle := optimizer.register_step_pre_hook(self._check))
                # Ahead of the loop's own, which would read gradients of other widths.
                optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
            self._watching = True

    def _check(self, *of_hook: Any) -> None:
        if self._steps:
            _check_halves(self._loop.host, self._steps, self._state, self._cut)
            self._steps, self._state, self._cut = [], None, {}

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _misfit(host: Host, state: Any) -> str:
    """The first tensor of the model that has another shape than in a loop's state; "" if none."""
    now, wanted = shapes_by_name(host.model), state["actuator"].get("shapes", {})
    return next((name for name, shape in wanted.items() if now.get(name, shape) != tuple(shape)), "")


def _marks(host: Host) -> dict[str, list[int]]:
    """Checksums of each trained weight and of its averages, in half precision: some frameworks save no more."""
    found: dict[str, list[int]] = {n: [] for n, p in host.model.named_parameters() if p.requires_grad}
    for module in (host.model, *host.copies) if host.mesh is None else ():
        for name, weight in module.named_parameters():
            if (name := name.removeprefix("module.")) in found:
                plain = torch.view_as_real(weight) if weight.is_complex() else weight
                found[name].append(crc32(plain.detach().to("cpu", torch.float16).contiguous().numpy().tobytes()))
    return found


def _check_halves(host: Host, steps: Sequence[int | None], state: Any, cut: Mapping[str, list[int]] = {}) -> None:
    """Check before a step that the model and all optimizers have loaded states of one step, or that none has.

    A warning where weights are not those of that step: they may have been rounded, or changed on purpose.
    """
    for number, step in enumerate(steps):
        if step != steps[0]:
            had = ["no state" if step is None else f"a state of step {step}" for step in (steps[0], step)]
            raise CheckpointError(
                f"optimizers[0] has loaded {had[0]}, optimizers[{number}] {had[1]}: load all states, of one checkpoint"
            )
    if state is None:
        if was_cut(host.model):
            raise CheckpointError(
                "the model was cut, but no state of a loop has come with its optimizer: load the optimizer's state as "
                "it was saved with resume=True, too, or attach without resume to begin a run with the model as it is "
                "(in a callback: SetpointCallback(..., resume=False))"
            )
    elif host.mesh is None:
        now, saved = _marks(host), state.get("weights", {})
        other = [name for name, marks in now.items() if name in saved and marks[0] not in saved[name]]
        if _misfit(host, state) or (other and now == cut):
            raise CheckpointError(
                f"the optimizer's state of step {steps[0]} was loaded, the model's was not, or is of another step: "
                "load both, of one checkpoint"
            )
        if other:
            warn(
                f"{counted(len(other), 'weight')} of {len(now)}, the first {other[0]!r}, differ from those of step "
                f"{steps[0]}, of which the optimizer's state is: where the model's state was not loaded, or is of "
                "another step, load both, of one checkpoint. Training continues with the weights as they are"
            )


def _in_form(inputs: Inputs, form: Mapping[str, Any]) -> Inputs:
    """Inputs in the form of those with which a run began, as its state has it; an example stays as it is."""
    if not inputs.recorded:
        return inputs
    passes = form["passes"]
    if passes != inputs.passes:
        warn(
            f"this step called the model {counted(inputs.passes, 'time')}, the first step of the run "
            f"{counted(passes, 'time')}: FLOPs are counted as in the first; where the accumulation was changed, attach "
            "without resume"
        )
    return Inputs(_in_shapes(inputs.example, form["shapes"]), passes, form["samples"], recorded=True)


def _in_shapes(example: Example, shapes: Sequence[Sequence[int]]) -> Example:
    """An example whose tensors have these shapes, if their dims fit: entries are left out at the end, or come again."""
    tensors = list(tensors_of(example))
    if [tensor.dim() for tensor in tensors] != [len(shape) for shape in shapes] or shapes == shapes_of(example):
        return example
    return with_tensors(
        example, {id(tensor): _sized(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)}
    )


def _sized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    found = tensor.detach()
    for dim, size in enumerate(shape):
        if 0 < found.shape[dim] != size:
            found = found.index_select(dim, torch.arange(size, device=found.device) % found.shape[dim])
    return found.requires_grad_(tensor.requires_grad)


@contextmanager
def _dense_shapes(host: Host) -> Iterator[None]:
    """Inside, what was cut to a state already has the dense shapes that a fresh loop expects."""
    cut = [module for module in (host.model, *host.copies) if was_cut(module)]
    with ExitStack() as stack:
        for module in cut:
            stack.enter_context(at_dense_shapes(module, host.optimizers if module is host.model else ()))
        yield
    if cut:  # the wrapper's hooks are on what the tensors were inside
        with host.resizable("the load of a state", ()):
            pass


def _settle(host: Host, groups: tuple[Group, ...]) -> None:
    """Write the numbers that only a loop's groups know, such as those of a config: no shape tells them."""
    sizes = [size for group in groups for size in group.sizes if not is_call(size.place)]
    wanted = {(size.module, size.place): size.index.size for size in sizes}
    tensors = [part.tensor for group in groups for part in group.slices]
    with ExitStack() as undo:
        for module in (host.model, *unwrapped(tensors, host.model, host.copies)):
            stale = {at: n for at, n in wanted.items() if read_size(module.get_submodule(at[0]), at[1]) != n}
            stale |= {at: n for at, n in wanted.items() if implied(at[1]) is not None}
            note_cut(module, {}, stale, undo)
            apply_sizes(module, stale, undo)
        undo.pop_all()


class FollowLoads:
    """Until a loop begins: refuses an optimizer's state that is another's, and re-wraps a model that a load has cut.

    `called` is the model in its wrapper, such as DDP, which must know the sizes before the next forward.
    """

    def __init__(self, host: Host, called: nn.Module) -> None:
        self._host, self._handles = host, list[Any]()
        self._shapes = None if was_cut(host.model) else self._now()
        for number, optimizer in enumerate(host.optimizers):
            self._handles.append(optimizer.register_load_state_dict_pre_hook(partial(self._loading, number)))
        if host.wrapped and called is not host.model:
            self._handles.append(called.register_forward_pre_hook(self._ahead))

    def _now(self) -> list[torch.Size]:
        return [parameter.shape for parameter in self._host.model.parameters()]

    def _loading(self, number: int, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        _read(self._host, number, next(iter(saved["param_groups"]), None))

    def _ahead(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        shapes = self._now()
        if shapes != self._shapes:
            with self._host.resizable("the load of a state", ()):
                self._shapes = shapes

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
