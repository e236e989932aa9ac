"""A checkpoint: a cut model in one file, its sizes with its tensors, never a pickle."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from setpoint.actuator.in_state_dict import StateSizes, check_not_attached
from setpoint.actuator.model_shapes import ModelShapes, by_module
from setpoint.actuator.tensors import is_persistent, named_tensors
from setpoint.checkpoint.fit import fit
from setpoint.checkpoint.plain import json_object, to_host
from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError, as_written
from setpoint.messages import a_type

FORMAT = 1  # version of both file formats, described in docs/checkpoint-format.md
SIZES_FILE = "setpoint.json"  # beside the weights of a cut model that `save_pretrained` wrote: its sizes
_KEY = "setpoint"


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
                "turn that state into buffers, or save it in a file of its own"
            )
    known = ModelShapes.of(model)
    own, aliases = _stored(model, known.buffers)
    header = {
        "sizes": by_module(known.sizes),
        "aliases": aliases,
        "complex": [name for name, tensor in own.items() if tensor.is_complex()],
        "transient": list(known.buffers),
        "dense": {name: list(shape) for name, shape in known.dense.items() if name in own},
    }
    write_file(Path(path), _KEY, header, {name: to_host(tensor) for name, tensor in own.items()})


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
    folder = path if path.is_dir() else path.parent
    then = "load it with safetensors.torch.load_file and model.load_state_dict"
    if (folder / SIZES_FILE).is_file():
        then = f"save_pretrained did: setpoint.enable_checkpointing(), then from_pretrained({str(folder)!r})"
    header, stored = read_file(path, _KEY, f"setpoint.save did not write it: {then}")
    # The file's data may be aligned for single reals only; a copy is aligned for pairs of them too.
    with as_written(repr(str(path))):
        tensors = stored | {name: torch.view_as_complex(stored[name].clone()) for name in header["complex"]}
        own, aliases = _stored(into, header["transient"])
        _check_same_names(set(own), aliases, tensors, header["aliases"])
        carried = StateSizes.parse({**header, "format": 1, "transient": {}})
    for name, tensor in own.items():
        saved = tensors[name]
        # `load` takes the file's dtype: complex or integer numbers must not take the place of real ones.
        if (saved.is_complex(), saved.is_floating_point()) != (tensor.is_complex(), tensor.is_floating_point()):
            raise CheckpointError(
                f"the file was made for another model: {name!r} is {saved.dtype} in the file and {tensor.dtype} in the "
                "model"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fit(into, shapes, carried.sizes, tensors, carried.dense)
    return into


def unwrap_module(what: str, value: Any) -> nn.Module:
    """The module, out of its wrappers."""
    if not isinstance(value, nn.Module):
        raise CheckpointError(f"{what} takes a torch.nn.Module, got {a_type(value)}: give the model itself")
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
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{name!r} is {a_type(tensor)} of layout {tensor.layout}; a checkpoint takes plain dense tensors: "
                "save sharded ones inside `with setpoint.unsharded(model):`, and dequantize quantized ones first"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no data: build the model on a real device")
        first[id(tensor)] = name
        own[name] = tensor
    return own, aliases


def _check_same_names(own: set[str], aliases: Mapping[str, str], saved: Iterable[str], tied: Mapping[str, str]) -> None:
    theirs, ours = {*saved, *tied}, {*own, *aliases}
    if theirs != ours:
        raise CheckpointError(
            f"the file was made for another model: only the file has {some_of(theirs - ours)}; "
            f"only the model has {some_of(ours - theirs)}; build `into` with the code of the saved model"
        )
    if differing := {name for name in ours if tied.get(name) != aliases.get(name)}:
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


# Files with a digest: a model's, and a run's.


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header, then name, dtype, shape and bytes of every tensor in order of names."""
    # A run's file has nothing in its header but the version, which its digest covers.
    total = hashlib.sha256((json.dumps(header, sort_keys=True) if header else str(FORMAT)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        what = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        total.update(json.dumps(what).encode())
        # A copy: one element or none may have any stride, and `view` needs 1.
        flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def write_file(path: Path, key: str, header: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write to a neighbouring file, `.NAME.PID.partial`, and rename it: nobody ever sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}: make it first")
    text = json.dumps({"format": FORMAT, **header, "sha256": digest(header, tensors)})
    try:
        partial.touch()  # with the rights of the user's other new files, which `save_file` does not give
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata={key: text})
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


def read_file(path: Path, key: str, foreign: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors that `write_file` wrote, with a right digest; `foreign` says what to do with other files."""
    if path.exists() and not path.is_file():  # to open a named pipe would wait for ever
        raise CheckpointError(f"{str(path)!r} is {'a folder' if path.is_dir() else 'no plain file'}, and {foreign}")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        # Only after it failed: a valid file begins with its header's length, which may have any first byte.
        if start[:1] == b"\x80" or start == b"PK\x03\x04":
            raise CheckpointError(
                f"{str(path)!r} is a pickle, as torch.save writes it, and is not opened, since a pickle can run any "
                "code: load it with torch.load(..., weights_only=True) and write it again with setpoint.save"
            ) from error
        # Not `from error`: Python would print its text, which may be the file's, as it is.
        raise CheckpointError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from None
    if key not in metadata:
        raise CheckpointError(f"{str(path)!r} is a safetensors file, but {foreign}")
    header = json_object(metadata[key]) or {}
    version, expected = header.pop("format", None), header.pop("sha256", None)
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{str(path)!r} has format {version}, this Setpoint reads up to {FORMAT}: upgrade Setpoint"
        )
    if version != FORMAT or digest(header, tensors) != expected:
        raise CheckpointError(f"{str(path)!r} is damaged: its digest does not match its contents; get it again")
    return header, tensors
