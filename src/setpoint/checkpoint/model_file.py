"""A checkpoint: a shrunk model in one file, its sizes beside its tensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from setpoint.actuator.in_state_dict import check_not_attached
from setpoint.actuator.model_shapes import ModelShapes, Shape, by_module
from setpoint.actuator.tensors import is_persistent, named_tensors
from setpoint.checkpoint.fields import fields_of, ordinary_file
from setpoint.checkpoint.fit import fit, not_made
from setpoint.checkpoint.plain import to_host
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError
from setpoint.messages import a_type

FORMAT = 1
"""Version of the file format, described in docs/checkpoint-format.md."""

SIZES_FILE = "setpoint.json"
"""Beside the weights of a cut model that `save_pretrained` wrote: its sizes."""

_KEY = "setpoint"


@dataclass(frozen=True)
class _Header:
    sizes: Mapping[str, Mapping[str, int]]  # by module name and place, what the place must hold
    aliases: Mapping[str, str]  # further names of tied tensors, and the name each is stored under
    complex: tuple[str, ...]  # names of complex tensors, stored as pairs of reals along a last dim of length 2
    transient: tuple[str, ...]  # names of non-persistent buffers that a cut has changed
    dense: Mapping[str, tuple[int, ...]]  # by name, the shape that a tensor had before its first cut


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model, shrunk or not, to one safetensors file: tensors, sizes and a digest.

    The file holds all parameters and persistent buffers, tied ones once, and the sizes that cuts have set
    in the model's code. The write is atomic: `path` names either the old file or the complete new one. The
    folder must exist. A wrapper of `torch.compile` or `DistributedDataParallel` is removed.

    Raises:
        CheckpointError: when a tensor cannot be stored (sharded, quantized, without data), a module keeps extra state,
            or the file cannot be written; the old file is then still there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(nn.Linear(2, 3), f"{folder}/small.safetensors")
    ...     load(f"{folder}/small.safetensors", into=nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    model = unwrap_module("save", model)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {name!r} ({type(module).__name__}) keeps extra state, and a checkpoint holds tensors only: "
                "turn that state into buffers, or save it beside the file"
            )
    known = ModelShapes.of(model)
    own, aliases = _stored(model, known.buffers)
    pairs = tuple(name for name, tensor in own.items() if tensor.is_complex())
    dense = {name: shape for name, shape in known.dense.items() if name in own}
    header = _Header(by_module(known.sizes), aliases, pairs, known.buffers, dense)
    tensors = {name: to_host(tensor) for name, tensor in own.items()}
    text = json.dumps({"format": FORMAT, **asdict(header), "sha256": digest(tensors, _words(header))})
    write_file(Path(path), tensors, {_KEY: text})


def load(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Read a file that `save` wrote into a model of the same code, and return that model.

    `into` is the dense model as its code builds it, on the device where it is wanted. `into` becomes the saved model:
    its parameters and buffers keep their identity, device, memory format and `requires_grad`, and take shape, values
    and dtype from the file. Everything is checked before anything is changed.

    Raises:
        CheckpointError: for a file that is missing, damaged, not Setpoint's, of a newer format, or made for another
            model; `into` is then as before.
        LoopError: when a loop is at work on `into`.

    >>> import tempfile
    >>> from setpoint import shrink_to
    >>> def build():
    ...     return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> small = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(shrink_to(build(), small.state_dict()), f"{folder}/small.safetensors")
    ...     load(f"{folder}/small.safetensors", into=build())[0]
    Linear(in_features=2, out_features=3, bias=True)
    """
    unwrap_module("load(..., into=model)", into)
    check_not_attached(into)
    path = Path(path)
    if path.is_dir():
        then = _how_pretrained_loads(path) or "give the file that setpoint.save wrote"
        raise CheckpointError(f"{str(path)!r} is a folder: {then}")
    metadata, stored = read_file(path)
    header = _parse(path, metadata, stored)
    # The file's data may be aligned for single reals only; a copy is aligned for pairs of them too.
    pairs = {name: torch.view_as_complex(stored[name].clone()) for name in header.complex}
    tensors = stored | pairs
    own, aliases = _stored(into, header.transient)
    later = {name for name in not_made(into, header.transient) if name in tensors}
    _check_same_names({*own, *later}, aliases, tensors, header)
    dense = ModelShapes.of(into).full(into)
    for name, tensor in own.items():
        _check_fits(name, tensors[name], header.dense.get(name), tensor, dense[name])
    shapes = {name: tuple(tensors[name].shape) for name in header.dense}
    sizes = {(module, place): size for module, places in header.sizes.items() for place, size in places.items()}
    fit(into, shapes, sizes, tensors, header.dense)
    return into


def unwrap_module(what: str, value: Any) -> nn.Module:
    """The module, out of its wrappers."""
    if not isinstance(value, nn.Module):
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise CheckpointError(f"{what} takes a torch.nn.Module, got {found}: give the model itself")
    module: nn.Module = unwrapped(value)
    return module


