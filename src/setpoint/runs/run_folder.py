"""A run folder: what a run file is where the model is sharded over ranks, written by `torch.distributed.checkpoint`."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setpoint.checkpoint import damaged, digest
from setpoint.checkpoint.tree import from_tensors, to_tensors
from setpoint.distributed import Ranks, is_sharded, is_sharded_tensor, local, ranks_of, rows_of, sharded_over
from setpoint.errors import CheckpointError
from setpoint.host.together import together

_INDEX = re.compile(r"rank (\d+) of (\d+) ([0-9a-f]{64})")
_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
"""What the description that PyTorch writes of a checkpoint, which is a pickle, may be made of."""

_SUMS = "sha256.json"


def spread_over(parts: Mapping[str, Any]) -> tuple[Ranks, Any]:
    """The ranks over which any model among the parts is spread, and their mesh; this process alone, and None."""
    models = [part for part in parts.values() if isinstance(part, nn.Module)]
    for module in (each for model in models for each in model.modules()):
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]  # after a forward pass some parameters are whole
    tensors = [each for model in models for each in model.parameters()]
    sharded = [each for each in tensors if is_sharded_tensor(each)]
    return ranks_of(sharded), sharded[0].device_mesh if sharded else None  # type: ignore[attr-defined]


def write_folder(path: Path, tree: Any, ranks: Ranks) -> None:
    """Write nested plain data, with tensors that lie on several ranks, into a folder of its own.

    Of a sharded tensor each rank writes its part. Every other tensor has the digest of its contents for a name,
    so that it is written once where ranks have the same, and ranks may have different ones. Each rank has an
    index of its own: the names of its tensors, and the digests of its parts. The first rank adds the digests of all
    files. The folder is written beside its place and renamed when it is whole.

    Raises:
        CheckpointError: when there is such a path (it is the same on all ranks), or it cannot be written.
        RankError: when another rank cannot.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    partial = path.with_name(f".{path.name}.partial")
    with together(ranks, f"the start of saving {path.name!r}"):
        if path.exists():
            raise CheckpointError(f"{str(path)!r} exists: a sharded run is saved to a folder of its own each time")
        sharded: dict[str, Tensor] = {}
        plain = to_tensors(tree, sharded)
        index = {"plain": {name: _sha256(tensor) for name, tensor in plain.items()}, "parts": _parts(sharded)}
        text = json.dumps(index).encode()
        name = f"rank {ranks.own} of {ranks.count} {hashlib.sha256(text).hexdigest()}"
        flat = {index["plain"][number]: tensor for number, tensor in plain.items()} | sharded
        flat[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if ranks.own == 0:
            shutil.rmtree(partial, ignore_errors=True)
    with together(ranks, f"saving {path.name!r}"):
        try:
            save(flat, checkpoint_id=partial, process_group=ranks.group)
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"cannot write {str(path)!r}: {error}") from error
    with together(ranks, f"the end of saving {path.name!r}"):
        if ranks.own == 0:
            sums = {file.name: _sha256_of(file) for file in sorted(partial.iterdir())}
            (partial / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
            os.rename(partial, path)


def read_folder(path: Path, ranks: Ranks, mesh: Any) -> dict[str, Any]:
    """Read what `write_folder` wrote; sharded tensors are sharded over the ranks that read.

    With another number of ranks than wrote it, the data of a rank that had no counterpart is that of the first.

    Raises:
        CheckpointError: when there is no such folder, or it is damaged.
        RankError: when another rank cannot read it.
    """
    with together(ranks, f"loading {path.name!r}"):
        sums, reader, sizes = _described(path)
        indices = {match[1]: match for match in map(_INDEX.fullmatch, sizes) if match}
        own = indices.get(str(ranks.own)) or indices.get("0")
        if own is None:
            raise CheckpointError(
                f"{str(path)!r} was not written by setpoint.save_run: read a model's file by setpoint.load"
            )
    index_bytes = _loaded(path, reader, {own[0]: torch.empty(sizes[own[0]].size, dtype=torch.uint8)}, ranks)[own[0]]
    with together(ranks, f"loading {path.name!r}"):
        text = index_bytes.numpy().tobytes()
        if hashlib.sha256(text).hexdigest() != own[3]:
            raise damaged(path)
        index = json.loads(text)
        if not {*index["plain"].values(), *index["parts"]} <= set(sizes):
            raise damaged(path)
        whole_ones = {name: sizes[name] for name in index["plain"].values()}
        wanted = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in whole_ones.items()}
        wanted |= {name: _empty(sizes[name], mesh) for name in index["parts"]}
    found = _loaded(path, reader, wanted, ranks)
    with together(ranks, f"loading {path.name!r}"):
        plain = {number: found[name] for number, name in index["plain"].items()}
        sharded = {name: found[name] for name in index["parts"]}
        same = int(own[2]) == ranks.count  # else the parts are others, and only whole files can be checked
        if not same:
            _check_files(path, ranks, sums)
        whole = all(_sha256(plain[number]) == name for number, name in index["plain"].items())
        if not whole or (same and _parts(sharded) != index["parts"]):
            raise damaged(path)
        return dict(from_tensors(plain | sharded))


def _check_files(path: Path, ranks: Ranks, sums: Mapping[str, str]) -> None:
    try:
        whole = all(_sha256_of(path / name) == sums[name] for name in sorted(sums)[ranks.own :: ranks.count])
    except OSError as error:
        raise damaged(path) from error
    if not whole or {file.name for file in path.iterdir()} != {*sums, _SUMS}:
        raise damaged(path)


def _sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _loaded(path: Path, reader: Any, tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with together(ranks, f"loading {path.name!r}"):
        try:
            load(tensors, storage_reader=reader, process_group=ranks.group)
        except (OSError, CheckpointException) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
    return tensors


def _described(path: Path) -> tuple[dict[str, str], Any, dict[str, Any]]:
    """The digests of all files, what reads the folder, and what it says that it holds; nothing in it is run as code.

    The digest of what describes it is looked at first: a pickle with a byte changed may ask for memory without end.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as file:
                return _Restricted(file).load()

    try:
        text = (path / _SUMS).read_text(encoding="utf-8")
        sums = {str(name): str(each) for name, each in json.loads(text).items()}
        if _sha256_of(path / ".metadata") != sums[".metadata"]:
            raise ValueError("the digest of its description does not match")
        reader = Reader(path)
        sizes = reader.read_metadata().state_dict_metadata
        if not all(isinstance(each, TensorStorageMetadata) for each in sizes.values()):
            raise ValueError("it holds something else than tensors")
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(
            f"{str(path)!r} is not a folder that setpoint.save_run wrote, or damaged: {error}"
        ) from error
    return sums, reader, sizes


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _sha256(tensor: Tensor) -> str:
    return digest({"": tensor}, "")


def _parts(sharded: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _sha256(local(tensor).detach().cpu().contiguous()) for name, tensor in sharded.items()}


def _empty(size: Any, mesh: Any) -> Tensor:
    form = torch.empty(size.size, dtype=size.properties.dtype, device="meta")
    mine = torch.zeros_like(form[rows_of(len(form), mesh)], device=mesh.device_type)
    return sharded_over(mine, tuple(form.shape), mesh)
