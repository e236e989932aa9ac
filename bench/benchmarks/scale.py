"""The price of scale: messages and bytes of sensing and deciding, counted on simulated ranks, and foretold for Llamas.

    python bench/benchmarks/scale.py --out results/scale.json

A mode counts the collectives that a small model's optimizer steps call, in a process group of PyTorch's that sends
nothing (`fake`), so that one process stands for any number of ranks. What a rank receives is counted by the ring
algorithms: `2 n (K - 1) / K` bytes for an all-reduce of n bytes over K ranks, `n (K - 1)` for an all-gather of n each.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import keep
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import setpoint
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule

RANKS = (2, 4, 8, 16, 32, 64)
MANY_RANKS = (8, 64, 256, 1024)
STEPS, LOOKED_AT, WIDTH = 40, 4, 64
TEXT_BYTES = 1024  # of a rank's message, in which it says whether it agrees
BLOCK = 2048  # columns of a moment that are gathered together
READ_BY = {"0": ("0.weight", "0.bias", "2.weight"), "2": ("2.weight", "2.bias", "4.weight")}
SHAPES = {
    "0.weight": (WIDTH, 16), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,), "4.weight": (4, WIDTH),
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts collectives, and the bytes that a rank receives by them, while it is active."""

    def __init__(self, ranks: int, *, simulates: bool) -> None:
        super().__init__()
        self.ranks, self.simulates, self.found = ranks, simulates, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            tensors = args[1] if name in ("allgather_", "_allgather_base_") else args[0]
            size = sum(each.numel() * each.itemsize for each in tree_leaves(tensors) if isinstance(each, torch.Tensor))
            others = self.ranks - 1
            if "gather" in name:
                kind, received = "text" if size == TEXT_BYTES else "all-gather", size * others
            elif "reduce_scatter" not in name and "reduce" in name:
                kind, received = "all-reduce", 2 * size * others / self.ranks
            else:
                raise AssertionError(f"{func} is counted nowhere")
            self.found[f"{kind}: messages"] += 1
            self.found[f"{kind}: bytes"] += received
            if kind == "all-reduce" and self.simulates:  # as if all ranks had sent the same
                for each in tree_leaves(tensors):
                    each.mul_(self.ranks)
        return func(*args, **(kwargs or {}))


def _kept(state: Any, bucket):  # type: ignore[no-untyped-def]  # a wrapper takes no annotation that is a string
    done: torch.futures.Future[Any] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@dataclass(frozen=True)
class Sizes:
    """What the messages of a decision are about."""

    units: int
    numbers: int  # of losses, counts and groups, which a reading also has
    moments: int = 0  # entries of the moments that the first decision sums over ranks
    read: Sequence[tuple[int, ...]] = ()  # shapes of the weights that the first decision gathers to score units
    shards: Sequence[tuple[int, ...]] = ()  # shapes of the tensors that a cut gathers, with a state of two moments
    sharded: bool = True


