"""A run file: everything that a training run needs to continue, in one file; a load changes all parts or none."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.actuator.tensors import swap
from setpoint.checkpoint.model_file import read_file, some_of, write_file
from setpoint.checkpoint.plain import from_tensors, rng_state, set_rng_state, to_tensors
from setpoint.distributed import is_sharded_tensor
from setpoint.errors import CheckpointError, LoopError, RankError, as_written
from setpoint.messages import a_type

_KEY = "setpoint_run"
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _resizes(part: Any) -> bool:
    """Whether a part is a loop, whose state gives other parts their shapes: it is loaded before them."""
    return hasattr(part, "restored_on_error")


def save_run(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write a training run to one safetensors file with a digest: loop, model, optimizers, and any other parts.

    The write is atomic: `path` names either the old file or the complete new one, even if the process is
    killed or the disk is full. Nothing in the file is ever run as code when it is read. A model that `fully_shard`
    has sharded is saved by `torch.distributed.checkpoint` (docs/distributed.md).

    Args:
        path: of the file; its folder must exist.
        parts: by any name, whatever has a `state_dict()` (loop, model, optimizer, scheduler, scaler, averaged copy),
            and plain data: numbers, strings, tensors, arrays, and dicts, lists and tuples of them.

    Raises:
        CheckpointError: when a part cannot be stored, a loop comes without its model, an optimizer or a copy, or the
            file cannot be written; the old file is then still there.
        LoopError: in the middle of a step.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_run(f"{folder}/run", model=nn.Linear(2, 3), epoch=4)
    ...     load_run(f"{folder}/run", model=nn.Linear(2, 3))
    {'epoch': 4}
    """
    _check_instances("save_run", parts)
    for name, part in parts.items():
        if _resizes(part):
            part.check_saved_with(name, list(parts.values()))
    states = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
    values = {name: part for name, part in parts.items() if name not in states}
    write_file(Path(path), _KEY, {}, to_tensors({"states": states, "values": values}))


def load_run(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any]:
    """Read a file that `save_run` wrote into freshly built parts, and return the plain data that was saved with them.

    Build model, optimizer and the rest as at the beginning of the run, attach, and load. The loop is loaded first,
    whatever the order of the arguments: it shrinks model, optimizers and copies to the saved widths. If a part does not
    take its state, all parts are as before: the model is dense again, and all values, which wait in host memory until
    then, are back.

    Args:
        path: the file.
        parts: the parts that have a state, by the names under which they were saved.

    Raises:
        CheckpointError: for a file that is missing, damaged, of another format or of another run, for other parts than
            those that were saved, or for a part that does not take its state; everything is then as before.

    >>> import tempfile, torch, setpoint
    >>> from torch import nn
    >>> def build():
    ...     model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     loop = setpoint.attach(model, optimizer, 0.5, total_steps=30, example=(torch.ones(8, 4),))
    ...     return {"model": model, "optimizer": optimizer, "loop": loop}
    >>> first, again = build(), build()
    >>> for _ in range(15):
    ...     first["model"](torch.randn(8, 4)).square().mean().backward()
    ...     first["optimizer"].step()
    ...     first["optimizer"].zero_grad()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_run(f"{folder}/run", **first, epoch=4)
    ...     load_run(f"{folder}/run", **again)
    {'epoch': 4}
    >>> again["loop"].step, again["model"][0].out_features == first["model"][0].out_features < 32
    (15, True)
    >>> first["loop"].detach()
    >>> again["loop"].detach()
    """
    _check_instances("load_run", parts)
    path = Path(path)
    _, tensors = read_file(path, _KEY, "setpoint.save_run did not write it: read a model's file by setpoint.load")
    with as_written(repr(str(path))):
        states, values = map(dict, from_tensors(tensors).values())
        if set(states) != set(parts):
            raise CheckpointError(
                f"{str(path)!r} holds the states of {some_of(states)}, load_run was given {some_of(parts)}: give the "
                "same parts"
            )
    loops = [part for part in parts.values() if _resizes(part)]
    others = [part for part in parts.values() if not _resizes(part)]
    with ExitStack() as stack:
        for loop in loops:  # it puts the others back as well: DDP must be made for the old shapes meanwhile
            stack.enter_context(loop.restored_on_error(f"loading {str(path)!r}", *others))
        if not loops:
            put_back = snapshot(*others)
            stack.push(lambda error, *_: None if error is None else put_back())
        # Any other order would load narrow tensors into a model that is still dense.
        for name in sorted(states, key=lambda name: not _resizes(parts[name])):
            try:
                parts[name].load_state_dict(states[name])
            except (CheckpointError, LoopError, RankError):
                raise
            except Exception as error:  # PyTorch and the user's own classes raise what they like
                raise CheckpointError(
                    f"{str(path)!r}: {name} does not take the state that was saved under its name, and nothing was "
                    f"changed ({type(error).__name__}: {' '.join(str(error).split())})"
                ) from (error if str(error).isprintable() else None)  # Python prints a cause's text as it is
    return values