def _stored(model: nn.Module, transient: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that belong in a file by their first name, and that name by every further one."""
    first: dict[int, str] = {}
    own: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        if not isinstance(tensor, nn.Parameter) and name not in transient and not is_persistent(model, name):
            continue
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            _check_plain(name, tensor)
            first[id(tensor)] = name
            own[name] = tensor
    return own, aliases


def _check_plain(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{name!r} is {a_type(tensor)} of layout {tensor.layout}; a checkpoint takes plain dense tensors: "
            "save sharded ones inside `with setpoint.unsharded(model):`, and dequantize quantized ones first"
        )
    if tensor.is_meta:
        raise CheckpointError(f"{name!r} is on the meta device and has no data: build the model on a real device")


def _words(header: _Header) -> str:
    return json.dumps(asdict(header), sort_keys=True)


def digest(tensors: Mapping[str, Tensor], words: str) -> str:
    """SHA-256 over the words, then name, dtype, shape and bytes of every tensor in order of names."""
    total = hashlib.sha256(words.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        what = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        total.update(json.dumps(what).encode())
        # A copy: one element or none may have any stride, and `view` needs 1.
        flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write to a neighbouring file, `.NAME.PID.partial`, and rename it: nobody ever sees half a file."""
    partial = ordinary_file(path).with_name(f".{path.name}.{os.getpid()}.partial")
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}: make it first")
    try:
        partial.touch()  # with the rights of the user's other new files, which `save_file` does not give
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)
        with open(partial, "rb+") as file:
            # Before the rename: after a power cut the name must not point at contents that never reached the disk.
            os.fsync(file.fileno())
        os.replace(partial, path)
        # The folder, too, so that the new name survives a power cut; Windows cannot open folders, and need not.
        with suppress(OSError):
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, or a CheckpointError when it is none, or cannot be read."""
    ordinary_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        # Only after it failed: a valid file begins with its header's length, which may have any first byte.
        if start[:1] == b"\x80" or start == b"PK\x03\x04":
            raise CheckpointError(
                f"{str(path)!r} is a pickle, as torch.save writes it, and is not opened, since a pickle can run any "
                "code: load it with torch.load(..., weights_only=True) and write it again with setpoint.save"
            ) from error
        raise CheckpointError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error


def damaged(path: Path) -> CheckpointError:
    """The error for what is not as it was written."""
    return CheckpointError(f"{str(path)!r} is damaged: its digest does not match its contents; get it again")


def _how_pretrained_loads(folder: Path) -> str:
    """How to load what `save_pretrained` wrote of a cut model; empty for another folder."""
    if not (folder / SIZES_FILE).is_file():
        return ""
    return (
        f"save_pretrained wrote it, with its sizes in {SIZES_FILE}: "
        f"setpoint.enable_checkpointing(), then from_pretrained({str(folder)!r})"
    )


def _parse(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> _Header:
    if _KEY not in metadata:
        then = _how_pretrained_loads(path.parent)
        then = then or "load it with safetensors.torch.load_file and model.load_state_dict"
        raise CheckpointError(f"{str(path)!r} is a safetensors file, but setpoint.save did not write it: {then}")
    try:
        text: dict[str, Any] = json.loads(metadata[_KEY])
        version = text["format"]
        if type(version) is not int:
            raise damaged(path)
        if version > FORMAT:
            raise CheckpointError(
                f"{str(path)!r} has format {version}, this Setpoint reads up to {FORMAT}: upgrade Setpoint"
            )
        header, expected = _Header(**fields_of(_Header, text)), text["sha256"]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise damaged(path) from error
    if digest(tensors, _words(header)) != expected:
        raise damaged(path)
    return header


def _check_same_names(
    own: set[str], aliases: Mapping[str, str], tensors: Mapping[str, Tensor], header: _Header
) -> None:
    theirs, ours = {*tensors, *header.aliases}, {*own, *aliases}
    if theirs != ours:
        raise CheckpointError(
            f"the file was made for another model: only the file has {some_of(theirs - ours)}; "
            f"only the model has {some_of(ours - theirs)}; build `into` with the code of the saved model"
        )
    if dict(header.aliases) != dict(aliases):
        differing = {name for name in ours if header.aliases.get(name) != aliases.get(name)}
        raise CheckpointError(
            f"the file and the model tie different tensors: {some_of(differing)}; "
            "build `into` with the same weight tying as the saved model"
        )


def some_of(names: Iterable[str]) -> str:
    """The first names in their order, for a message.

    >>> some_of("bcad")
    "'a', 'b', 'c' and 1 more"
    """
    ordered = sorted(names)
    return ", ".join(map(repr, ordered[:3])) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "none"


def _check_fits(name: str, saved: Tensor, before: Sequence[int] | None, own: Tensor, dense: Shape) -> None:
    """Check that a tensor was as large in the dense model of the file as it is in this one, and of the same kind."""
    if dense not in (tuple(saved.shape), tuple(before or saved.shape)):
        raise CheckpointError(
            f"the file was made for another model: {name!r} has shape {tuple(saved.shape)} in the file and "
            f"{dense} in the model; `into` must be the dense model that was shrunk"
        )
    # `load` takes the file's dtype: complex or integer numbers must not take the place of real ones.
    if (saved.is_complex(), saved.is_floating_point()) != (own.is_complex(), own.is_floating_point()):
        raise CheckpointError(
            f"the file was made for another model: {name!r} is {saved.dtype} in the file and {own.dtype} in the model"
        )
