"""The ranks that train copies of one model together: the mean over them, and what each has to say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64

_MESSAGE_BYTES = 1024
"""Length of a message; each rank sends as much, so that nobody has to know how long the others' are."""


@final
@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a process group, each with a copy of the model; a process that trains alone has no group.

    Both methods are collective: every rank calls them, in the same order. A rank that is lost makes them raise a
    `RuntimeError` on the others, at once or when the time-out of the group is over.

    Args:
        group: the process group, or None.
        device: where what is sent must lie: the CPU for gloo, the model's GPU for NCCL.

    >>> Ranks().count, Ranks().mean(np.array([1.0, 2.0])), Ranks().hear("here")
    (1, array([1., 2.]), ['here'])
    """

    group: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def own(self) -> int:
        """The rank of this process among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def mean(self, values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """The mean over ranks of each entry, by one all-reduce; on all ranks the same to the last bit.

        Args:
            values: as many on every rank.
        """
        if self.count == 1:
            return values
        total = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(total, group=self.group)
        mean: np.ndarray = total.cpu().numpy() / self.count
        return mean

    def hear(self, message: str) -> list[str]:
        """What every rank says, in the order of ranks; a message is cut to 1024 bytes.

        Args:
            message: of this rank.
        """
        if self.count == 1:
            return [message]
        text = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        heard = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(heard, own, group=self.group)
        return [bytes(each.cpu().numpy()).rstrip(b"\0").decode(errors="ignore") for each in heard]
