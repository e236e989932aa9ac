"""A run file: everything that a training run needs to go on, in one file that is never half written."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.lineage import by_every_name
from setpoint.actuator.shrink import named_tensors
from setpoint.checkpoint import damaged, digest, read_file, write_file
from setpoint.checkpoint.as_it_was import as_it_was
from setpoint.checkpoint.kinds import check_kinds
from setpoint.checkpoint.tree import from_tensors, to_tensors
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError, LoopError, RankError
from setpoint.host.optimizers import real_optimizer
from setpoint.loop.loop import Loop
from setpoint.loop.resume import check_numbers
from setpoint.runs.run_folder import read_folder, spread_over, write_folder

FORMAT = 1
"""Version of the file format, described in docs/resume.md."""

_KEY = "setpoint_run"
_SHOWN = (nn.Module, Optimizer)


def save_run(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write a training run to one safetensors file with a digest: loop, model, optimizers, and any other parts.

    If a model among the parts is sharded over ranks by `fully_shard`, all ranks call `save_run`, and `path` is a folder
    that does not exist yet: `torch.distributed.checkpoint` writes each rank's parts, and plain data of each rank.

    The write is atomic: `path` names either the old file or the complete new one, even if the process is
    killed or the disk is full. Nothing in the file is ever run as code when it is read.

    Args:
        path: of the file; its folder must exist.
        parts: by any name, whatever has a `state_dict()` (loop, model, optimizer, scheduler, scaler, averaged copy),
            and plain data: numbers, strings, tensors, arrays, and dicts, lists and tuples of them.

    Raises:
        CheckpointError: when a part cannot be stored, a loop comes without its model, an optimizer or a copy, or the
            file cannot be written; the old file is then still there.
        LoopError: in the middle of a step.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_run(f"{folder}/run", model=nn.Linear(2, 3), epoch=4)
    ...     load_run(f"{folder}/run", model=nn.Linear(2, 3))
    {'epoch': 4}
    """
    _check_complete(parts)
    states = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
    values = {name: part for name, part in parts.items() if name not in states}
    ranks, mesh = spread_over(parts)
    if mesh is not None:
        write_folder(Path(path), {"states": states, "values": values}, ranks)
        return
    tensors = to_tensors({"states": states, "values": values})
    text = json.dumps({"format": FORMAT, "sha256": digest(tensors, str(FORMAT))})
    write_file(Path(path), tensors, {_KEY: text})