def _check_instances(what: str, parts: Mapping[str, Any]) -> None:
    for name in [name for name, part in parts.items() if isinstance(part, type)]:
        raise CheckpointError(f"{what}({name}=...) was given {a_type(parts[name])}: give the object itself")


def snapshot(*parts: Any) -> Callable[[], None]:
    """A function that puts everything in these parts back: tensors with shapes and hooks, tables, attributes.

    Objects keep their identity. Followed are modules, optimizers, what has a `state_dict`, and Setpoint's own objects.
    The global random generators are put back too. Values wait in host memory. Tensors that `fully_shard` has made are
    left as they are.

    >>> layer = nn.Linear(2, 3)
    >>> put_back = snapshot(layer)
    >>> layer.out_features, layer.weight.data = 1, torch.ones(1, 2)
    >>> put_back()
    >>> layer, layer.weight.shape
    (Linear(in_features=2, out_features=3, bias=True), torch.Size([3, 2]))
    """
    undo: list[Callable[[], None]] = []
    # It holds the objects as well: an address may be given away again.
    seen: dict[int, Any] = {}
    waiting: list[Any] = [parts]
    while waiting:  # no recursion, since chains of objects may be longer than Python's stack
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            waiting.extend(_held(value, undo))
    generators = rng_state()

    def put_back() -> None:
        for restore in undo:
            restore()
        set_rng_state(generators)

    return put_back


def _held(value: Any, undo: list[Callable[[], None]]) -> Iterable[Any]:
    """What an object holds that is to be put back too; how to put back the object itself goes to `undo`."""
    if isinstance(value, Tensor):
        if not is_sharded_tensor(value):
            undo.append(_tensor(value))
    elif isinstance(value, np.ndarray):
        if value.flags.writeable and not value.dtype.hasobject:
            undo.append(partial(np.copyto, value, value.copy()))
    elif isinstance(value, DistributedDataParallel):
        return [value.module]  # a reducer must not come back: the host makes it for the present parameters
    elif isinstance(value, (dict, list, deque, set)):
        undo.append(_contents(value))
        return _objects_in(value)
    elif isinstance(value, (tuple, frozenset)):
        return value
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        own = type(value).__module__.partition(".")[0] == "setpoint"
        if own or isinstance(value, (nn.Module, Optimizer)) or hasattr(type(value), "state_dict"):
            return [vars(value)]
    return ()


def _tensor(tensor: Tensor) -> Callable[[], None]:
    memory = tensor.detach()  # what it lies in; a change of shape gives it other memory
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    stored = plain and not (tensor.is_meta or tensor.is_quantized or tensor.is_inference())
    # Entries of an expanded tensor share memory, and `copy_` into such a tensor raises.
    overlaps = stored and any(
        step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)
    )
    values = memory.to("cpu", copy=True) if stored and not overlaps else None
    gradient = tensor.grad if tensor.is_leaf else None
    hooks = [set(getattr(tensor, name, None) or ()) for name in _HOOKS]

    @torch.no_grad()
    def put_back() -> None:
        now, before = [(one.shape, one.dtype, one.data_ptr() if stored else 0) for one in (tensor, memory)]
        if now != before:
            swap(tensor, memory, ExitStack())
        if values is not None:
            memory.copy_(values)
        if tensor.is_leaf:
            tensor.grad = gradient
        # Masks put hooks on parameters; a mask of a run that was refused must not go on zeroing gradients.
        for name, known in zip(_HOOKS, hooks, strict=True):
            table = getattr(tensor, name, None) or {}
            for number in set(table) - known:
                del table[number]

    return put_back


def _contents(container: Any) -> Callable[[], None]:
    before = dict(container) if isinstance(container, dict) else list(container)
    objects = _objects_in(container)

    def put_back() -> None:
        now = _objects_in(container)
        # What has not changed is not touched: somebody may be iterating over it.
        if len(now) != len(objects) or any(new is not old for new, old in zip(now, objects, strict=True)):
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)

    return put_back


def _objects_in(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