def foretold(sizes: Sizes, ranks: int, decides: bool) -> float:
    """Bytes that a rank receives of Setpoint's own in one optimizer step, where all sizes are of four bytes a number.

    With K ranks, u units and s further numbers it takes `8 u (K - 1) / K` to sense, and as much for the norms of a
    decision, where weights are sharded; `4 * 1024 (K - 1)` for words, `16 (3 u + s) (K - 1) / K` for the reading, and
    `8 m (K - 1) / K` for m entries of moments. For each entry of a shard, which is padded to equal rows, it takes
    `4 (K - 1)` to score units, and `12 (K - 1)` to cut them.
    """
    share = (ranks - 1) / ranks
    sensed = 8 * sizes.units * share * sizes.sharded
    if not decides:
        return sensed
    said = 4 * TEXT_BYTES * (ranks - 1) + 16 * (3 * sizes.units + sizes.numbers) * share + 8 * sizes.moments * share

    def entries(shapes: Sequence[tuple[int, ...]]) -> int:
        return sum(-(-shape[0] // ranks) * int(torch.Size(shape[1:]).numel()) for shape in shapes)

    gathered = 4 * entries(sizes.read) + 12 * entries(sizes.shards)
    return 2 * sensed + said + (ranks - 1) * gathered * sizes.sharded


def counted(host: str, ranks: int, *, gradual: bool) -> list[dict[str, Any]]:
    """What is sent in each of the first optimizer steps, in this process's group, and what the formula says of it."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    model: nn.Module = nn.Sequential(*layers)
    if host == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    else:
        model = DistributedDataParallel(model)
        if dist.get_backend() == "fake":
            model.register_comm_hook(None, _kept)  # the wrapper's own averaging is in C++, and knows no such group
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(32, 16)
    controller = PricedController(Schedule.gradual()) if gradual else None
    settings = {"total_steps": STEPS, "example": (x,), "controller": controller, "verify": False}
    loop = setpoint.attach(model, optimizer, "50% flops", **settings)
    rows, shared = [], 0
    for step in range(1, LOOKED_AT + 1):
        model(x).square().mean().backward()
        entries, units = len(loop.ledger), sum(loop.widths.values())
        dense, met = loop.widths == loop.dense_widths, loop.budget_met  # within budget nothing is read any more
        with Counting(ranks, simulates=dist.get_backend() == "fake") as counting:
            optimizer.step()
        optimizer.zero_grad()
        decided = loop.ledger[entries:]
        if decided and not dense:
            break  # later cuts gather less, as the first ones left it
        cut = {name for entry in decided for name, dropped in entry.dropped.items() if dropped}
        sizes = Sizes(
            units,
            2 * (step - shared) + 8,
            0 if gradual else 2 * (WIDTH + 1) ** 2,
            [] if gradual else [SHAPES["2.weight"], SHAPES["4.weight"]],
            [SHAPES[name] for name in sorted({name for group in cut for name in READ_BY[group]})],
            host == "fully_shard",
        )
        found, total = counting.found, sum(count for name, count in counting.found.items() if "bytes" in name)
        messages = sum(count for name, count in found.items() if "messages" in name)
        own = {"bytes": total, "foretold": 0.0 if met else foretold(sizes, ranks, bool(decided))}
        rows.append({"step": step, "decides": bool(decided), "cut": sorted(cut), "messages": messages, **own})
        shared = step if decided else shared
    loop.detach()
    return rows


def simulated(host: str, ranks: int, *, gradual: bool) -> list[dict[str, Any]]:
    """The same in a group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return counted(host, ranks, gradual=gradual)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama 3."""

    layers: int
    width: int
    neurons: int
    kv_heads: int
    weights: float
    kv_width: int = 1024

    def sizes(self, *, first: bool) -> Sizes:
        """Of a decision, or the first one, with a cut of every layer."""
        blocks = -(-self.neurons // BLOCK) + -(-self.width // BLOCK)
        d, n = self.width, self.neurons
        shapes = [(d, d), (self.kv_width, d), (self.kv_width, d), (d, d), (n, d), (n, d), (d, n)] * self.layers
        units = self.layers * (n + self.kv_heads)
        numbers, read = 2 * 500 + 6 + 2 * self.layers, [(d, d), (d, n)] * self.layers
        moments = self.layers * blocks * (BLOCK + 1) ** 2
        return Sizes(units, numbers, moments, read, shapes) if first else Sizes(units, numbers, shards=shapes)


LLAMAS = {"Llama 3 8B": Llama(32, 4096, 14336, 8, 8.03e9), "Llama 3 70B": Llama(80, 8192, 28672, 8, 70.6e9)}


def large() -> Iterable[dict[str, Any]]:
    """Bytes that a rank receives under `fully_shard`, of Setpoint's own and of a step of training in bfloat16."""
    for name, llama in LLAMAS.items():
        for ranks in MANY_RANKS:
            later, first = (llama.sizes(first=each) for each in (False, True))
            no_cut = Sizes(later.units, later.numbers)
            deciding = foretold(no_cut, ranks, True)
            yield {
                "model": name,
                "ranks": ranks,
                "step": 3 * 2 * llama.weights * (ranks - 1) / ranks,  # weights twice, and gradients
                "sensing": foretold(no_cut, ranks, False),
                "deciding": deciding,
                "moments": foretold(first, ranks, True) - foretold(later, ranks, True),
                "cut": foretold(later, ranks, True) - deciding,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--real", action="store_true", help="count in the gloo group of torchrun, which started this")
    args = parser.parse_args()
    if args.real:
        dist.init_process_group("gloo")
    ranks_of = (dist.get_world_size(),) if args.real else RANKS
    count = counted if args.real else simulated
    found = [
        {"host": host, "ranks": ranks, "gradual": gradual, **row}
        for host in ("DistributedDataParallel", "fully_shard")
        for ranks in ranks_of
        for gradual in (True, False)
        for row in count(host, ranks, gradual=gradual)
    ]
    if not args.real or dist.get_rank() == 0:
        keep({"counted": found, "large": list(large())}, args.out, shown={"counted": found})


if __name__ == "__main__":
    main()
