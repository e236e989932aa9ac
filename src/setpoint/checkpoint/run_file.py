"""A run file: everything that a training run needs to go on, in one file that is never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from setpoint.checkpoint.model_file import damaged, digest, read_file, write_file
from setpoint.checkpoint.plain import from_tensors, to_tensors
from setpoint.checkpoint.snapshot import snapshot
from setpoint.errors import CheckpointError, LoopError, RankError

FORMAT = 1
"""Version of the file format, described in docs/resume.md."""

_KEY = "setpoint_run"


@runtime_checkable
class Resizing(Protocol):
    """A part whose state gives other parts their shapes, a loop: it is loaded before them."""

    def check_saved_with(self, name: str, parts: Sequence[Any]) -> None:
        """Raise CheckpointError unless its model, optimizers and copies are among the parts."""

    def restored_on_error(self, what: str, *others: Any) -> AbstractContextManager[None]:
        """Inside, states are loaded on all ranks or on none: after an exception it and all parts are as before."""


def save_run(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write a training run to one safetensors file with a digest: loop, model, optimizers, and any other parts.

    The write is atomic: `path` names either the old file or the complete new one, even if the process is
    killed or the disk is full. Nothing in the file is ever run as code when it is read. A model that `fully_shard`
    has sharded is saved by `torch.distributed.checkpoint` (docs/resume.md).

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
    for name, part in parts.items():
        if isinstance(part, Resizing):
            part.check_saved_with(name, list(parts.values()))
    states = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
    values = {name: part for name, part in parts.items() if name not in states}
    tensors = to_tensors({"states": states, "values": values})
    text = json.dumps({"format": FORMAT, "sha256": digest(tensors, str(FORMAT))})
    write_file(Path(path), tensors, {_KEY: text})


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
    states, values = _read(Path(path))
    if set(states) != set(parts):
        raise CheckpointError(
            f"{str(path)!r} holds the states of {_some(states)}, load_run was given {_some(parts)}: give the same parts"
        )
    # Any other order would load narrow tensors into a model that is still dense.
    loops_first = sorted(states, key=lambda name: not isinstance(parts[name], Resizing))
    with _all_or_none(f"loading {str(path)!r}", parts):
        for name in loops_first:
            _load(str(path), name, parts[name], states[name])
    return values


@contextmanager
def _all_or_none(what: str, parts: Mapping[str, Any]) -> Iterator[None]:
    """If anything is raised inside, all parts are as before, with the models that loops hold."""
    loops = [part for part in parts.values() if isinstance(part, Resizing)]
    others = [part for part in parts.values() if not isinstance(part, Resizing)]
    # With a loop it is the loop that puts back: a wrapper such as DDP must be made for the old shapes meanwhile.
    put_back = snapshot([] if loops else others)
    with ExitStack() as stack:
        for loop in loops:
            stack.enter_context(loop.restored_on_error(what, *others))
            others = []  # the first loop puts them back
        try:
            yield
        except BaseException:
            put_back()
            raise


def _load(path: str, name: str, part: Any, state: Any) -> None:
    try:
        part.load_state_dict(state)
    except (CheckpointError, LoopError, RankError):
        raise
    except Exception as error:  # PyTorch and the user's own classes raise what they like
        raise CheckpointError(
            f"{path!r}: {name} does not take the state that was saved under its name, and nothing was changed "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a folder: give the file that setpoint.save_run wrote")
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


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:5])) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") or "none"