def load_run(path: str | os.PathLike[str], **parts: Any) -> dict[str, Any]:
    """Read a file that `save_run` wrote into freshly built parts, and return the plain data that was saved with them.

    Build model, optimizer and the rest as at the beginning of the run, attach, and load. Parts that belong to no loop
    (schedulers, a scaler, another model) are loaded first, whatever the order of the arguments. The loop comes next and
    shrinks model, optimizers and copies to the saved widths; their values come last. If a part does not take its state,
    all parts are as before: the model is dense again, and all values, which wait in host memory until then, are back.
    For a model that `fully_shard` has sharded, the loop's state is checked first; later failures are not undone.

    All ranks read the folder of a sharded run. There may be more or fewer ranks than when it was saved.

    Args:
        path: the file or folder.
        parts: the parts that have a state, by the names under which they were saved.

    Raises:
        CheckpointError: for a file that is missing, damaged, of another format or of another run, for other parts than
            those that were saved, or for a part that does not take its state; everything is then as before.

    >>> import tempfile, torch, setpoint
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
    ranks, mesh = spread_over(parts)
    if mesh is not None:
        tree = read_folder(Path(path), ranks, mesh)
        states, values = dict(tree["states"]), dict(tree["values"])
    elif Path(path).is_dir():
        raise CheckpointError(
            f"{str(path)!r} is the folder of a sharded run: call fully_shard on the model, on every rank"
        )
    else:
        states, values = _read(Path(path))
    try:
        _check_parts(str(path), states, parts)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(path)!r} holds a state that none of these parts has returned: {error!r}"
        ) from error
    loops = [part for part in parts.values() if isinstance(part, Loop)]
    theirs = [each for loop in loops for each in (loop.host.model, *loop.host.optimizers, *loop.host.averages.holders)]
    attached = {id(each) for each in (*loops, *theirs)}
    strangers = [name for name in states if id(_bare(parts[name])) not in attached]
    ours = sorted(set(states) - {*strangers}, key=lambda name: (not isinstance(parts[name], Loop), name))
    kept = [parts[name] for name in (strangers if mesh is not None else states)]
    with _all_or_none(kept, [] if mesh is not None else loops), ExitStack() as together:
        for loop in loops:
            together.enter_context(loop.host.together(f"loading {str(path)!r}"))
        for name in (*strangers, *ours):
            _load(str(path), name, parts[name], states[name])
    return values


def _bare(part: Any) -> Any:
    return unwrapped(part) if isinstance(part, nn.Module) else real_optimizer(part)


@contextmanager
def _all_or_none(parts: Sequence[Any], loops: Sequence[Loop]) -> Iterator[None]:
    """If anything is raised inside, parts and loops are as they were, with the models that the loops hold."""
    put_back = as_it_was(parts, loops)
    # What keeps a state where attributes do not show it is asked for it.
    own = [(part, copy.deepcopy(part.state_dict())) for part in parts if not isinstance(part, (*_SHOWN, Loop))]
    try:
        yield
    except BaseException:
        for part, state in own:
            if state:  # that of a disabled GradScaler is empty, and it takes none
                with suppress(Exception):
                    part.load_state_dict(state)
        with suppress(RankError), ExitStack() as resizable:  # ranks that fail together put all back together
            for loop in loops:
                resizable.enter_context(loop.host.resizable("putting back what was there before", loop.groups))
            put_back()
        raise


def _load(path: str, name: str, part: Any, state: Any) -> None:
    try:
        if type(part).__name__ == "GradScaler" and part.is_enabled() != bool(state):
            raise ValueError("one of them is enabled and the other is not")
        part.load_state_dict(state)
    except (CheckpointError, LoopError, RankError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path!r}: {name} does not take the state that was saved under its name, and nothing was changed "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _check_complete(parts: Mapping[str, Any]) -> None:
    """Check that every loop comes with the model, optimizers and copies whose tensors it does not store itself."""
    given = {id(_bare(part)) for part in parts.values()}
    for name, part in parts.items():
        if isinstance(part, Loop):
            mine = {"model": [part.host.model], "optimizer": part.host.optimizers, "copy": part.host.averages.named}
            for what, needed in mine.items():
                if not {id(each) for each in needed} <= given:
                    raise CheckpointError(f"{name!r} is of no use without its {what}: save_run(path, {what}=..., ...)")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    metadata, tensors = read_file(path)
    if _KEY not in metadata:
        raise CheckpointError(
            f"{str(path)!r} was not written by setpoint.save_run: read a model's file by setpoint.load"
        )
    try:
        header = json.loads(metadata[_KEY])
        version, expected = header["format"], header["sha256"]
        if version != FORMAT:
            raise CheckpointError(
                f"{str(path)!r} has format {version!r:.80}, this Setpoint reads {FORMAT}: upgrade Setpoint"
            )
        if digest(tensors, str(version)) != expected:
            raise damaged(path)
        tree = from_tensors(tensors)
        return dict(tree["states"]), dict(tree["values"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise damaged(path) from error


def _check_parts(path: str, states: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    if set(states) != set(parts):
        raise CheckpointError(
            f"{path!r} holds the states of {_some(states)}, load_run was given {_some(parts)}: give the same parts"
        )
    cut = {id(part.host.model): _names_of_cut(part) for part in parts.values() if isinstance(part, Loop)}
    for name, part in parts.items():
        check_kinds(f"{path!r}: {name}", part, states[name])
        if isinstance(part, nn.Module):
            if part is unwrapped(part) and id(part) in cut:  # a wrapper's names are its own
                _check_sizes(path, name, part, states[name], cut[id(part)])
            own, saved = set(part.state_dict()), set(states[name])
            if own != saved:
                raise CheckpointError(
                    f"{path!r} was made for another {name}: only the file has {_some(saved - own)}, only the module "
                    f"has {_some(own - saved)}"
                )
            _check_sorts(path, name, part, states[name])
        if isinstance(part, Optimizer):
            own_groups = [len(settings["params"]) for settings in part.param_groups]
            groups = [len(settings["params"]) for settings in states[name]["param_groups"]]
            if own_groups != groups:
                raise CheckpointError(
                    f"{path!r} was made for another {name}: its parameter groups have {groups} parameters, here "
                    f"{own_groups}"
                )
            check_numbers(part, states[name])


def _check_sorts(path: str, name: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Check that no tensor is to be turned from complex numbers into real ones, or from fractions into integers."""
    for key, tensor in module.state_dict().items():
        other = saved[key]
        if isinstance(tensor, Tensor) and isinstance(other, Tensor) and _sort(tensor) != _sort(other):
            raise CheckpointError(
                f"{path!r} was made for another {name}: {key!r} is {other.dtype} there and {tensor.dtype} here"
            )


def _sort(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_complex(), tensor.is_floating_point()


def _names_of_cut(loop: Loop) -> set[str]:
    """Every name of the tensors that a loop cuts; a group has one of a tied tensor."""
    places = {place.tensor: () for group in loop.groups for place in group.slices}
    return set(by_every_name(places, named_tensors(loop.host.model)))


def _check_sizes(path: str, name: str, module: nn.Module, saved: Mapping[str, Any], cut: set[str]) -> None:
    """Check that tensors which no loop cuts have the sizes of those that were saved."""
    for key, tensor in module.state_dict().items():
        other = saved.get(key)
        if key not in cut and isinstance(tensor, Tensor) and isinstance(other, Tensor) and tensor.shape != other.shape:
            raise CheckpointError(
                f"{path!r} was made for another {name}: {key!r} has shape {tuple(other.shape)} there and "
                f"{tuple(tensor.shape)} here"
            )


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:5])) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") or "none"
