"""Carrying: a loop's state inside its optimizer's own state dict, so that any framework saves and loads it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.model_shapes import apply_sizes, note_cut, was_cut
from setpoint.actuator.optimizer_check import check_state
from setpoint.actuator.shrink import unwrapped
from setpoint.checkpoint.fit import at_dense_shapes
from setpoint.checkpoint.plain import from_tensors, to_tensors
from setpoint.errors import CheckpointError, as_written
from setpoint.groups.example import Example, shapes_of, tensors_of, with_tensors
from setpoint.groups.group import Group
from setpoint.groups.sizes_in_code.place import implied, is_call, read_size
from setpoint.host.host import Host
from setpoint.loop.candidates import Inputs
from setpoint.loop.control import Parts
from setpoint.loop.loop import Loop
from setpoint.messages import counted, warn

KEY = "setpoint"  # entry of the first parameter group: PyTorch keeps such entries in its optimizers' states


def brought(optimizer: Optimizer) -> Any | None:
    """The loop's state that an optimizer has loaded with its own; None if there is none."""
    data = optimizer.param_groups[0].get(KEY)
    return None if data is None else _unpacked(data)


def _unpacked(data: Any) -> Any:
    with as_written("the loop's state in the optimizer's state dict"):
        return from_tensors(load(data.cpu().numpy().tobytes()))


def begin_resumable(loop: Loop, inputs: Inputs, parts: Callable[[Inputs], Parts]) -> None:
    """Begin with the state that the first optimizer has brought, if there is one, and let it carry states from now."""
    host, optimizer = loop.host, loop.host.optimizers[0]
    state = brought(optimizer)
    if state is not None:
        inputs = _in_form(inputs, state["inputs"]) if "inputs" in state else inputs
        with _dense_shapes(host):  # the state may have cut the model already
            loop.begin(parts(inputs))
            loop.load_state_dict(state)
        _settle(host, loop.groups)
    elif was_cut(host.model):
        raise CheckpointError(
            "the model was cut, but no state of a loop has come with its optimizer: load the optimizer's state as "
            "it was saved with resume=True, too, or attach without resume to begin a run with the model as it is "
            "(in a callback: SetpointCallback(..., resume=False))"
        )
    else:
        loop.begin(parts(inputs))
    optimizer.param_groups[0].pop(KEY, None)  # it was taken over
    # What batches of one run may differ in, where they are padded to their longest row or the last is short.
    form = {"shapes": shapes_of(inputs.example), "passes": inputs.passes, "samples": inputs.samples}
    loop.at_detach(Carrying(loop, form).stop)


class Carrying:
    """Puts a loop's state, and the form of its first inputs, into what its first optimizer saves, and takes it back."""

    def __init__(self, loop: Loop, form: Mapping[str, Any]) -> None:
        self._loop, self._form = loop, form
        optimizer = loop.host.optimizers[0]
        self._handles = [
            optimizer.register_state_dict_post_hook(self._put),
            # Ahead of all others: the model must have the state's shapes when they look at it.
            optimizer.register_load_state_dict_pre_hook(self._take, prepend=True),
        ]

    def _put(self, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        # Frameworks keep the random generators themselves, and restore them when it suits them.
        state = {**self._loop.state_dict(), "rng_state": None, "inputs": self._form}
        # One tensor of bytes: optimizers copy unknown entries of a parameter group, and every format keeps tensors.
        saved["param_groups"][0][KEY] = torch.frombuffer(bytearray(save(to_tensors(state))), dtype=torch.uint8)

    def _take(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
        first, *others = saved["param_groups"] or [{}]
        if not isinstance(first, dict) or KEY not in first:
            return None
        remaining = {**saved, "param_groups": [{name: value for name, value in first.items() if name != KEY}, *others]}
        state, loop, host = _unpacked(first[KEY]), self._loop, self._loop.host
        with loop.restored_on_error("loading the state of the optimizer"):  # both states are taken, or none
            with _dense_shapes(host):
                loop.load_state_dict(state)
            _settle(host, loop.groups)
            check_state(optimizer, host.model, loop.groups, remaining)
        return remaining

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


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
    """Re-wraps a model that a loaded state has cut inside `called`, such as DDP, before the next forward."""

    def __init__(self, host: Host, called: nn.Module) -> None:
        self._host, self._handle = host, called.register_forward_pre_hook(self._ahead)
        self._shapes = None if was_cut(host.model) else self._now()

    def _now(self) -> list[torch.Size]:
        return [parameter.shape for parameter in self._host.model.parameters()]

    def _ahead(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        shapes = self._now()
        if shapes != self._shapes:
            with self._host.resizable("the load of a state", ()):
                self._shapes = shapes

    def stop(self) -> None:
        self._handle.remove()
