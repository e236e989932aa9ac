"""The ranks that train one model together: mean, sum and messages over them, and the shard that each one has."""

import math
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from setpoint.errors import GroupError
from setpoint.messages import a_type

# Each rank sends as much, so that nobody has to know how long the messages of the others are.
_MESSAGE_BYTES = 1024
# How long we wait at most until the threads of gloo have dropped what was sent.
_LET_GO_S = 1.0


@final
@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a group, each with a copy or a shard of the model; a process that trains alone has no group.

    All methods are collective: every rank calls them, in the same order. A rank that is lost makes them raise a
    `RuntimeError` on the others, at once or when the time-out of the group is over.
    """

    group: Any = None  # the process group
    # Where what is sent must lie: the CPU for gloo, the model's GPU for NCCL.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    alike: int = 1  # how many ranks at a time have the same samples, as those of tensor parallelism do

    @property
    def count(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def shares(self) -> int:
        """The parts of a global batch that differ."""
        return self.count // self.alike

    @property
    def own(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def mean(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """The mean over ranks of each entry, by one all-reduce; on all ranks the same to the last bit."""
        return values if self.count == 1 else self.total(torch.from_numpy(values.copy())).numpy() / self.count

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of each entry, by one all-reduce; on all ranks the same to the last bit."""
        if self.count == 1:
            return values
        sent = [values.to(self.device, copy=True)]
        dist.all_reduce(sent[0], group=self.group)
        total = sent[0].to(values.device, copy=True)
        _let_go(sent)
        return total

    def each(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "ranks n"]:
        """The values of every rank, by one all-gather."""
        return values[None] if self.count == 1 else self._gathered(torch.from_numpy(values)).cpu().numpy()

    def part(self, length: int) -> slice:
        """This rank's part of `length` entries: equal parts in order, but for the last ones."""
        return _part(length, self.own, self.count)

    def joined(self, part: Tensor, length: int) -> Tensor:
        """All `length` entries, of which each rank has its `part`, by one all-gather; on the device of the part."""
        if self.count == 1:
            return part
        found = self._gathered(torch.nn.functional.pad(part, (0, -(-length // self.count) - len(part))))
        return found.flatten()[:length].to(part.device)

    def all_gather_text(self, message: str) -> list[str]:
        """The message of every rank, in the order of ranks; each is cut to 1024 bytes."""
        if self.count == 1:
            return [message]
        text = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
        gathered = self._gathered(torch.frombuffer(bytearray(text), dtype=torch.uint8)).cpu().numpy()
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered]

    def _gathered(self, own: Tensor) -> Tensor:
        """`own` of every rank, stacked, by one all-gather."""
        sent = [torch.empty_like(own, device=self.device) for _ in range(self.count)]
        sent.append(own.to(self.device, copy=True))
        dist.all_gather(sent[:-1], sent[-1], group=self.group)
        found = torch.stack(sent[:-1])
        _let_go(sent)
        return found


def _let_go(sent: list[Tensor]) -> None:
    """Empty a list with the only references to tensors that were sent, and wait until PyTorch has dropped its own."""
    # A thread of gloo holds what was sent for some microseconds more, and takes Python's lock to drop it. A process
    # that ends in that moment aborts. The wait is never long, since a debugger or a profiler may keep tensors.
    on_cpu = all(tensor.device.type == "cpu" for tensor in sent)
    left = [weakref.ref(tensor) for tensor in sent]
    sent.clear()
    until = time.monotonic() + _LET_GO_S
    while on_cpu and any(tensor() is not None for tensor in left) and time.monotonic() < until:
        time.sleep(2e-5)  # also lets the other thread have the lock


def is_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before `fully_shard`."""
    kinds = list(type(module).__mro__)
    behind = [kind.__name__ for kind in kinds].index("FSDPModule") + 1 if is_sharded(module) else 0
    return kinds[behind]


def is_sharded_tensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # as DTensors have


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, without a copy; any other tensor as it is."""
    return tensor.to_local() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def unsharded_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, a collective call; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def _part(length: int, own: int, count: int) -> slice:
    per_rank = -(-length // count)
    return slice(min(own * per_rank, length), min((own + 1) * per_rank, length))


def region(tensor: Tensor) -> tuple[slice, ...]:
    """By dim, which entries this rank's shard of a tensor has."""
    if is_sharded_tensor(tensor):
        return region_on(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return tuple(slice(0, length) for length in tensor.shape)


def region_on(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[slice, ...]:
    """The same of a tensor of this shape, placed on a mesh like this."""
    found = [slice(0, length) for length in shape]
    # FSDP has sharded the shards of tensor parallelism, which come first although their mesh dim is behind its own.
    for axis, placed in sorted(enumerate(placements), key=lambda each: "Strided" in type(each[1]).__name__):
        if hasattr(placed, "dim"):
            whole = found[placed.dim]
            part = _part(whole.stop - whole.start, mesh.get_local_rank(axis), mesh.size(axis))
            found[placed.dim] = slice(whole.start + part.start, whole.start + part.stop)
    return tuple(found)


def shared_by(tensor: Tensor, ranks: Ranks) -> int:
    """How many of these ranks have the same shard of a tensor, or the same part of a sum that is not added up yet."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    placements: Any = tensor.placements if mesh else ()  # type: ignore[attr-defined]
    split = (int(mesh.size(axis)) for axis, placed in enumerate(placements) if not placed.is_replicate())
    return ranks.count // math.prod(split)


def ranks_on(mesh: Any) -> Ranks:
    """The ranks of a mesh, of one dim or several."""
    everyone = mesh.size() == dist.get_world_size()
    group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD if everyone else mesh._flatten().get_group()
    return Ranks(group, torch.device(mesh.device_type))


def ranks_of(tensors: Iterable[Tensor]) -> Ranks:
    """The ranks that these tensors lie on, those of the largest mesh; this process where none is sharded."""
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if is_sharded_tensor(tensor)]  # type: ignore[attr-defined]
    return ranks_on(max(meshes, key=lambda mesh: mesh.size())) if meshes else Ranks()


def is_spread(model: nn.Module) -> bool:
    """Whether `fully_shard` or tensor parallelism has spread a model over ranks."""
    return any(map(is_sharded, model.modules())) or any(map(is_sharded_tensor, model.parameters()))


def check_module(model: Any) -> None:
    """Check that this is a model, or raise GroupError."""
    if not isinstance(model, nn.Module):
        raise GroupError(f"model must be a torch.nn.Module, got {a_type(model)}: give the model itself")


def unwrapped(part: Any) -> Any:
    """A model out of `torch.compile`, `DistributedDataParallel` and Fabric's wrapper; anything else as it is."""
    while True:
        # DeepSpeed's engine answers for what is in it, and a script has a table of its own.
        parts = getattr(part, "_modules", None)
        wrapped = parts.get("_orig_mod") if isinstance(parts, dict) else None
        inside = part.module if isinstance(part, DistributedDataParallel) else wrapped
        if type(part).__name__ == "_FabricModule":  # its `module` would be the one in DistributedDataParallel
            inside = part._forward_module
        if not isinstance(inside, nn.Module):
            return part
        part = inside
